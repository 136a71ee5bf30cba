"""The demo on a tiny model, and what it says where a download fails."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path

import pandas
import pytest

from lightning_softprompt import SoftPrompts

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo

    yield demo
    for name in ("demo", "smollm2_and_vader"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore")
def test_the_demo_leaves_what_it_promises(demo, tiny_base, tmp_path, monkeypatch, capsys) -> None:
    cells = itertools.product(*demo.LABELS.values())
    rows = [dict(zip(("text", *demo.LABELS), ("it is a film", *cell), strict=True)) for cell in cells]
    splits = {name: tmp_path / f"{name}.jsonl" for name in ("train", "validation", "test")}
    for path in splits.values():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(demo, "prepare_texts", lambda cache: splits)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--base", str(tiny_base), "--output", "out", "--steps", "6"])
    monkeypatch.chdir(tmp_path)
    demo.main()
    printed = capsys.readouterr().out
    assert "held-out accuracy" in printed and "average gain" in printed and printed.count(" → ") == 3
    results = json.loads(Path("out/results.json").read_text())
    assert results["rows"] == 16 and set(results["accuracy"]) == {"no prompt", "hard prompt", "tuned"}
    # Classes are balanced and all texts are the same, so any answer is right as often as a guess.
    for values in results["accuracy"].values():
        assert values == {"sentiment": 50, "source": 25, "strength": 50}
    prompts = SoftPrompts.from_pretrained("out/prompts")
    assert prompts.tasks == tuple(demo.LABELS) and len(set(prompts.lengths)) > 1
    frame = pandas.read_csv("out/metrics.csv")
    assert frame["train/loss/source"].count() == 6 and frame["val/accuracy/source"].count() == 4
    assert frame.dropna(subset="val/accuracy/source")["step"].iloc[0] == 0
    assert Path("out/training.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_download_says_what_to_do(demo, tmp_path) -> None:
    import smollm2_and_vader

    with pytest.raises(SystemExit) as caught:
        smollm2_and_vader._pip_download("vaderSentiment==3.3.2", tmp_path, "--no-deps", "--no-index", "--find-links=.")
    message = str(caught.value)
    assert "could not be downloaded from PyPI" in message and "run the same command again" in message


def test_the_base_can_be_made_alone(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / ".cache" / "smollm2-135m").mkdir(parents=True)  # as an earlier call left it
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "smollm2_and_vader.py"), run_name="__main__")
    assert capsys.readouterr().out == ".cache/smollm2-135m\n"
