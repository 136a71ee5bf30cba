"""The README's code runs, in the order it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_softprompt import SoftPrompts
from tests.integration.modules import Plain, Rows
from tests.tokenizer import word_tokenizer

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_readme(tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 3
    rows = Rows(6, names=False)
    rows.rows = [(ids % 20, ["sentiment", "source", "topic"][task]) for ids, task in rows.rows]
    rows.key = "tasks"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert tokenizer.pad_token_id == 1
    names = {
        "BASE": str(tiny_base),
        "train_dataloaders": torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=rows.collate),
    }
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].logits.shape[:2] == names["batch"]["input_ids"].shape
    assert names["ids"].shape[1] == names["batch"]["input_ids"].shape[1] + 5
    assert not hasattr(names["model"], "soft_prompts")
    assert SoftPrompts.from_pretrained("prompts").lengths == (8, 12, 20) or names["prompts"].lengths[1:] == (12, 20)


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_on_health(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "health.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2

    class Words(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = word_tokenizer(["Is", "it", "positive", "or", "negative", "?"])

    def rows(tasks: list[str]) -> torch.utils.data.DataLoader:
        made = Rows(208, names=False, key="tasks")
        made.rows = [(ids, tasks[index % len(tasks)]) for index, (ids, _) in enumerate(made.rows)]
        return torch.utils.data.DataLoader(made, batch_size=4, collate_fn=made.collate)

    names = {
        "torch": torch,
        "module": Words(),
        "MyModule": Words,
        "train_dataloaders": rows(["sentiment", "topic"]),
        "rows_of": lambda task: rows([task]),
    }
    for block in blocks:
        exec(compile(block, "docs/health.md", "exec"), names)
    assert (tmp_path / "health.png").stat().st_size > 10_000
    assert set(names["rates"]) == {"sentiment", "topic"} and all(names["rates"].values())
    callback = names["SoftPromptCallback"](tasks={"sentiment": "Is it", "topic": 20})
    trainer = names["Trainer"](max_epochs=1, callbacks=[callback])
    trainer.fit(names["MyModuleWithRates"](), rows(["sentiment", "topic"]))
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == list(names["rates"].values())


def test_the_code_of_the_kernels_readme() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(compile(block, "kernels/README.md", "exec"), names)
    out, prompts = names["out"], names["prompts"]
    assert out.inputs_embeds.shape == (3, 7, 64) and prompts.grad.tolist() == [[1.0] * 64] * 5
    # The drawing.
    held = out.attention_mask + (out.labels != -100) + (out.inputs_embeds == 0).all(2) * -1
    assert held.tolist() == [[1, 1, 1, 2, 2, 2, 2], [-1, -1, -1, 1, 1, 2, 2], [-1, -1, -1, -1, 1, 2, 2]]


def test_the_readme_quotes_the_page_of_models() -> None:
    page, readme = (ROOT / "docs" / "models.md").read_text(), " ".join((ROOT / "README.md").read_text().split())
    types, built, forward, generation, refused = re.search(
        r"Of (\d+) types, (\d+) can .* exact on (\d+), gradients .* generation on (\d+); (\d+) are refused", page
    ).groups()
    assert f"all {types} types" in readme and f"Of {built} that can be built" in readme
    assert (
        f"forward passes are exact on {forward} and greedy generation on {generation}; {refused} are refused" in readme
    )


def test_the_readme_links_to_what_there_is() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "docs/health.md", "docs/prefix.md"):
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / document).read_text()):
            assert (ROOT / document).parent.joinpath(target).exists(), target


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_on_peft(tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "from_peft.md").read_text(), re.DOTALL)
    assert len(blocks) == 8
    ids = torch.randint(2, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    names = {
        "BASE": str(tiny_base),
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "tokenizer": AutoTokenizer.from_pretrained(tiny_base),
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    for block in blocks:
        exec(compile(block, "from_peft.md", "exec"), names)
    torch.testing.assert_close(names["logits"], names["peft_logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(names["mixed"][0], names["logits"][0], atol=1e-5, rtol=1e-5)
    found = names["imported"]["sentiment"]
    assert torch.equal(found, names["prompts"]["sentiment"]) and torch.equal(found, names["again"]["sentiment"])
    theirs = names["loaded"](**names["batch"]).logits[:, 20:]
    torch.testing.assert_close(theirs[1], names["mixed"][1], atol=1e-5, rtol=1e-5)
