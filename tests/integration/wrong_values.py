"""Wrong values for every command, as people write them; each call is made in this process and judged by what it says.

`python -m tests.integration.wrong_values` makes 500 calls, with `--count` and `--seed` others.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's library is imported: wrong names are looked for here

from lightning_softprompt import SoftPrompts, cli
from lightning_softprompt.cli.main import ROOMS, function_of
from lightning_softprompt.prompts.characters import has_control

# What stands in the fallback line of an error that only a mistake of the library can raise.
PROGRAMMERS = ("AttributeError", "KeyError", "IndexError", "NameError", "AssertionError", "UnboundLocalError")
VALUES = ["", " ", "-1", "0", "1e400", "nan", "no", "true", "null", "[", "{", "[]", "{}", "[1, 2]", "a: b", "é\x1b[31m"]
VALUES += ["/dev/null", "x" * 300, "a\nb", "--", "%s{}", "gone.jsonl", "1.5", "\ud800"]
# Of these much is what was asked for: processes, steps, memory.
COUNTS = ("devices", "num_nodes", "num_workers", "steps", "length", "start")
HUGE = "999999999999999999999"


class World:
    """A folder with a base, prompts, rows and a config that are right, and files that are wrong.

    Args:
        folder: an empty folder.
        base: folder of a tiny base model.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        rows = [{"task": "a", "text": f"{word} film", "label": word} for word in ("good", "bad")] * 4
        self.rows = self._write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.teacher = self._write("teacher.txt", "Decide whether the text is good or bad . " * 3)
        self.prompts = folder / "prompts"
        from tests import tiny

        model = tiny.tiny_model()
        SoftPrompts.for_model(model, {"a": 3, "b": 2}).save_pretrained(self.prompts)
        self.wrong = [
            self._write("binary", b"\x00\xff\xfe\x80" * 50),
            self._write("empty.jsonl", ""),
            self._write("list.json", "[1, 2]"),
            self._write("broken.jsonl", '{"task": "a"\n'),
            self._write("broken.csv", 'a,b\n"1,2\n'),
            self._write("words.yaml", "just words\n"),
            self._write("text.ckpt", "this is no checkpoint\n"),
            self._write("noise.parquet", b"PAR1 nothing"),
            str(folder / "gone" / "file"),
            str(folder),
            str(self.prompts),
            str(base),
        ]
        template = {"text": "{text} =>", "target": " {label}", "labels": [" good", " bad"]}
        self.config: dict[str, Any] = {
            "seed_everything": 0,
            "prompts": {"tasks": {"a": 3}, "prefix": "auto"},
            "model": {
                "class_path": "lightning_softprompt.CausalLMModule",
                "init_args": {"base": str(base), "warmup_fraction": 0.1, "max_new_tokens": 4, "objective": "auto"},
            },
            "data": {
                "class_path": "lightning_softprompt.TaskDataModule",
                "init_args": {
                    "tokenizer": str(base),
                    "tasks": {"a": template},
                    **{split: self.rows for split in ("train", "validation", "test", "predict")},
                    **{"batch_size": 4, "max_length": 32, "num_workers": 0, "seed": 0, "temperature": 1.0},
                },
            },
            "trainer": {
                **{"max_epochs": 1, "accelerator": "cpu", "devices": 1, "precision": "32-true", "logger": False},
                **{"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 1.0},
                **{"default_root_dir": str(folder / "out"), "log_every_n_steps": 1, "val_check_interval": 1.0},
                "callbacks": [{"class_path": "lightning_softprompt.CollapseGuard", "init_args": {"patience": 3}}],
            },
        }

    def _write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def call(self, draw: random.Random) -> list[str]:
        """A command with something wrong in it."""
        command = draw.choice([name for name in ROOMS if name != "completion"])
        if ROOMS[command] == "trainer":
            return self._trainer_call(command, draw)
        right = {
            "base": str(self.base),
            "prompts": str(self.prompts),
            "input": self.rows,
            "output": str(self.folder / f"made{draw.randrange(10**6)}"),
            "teacher": self.teacher,
            "texts": self.rows,
            "data": self.rows,
            "task": draw.choice(["a", "new"]),
            "tasks": "a",
            "folders": str(self.prompts),
            "adapters": str(self.prompts),
            "checkpoint": str(self.folder / "gone.ckpt"),
            "gguf": str(self.folder / "gone.gguf"),
            "start": "4",
            "to": "c",
            "steps": "1",
            "length": "2",
            "max_new_tokens": "2",
        }
        parameters = inspect.signature(function_of(command)).parameters
        given = {name: right[name] for name, each in parameters.items() if name in right and each.default is each.empty}
        given |= {name: right[name] for name in ("steps", "length", "max_new_tokens") if name in parameters}
        for name in draw.sample(list(parameters), k=draw.choice([1, 1, 2])):
            if name not in ("port", "host"):
                given[name] = draw.choice([*VALUES, *self.wrong, *([] if name in COUNTS else [HUGE])])
                if parameters[name].annotation == "int" and draw.random() < 0.7:
                    given[name] = draw.choice(["0", "-1", "1", *([] if name in COUNTS else ["100000", HUGE])])
        if draw.random() < 0.1:
            given.pop(draw.choice(list(given)))
        if draw.random() < 0.1:
            given[draw.choice(list(parameters)) + draw.choice("xs_")] = "1"
        if command == "serve":  # only its arguments are tried: it must fail
            given["port"] = draw.choice(["no", "-5", "70000"])
        return [command, *(part for name, value in given.items() for part in (f"--{name}", value))]

    def _trainer_call(self, command: str, draw: random.Random) -> list[str]:
        made = json.loads(json.dumps(self.config))
        for _ in range(draw.choice([1, 1, 2])):
            self._spoil(made, draw)
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(made, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        arguments = [command, "--config", str(path)]
        if draw.random() < 0.2:
            arguments += ["--ckpt_path", draw.choice(VALUES + self.wrong)]
        if draw.random() < 0.1:
            group = draw.choice(["trainer", "data", "model", "promts"])
            arguments += [f"--{group}.{draw.choice(['x', 'init_args.y'])}=1"]
        return [*arguments, "--trainer.max_steps=2"]

    def _spoil(self, made: Any, draw: random.Random) -> None:
        """Put something wrong into one place of a config: a value, a key, or a key that is gone."""
        places = list(_places(made))
        above, key = draw.choice(places)
        how = draw.random()
        others = [-1, 0, 1.5, True, None, [], {}, [1], {"x": 1}, float("nan"), *([] if key in COUNTS else [10**30])]
        value = draw.choice([*VALUES[:-1], *self.wrong, *others])
        if isinstance(above[key], int | float) and draw.random() < 0.7:  # a number, too, and out of its range
            value = draw.choice([0, -1, 1, 0.0, -0.5, 2.5, *([] if key in COUNTS else [100000, 10**30])])
        if how < 0.6 or isinstance(above, list):
            above[key] = value
        elif how < 0.8:
            above[f"{key}{draw.choice('xs_')}"] = above.pop(key)
        elif how < 0.9:
            above[draw.choice(["extra", "no", ""])] = value
        else:
            above.pop(key)


def _places(node: Any) -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from _places(value)


def judge(arguments: list[str]) -> tuple[str, str]:
    """What is wrong with how a command ended, empty where nothing is; and its last line."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    except BaseException as error:
        return f"a traceback: {type(error).__name__}: {error}", ""
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if "Traceback" in err.getvalue():
        return "a traceback", last
    if status in (0, None):
        return "", ""
    if status not in (1, 2) or not last.startswith("error: "):
        return f"exit status {status}", last
    if status == 2 and len(lines) > 1:
        return f"{len(lines)} lines of usage", last
    if has_control(last):
        return "control characters", last
    programmers = next((name for name in PROGRAMMERS if f"({name}; --debug" in last), None)
    return (f"{programmers}, a mistake of the library" if programmers else ""), last


def run(world: World, count: int, seed: int) -> tuple[list[str], Counter[str]]:
    """Make calls. Returns what was wrong, and how often calls ended in which way."""
    draw, wrong, ended = random.Random(seed), [], Counter[str]()
    before = os.getcwd()
    os.chdir(world.folder)  # what a wrong path writes, it writes there
    try:
        for number in range(count):
            arguments = world.call(draw)
            reason, last = judge(arguments)
            ended["went through" if not last else "one line"] += 1
            if reason:
                wrong.append(f"call {number}: {reason}: {last!r}\n    {arguments!r}")
                if ROOMS[arguments[0]] == "trainer":
                    wrong[-1] += "\n" + (world.folder / "run.yaml").read_text(errors="replace")
    finally:
        os.chdir(before)
    return wrong, ended


def main() -> None:
    """Make many calls, print what was wrong, and exit with 1 where something was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from tests import tiny
    from tests.tokenizer import word_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        tiny.tiny_model("llama").save_pretrained(base)
        words = ["good", "bad", "film", "Decide", "whether", "the", "text", "is", "or", ".", "=>"]
        word_tokenizer(words).save_pretrained(base)
        began = time.time()
        wrong, ended = run(World(Path(folder), base), options.count, options.seed)
    print("\n".join(wrong))
    print(f"{options.count} calls in {time.time() - began:.0f} seconds: {dict(ended)}, {len(wrong)} of them wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
