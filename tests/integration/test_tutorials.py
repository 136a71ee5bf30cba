"""The pages that lead through a use: their code runs one after the other, and their configs are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lightning_softprompt import SoftPrompts, cli
from tests.integration.pages import PAGES, ROOT, blocks
from tests.integration.test_docs import run
from tests.modules import Rows

CONFIGS = [(page, number) for page in PAGES for number in range(len(blocks(page, "yaml")))]


@pytest.mark.filterwarnings("ignore")
def test_a_module_of_ones_own_trains_answers_and_is_got_out_of_a_checkpoint(tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = Rows(6, names=False)
    rows.rows = [(ids % 20, ["sentiment", "source", "topic"][task]) for ids, task in rows.rows]
    rows.key = "tasks"
    assert AutoTokenizer.from_pretrained(tiny_base).pad_token_id == 1
    loader = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=rows.collate)
    names: dict = {"BASE": str(tiny_base), "train_dataloaders": loader}
    run("docs/own_module.md", names, 2)
    trained = names["callback"].prompts
    assert trained.lengths[1:] == (12, 20) and SoftPrompts.from_pretrained("prompts").templates.keys() == {"sentiment"}
    names["trainer"].save_checkpoint("last.ckpt")
    own = {name: names[name] for name in ("MyModule", "train_dataloaders")}

    names = {**own, "val_dataloaders": loader}
    run("docs/early_stopping.md", names, 1)
    assert {f"val/accuracy/{task}" for task in trained} <= names["trainer"].callback_metrics.keys()
    assert 0 < names["stopping"].stopped_epoch < 49

    names = {"BASE": str(tiny_base), "CHECKPOINT": "last.ckpt"}
    run("docs/answering.md", names, 2)
    assert len(names["answers"]) == 2 and sum(names["found"].probabilities.values()) == pytest.approx(1)
    assert names["out"].logits.shape[:2] == names["batch"]["input_ids"].shape
    assert names["ids"].shape[1] == names["batch"]["input_ids"].shape[1] + 5
    assert not hasattr(names["model"], "soft_prompts")

    names |= own
    run("docs/resuming.md", names, 2)
    more = names["callback"].prompts
    assert more.tasks == (*trained.tasks, "intent") and not torch.equal(more["topic"], trained["topic"])
    again = SoftPrompts.from_pretrained("extracted")
    assert all(torch.equal(again[task], trained[task]) for task in trained) and again.tasks == trained.tasks


@pytest.mark.parametrize(("page", "number"), CONFIGS)
def test_the_configs_of_the_pages_are_read(page: str, number: int, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "page.yaml").write_text(blocks(page, "yaml")[number])
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--config=examples/mixed_tasks.yaml", f"--config={tmp_path / 'page.yaml'}", "--print_config"])
    assert not end.value.code and "class_path: lightning_softprompt" in capsys.readouterr().out


def test_a_config_with_another_key_is_not_read(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "page.yaml").write_text("trainer: {maximal_epochs: 3}\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--config=examples/mixed_tasks.yaml", f"--config={tmp_path / 'page.yaml'}", "--print_config"])
    assert end.value.code == 2 and "maximal_epochs" in capsys.readouterr().err
