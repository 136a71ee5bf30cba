"""The commands of the README have options that vLLM has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_vllm_takes_the_options_of_the_readme() -> None:
    (line,) = [line for line in README.splitlines() if line.startswith("vllm serve ")]
    parser = make_arg_parser(FlexibleArgumentParser())
    assert parser.parse_args(["--model", *shlex.split(line)[2:]]).enable_prompt_embeds
    known = {option for action in parser._actions for option in action.option_strings}
    named = set(re.findall(r"`(--[a-z-]+)", README))
    assert len(named) > 3 and named <= known, named - known
