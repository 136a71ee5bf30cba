"""The tasks of the prompts and of the data, compared before the first step; what the prompts take over of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_softprompt import (
    CausalLMModule,
    SoftPromptCallback,
    SoftPromptError,
    SoftPrompts,
    Source,
    TaskDataModule,
    TaskTemplate,
    Tokens,
)
from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.training.agreement import check_tasks, take_templates
from tests import tiny
from tests.modules import trainer

LABELS = ["good", "bad"]


class Steps(Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, *_: object) -> None:
        self.count += 1


def rows(folder: Path, name: str, *tasks: str) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"task": task, "text": "it is", "label": "good"}) + "\n" for task in tasks))
    return str(path)


def data(base: Path, tasks: list[str], **splits: object) -> TaskDataModule:
    templates = {task: TaskTemplate("{text} =>", "{label}", labels=list(LABELS)) for task in tasks}
    evaluated = {"validation": splits["train"]} if isinstance(splits.get("train"), str) else {}
    return TaskDataModule(str(base), templates, batch_size=2, **{**evaluated, **splits})


def prompts_of(*tasks: str) -> SoftPrompts:
    return SoftPrompts.for_model(tiny.tiny_model(), {task: Tokens([5, 6]) for task in tasks})


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_without_a_prompt_end_a_fit_before_its_first_step(split: str, tiny_base, tmp_path) -> None:
    good, wrong = rows(tmp_path, "good", *["source"] * 6), rows(tmp_path, "wrong", *["source"] * 6, "sorce")
    splits = {"train": good, "validation": good, split: wrong}
    steps, callback = Steps(), SoftPromptCallback({"source": 3, "tone": 2})
    module = CausalLMModule(str(tiny_base))
    with pytest.raises(
        SoftPromptError, match=rf"'sorce' \({split} rows\), do you mean 'source'\?.*prompts: 'source', "
    ):
        trainer(tmp_path, callback, steps).fit(module, data(tiny_base, ["source", "sorce"], **splits))
    assert steps.count == 0 and attachment_of(module.model) is None and callback.prompts is None


@pytest.mark.parametrize(("stage", "split"), [("validate", "validation"), ("test", "test")])
def test_rows_without_a_prompt_are_not_evaluated(stage: str, split: str, tiny_base, tmp_path) -> None:
    of = data(tiny_base, ["tone", "kind"], **{split: rows(tmp_path, "rows", "tone", "kind")})
    with pytest.raises(SoftPromptError, match=rf"'kind' \({split} rows\); prompts: 'tone'"):
        getattr(trainer(tmp_path, SoftPromptCallback({"tone": 3})), stage)(CausalLMModule(str(tiny_base)), of)


def test_a_template_without_rows_needs_no_prompt(tiny_base, tmp_path, caplog) -> None:
    of = data(tiny_base, ["tone", "kind"], train=rows(tmp_path, "rows", "tone"))
    of.setup("fit")
    check_tasks(prompts_of("tone"), of, "fit")
    assert not caplog.records


def test_prompts_without_rows_are_one_warning_by_name(tiny_base, tmp_path, caplog) -> None:
    only = rows(tmp_path, "rows", "tone", "tone")
    of = data(tiny_base, ["tone", "lonely"], train=only, validation=rows(tmp_path, "other", "lonely"))
    callback = SoftPromptCallback({"tone": 2, "lonely": 3, "alone": 1})
    trainer(tmp_path, callback).fit(CausalLMModule(str(tiny_base)), of)
    (warned,) = [record.getMessage() for record in caplog.records if record.name == "lightning_softprompt"]
    assert "no training row belongs to 'lonely', 'alone', whose" in warned and "training rows: 'tone'" in warned
    caplog.clear()
    callback.prompts.freeze("lonely"), callback.prompts.freeze("alone")
    check_tasks(callback.prompts, of, "fit")
    check_tasks(prompts_of("tone", "lonely"), of, "test")
    assert not caplog.records


def test_of_a_stream_only_what_its_source_says_is_known(tiny_base, tmp_path, caplog) -> None:
    path = rows(tmp_path, "rows", "tone", "kind")
    named = data(tiny_base, ["tone", "kind"], train=Source(path, task="kind", streaming=True))
    by_column = data(tiny_base, ["tone", "kind"], train=Source(path, streaming=True))
    named.setup("fit"), by_column.setup("fit")
    with pytest.raises(SoftPromptError, match=r"'kind' \(train rows\)"):
        check_tasks(prompts_of("tone"), named, "fit")
    check_tasks(prompts_of("tone"), by_column, "fit")
    check_tasks(prompts_of("tone", "kind"), by_column, "fit")
    assert not caplog.records
    check_tasks(prompts_of("tone", "kind", "lonely"), by_column, "fit")
    check_tasks(prompts_of("tone", "kind"), named, "fit")
    said = [record.getMessage() for record in caplog.records]
    assert "belongs to 'lonely'," in said[0] and "belongs to 'tone'," in said[1]


def test_templates_of_the_data_become_those_of_the_prompts(tiny_base, tmp_path, caplog) -> None:
    of = data(tiny_base, ["tone", "kind", "other"], train=rows(tmp_path, "rows", "tone", "kind"))
    own = TaskTemplate("mine: {text}", "{label}")
    prompts = prompts_of("tone", "kind")
    prompts.templates["kind"] = own
    trainer(tmp_path, SoftPromptCallback(prompts)).fit(CausalLMModule(str(tiny_base)), of)
    assert prompts.templates == {"tone": of.tasks["tone"], "kind": own} and prompts.templates["kind"] is own
    assert prompts.templates["tone"] is not of.tasks["tone"]
    assert "the prompt of 'kind' has another template" in caplog.text and "'tone' has another" not in caplog.text
    caplog.clear()
    del prompts.templates["kind"]
    take_templates(prompts, of)
    take_templates(prompts, of)
    assert prompts.templates["kind"] == of.tasks["kind"] and not caplog.records


def test_a_fit_says_once_what_is_attached(tiny_base, tmp_path, caplog) -> None:
    of = data(tiny_base, ["tone"], train=rows(tmp_path, "rows", "tone"))
    with caplog.at_level("INFO"):
        trainer(tmp_path, SoftPromptCallback({"tone": 3})).fit(CausalLMModule(str(tiny_base)), of)
    (said,) = [record.getMessage() for record in caplog.records if "Soft prompts of" in record.getMessage()]
    assert "LlamaForCausalLM: 'tone' (3 tokens, a template). Each task's prompt is computed once" in said
