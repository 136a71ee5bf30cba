"""Where a key stands in what a user wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_softprompt.cli.places import config_files, place_of, wrong_in_configs

CONFIG = """\
trainer:
  max_epochs: 3
data:
  init_args:
    tasks:
      a: {labels: [yes, sure]}
      b:
        labels: ["x", "y"]
    train: [{path: rows.jsonl, tsk: a}]
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return str(tmp_path / "run.yaml")


def test_a_key_is_found_by_some_of_the_keys_above_it(config: str) -> None:
    arguments = ["fit", "--config", config]
    assert place_of(["data", "train", "tsk"], arguments) == f"{config}, line 9, data.init_args.train.0.tsk"
    assert place_of(["data", "tasks", "labels"], arguments, "['x', 'y']").endswith(
        "line 8, data.init_args.tasks.b.labels"
    )
    assert place_of(["data", "tasks", "labels"], arguments, "[True, 'sure']").endswith(
        "line 6, data.init_args.tasks.a.labels"
    )
    assert place_of(["data", "gone"], arguments) == "data.gone"


def test_an_option_stands_before_what_a_config_says(config: str) -> None:
    option = "--trainer.max_epochs"
    assert place_of(["trainer", "max_epochs"], ["fit", f"--config={config}", f"{option}=x"]) == option
    assert config_files(["fit", f"--config={config}", "-c", "other.yaml"]) == [config, "other.yaml"]


@pytest.mark.parametrize(
    "content, wrong",
    [
        (b"trainer: {max_epochs: 1}\n", None),
        (b"trainer: other.yaml\n", None),
        (b"trainer: 5\n", "line 1, trainer: expected keys below it"),
        (b"seed: 1\ntraner: {}\n", "line 2, traner: 'traner' is not known; do you mean 'trainer'?"),
        (
            b"trainer:\n  max_epoch: {}\n",
            "line 2, trainer.max_epoch: 'max_epoch' is not known; do you mean 'max_epochs'?",
        ),
        (b"just words\n", "holds no keys"),
        (b"", "holds no keys"),
        (b"a: [1\n", "this is no YAML"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_it_is_parsed(
    tmp_path: Path, content: bytes, wrong: str | None
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    found = wrong_in_configs(["--config", str(path)], ["seed", "trainer", "trainer.max_epochs", "trainer.devices"])
    assert (found is None) if wrong is None else (found is not None and wrong in found and str(path) in found)
