"""What leaves training is enough to answer: from the folder and from the checkpoint, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_softprompt import MixedTaskGenerator, SoftPrompts
from tests.cli.command_line import ROOT, overrides, run

TEXTS = [("sentiment", "it is so good"), ("source", "the film is bad"), ("sentiment", "so bad")]


def answered(command: str, base: Path, prompts: Path, folder: Path, name: str) -> list[dict]:
    asked = folder / "texts.jsonl"
    asked.write_text("".join(json.dumps({"task": task, "text": text}) + "\n" for task, text in TEXTS))
    run(command, "--base", base, "--prompts", prompts, "--input", asked, "--output", folder / name)
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_bare_texts_are_answered_alike_from_the_folder_and_from_the_checkpoint(tiny_base, tmp_path) -> None:
    fit = run("fit", "--config", ROOT / "examples/mixed_tasks.yaml", *overrides(tiny_base, tmp_path), "--json")
    checkpoint = json.loads(fit.stdout.splitlines()[-1])["checkpoint"]  # the best one, whose prompts the folder has
    run("extract", "--checkpoint", checkpoint, "--output", tmp_path / "extracted")
    trained = SoftPrompts.from_pretrained(tmp_path / "prompts")
    assert set(trained.templates) == set(trained.tasks) == {"sentiment", "source"}

    places = [tmp_path / "prompts", tmp_path / "extracted", Path(checkpoint)]
    for command in ("generate", "classify"):
        first, *others = (answered(command, tiny_base, place, tmp_path, "out.jsonl") for place in places)
        for row in first:  # another process has its weights at other places, and may round otherwise
            if "probabilities" in row:
                row["probabilities"] = pytest.approx(row["probabilities"], rel=1e-5)
        assert others == [first] * 2
        labels = [row["output"] if command == "generate" else row["label"] for row in first]
        assert labels[0] in ("positive", "negative") and labels[1] in ("film", "product")
        generator = MixedTaskGenerator.from_pretrained(tiny_base, tmp_path / "prompts")
        assert labels == generator.answer([text for _, text in TEXTS], [task for task, _ in TEXTS])
