"""What `PromptDistillation` refuses, before a step is taken."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import (
    PromptDistillation,
    SoftPromptCallback,
    SoftPromptError,
    SoftPrompts,
    Source,
    TaskDataModule,
)
from tests import tiny
from tests.modules import trainer
from tests.training import distilled
from tests.training.distilled import TEACHERS, TEMPLATES, data_of, module_of, starts


@pytest.mark.parametrize(
    ("teachers", "tasks", "options", "message"),
    [
        ({"tone": TEACHERS["tone"]}, None, {}, "the train rows of 'free' have no teacher"),
        ({**TEACHERS, "tones": "a b c d e f"}, None, {}, "no prompt of that name; do you mean 'tone'"),
        ({**TEACHERS, "tone": "good film"}, None, {}, "puts 2 tokens in front of a row, and its student 3: noth"),
        ({**TEACHERS, "tone": "good " * 130}, None, {}, "130 tokens and max_new_tokens is 5, and the model has 12"),
        ({**TEACHERS, "tone": " "}, None, {}, "the teacher of 'tone' must be a text"),
        ({**TEACHERS, "tone": "good " * 121}, None, {}, "cannot answer the row .* 121 tokens of prompt, 8 of text"),
        (TEACHERS, None, {"top_k": tiny.VOCABULARY}, "top_k is 61, and the model has 61 tokens"),
        (TEACHERS, {"tone": 3, "free": 5, "kind": 2}, {}, "no template in the data"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_told_before_the_first_step(
    teachers, tasks, options, message, tiny_base, tmp_path
) -> None:
    if tasks:
        teachers = {**teachers, "kind": "so it is the news"}
    run = trainer(tmp_path, callback := SoftPromptCallback(tasks or starts()), limit_val_batches=0)
    data = data_of(tiny_base, distilled.write(tmp_path / "rows.jsonl"))
    with pytest.raises(SoftPromptError, match=message):
        run.fit(module_of(tiny_base, teachers=teachers, **options), data)
    assert run.global_step == 0
    callback.prompts.save_pretrained(tmp_path / "prompts")
    assert "tone (teacher)" not in SoftPrompts.from_pretrained(tmp_path / "prompts")


def test_arguments_are_checked() -> None:
    for teachers in ({}, None, "a text"):
        with pytest.raises(SoftPromptError, match="teachers must map"):
            PromptDistillation("base", teachers)
    with pytest.raises(SoftPromptError, match="top_k must be at least 1"):
        PromptDistillation("base", {"a": "text"}, top_k=0)


def test_a_streamed_row_without_a_teacher_is_named(tiny_base, tmp_path) -> None:
    path = distilled.write(tmp_path / "rows.jsonl")
    data = TaskDataModule(
        str(tiny_base), TEMPLATES, train=Source(path, streaming=True), batch_size=6, needs_targets=False
    )
    module = module_of(tiny_base, teachers={"tone": TEACHERS["tone"]})
    with pytest.raises(SoftPromptError, match="rows of 'free' have no teacher"):
        trainer(tmp_path, SoftPromptCallback(starts()), limit_val_batches=0).fit(module, data)


def test_a_run_without_prompts_or_rows_of_the_datamodule_is_refused(tiny_base, tmp_path) -> None:
    data = data_of(tiny_base, distilled.write(tmp_path / "rows.jsonl"))
    with pytest.raises(SoftPromptError, match="PromptDistillation trains soft prompts"):
        trainer(tmp_path).fit(module_of(tiny_base), data)
    with pytest.raises(SoftPromptError, match="PromptDistillation reads the batches of a TaskDataModule"):
        trainer(tmp_path, SoftPromptCallback(starts())).fit(module_of(tiny_base), torch.utils.data.DataLoader([1]))


def test_what_ranks_would_do_apart_is_refused_where_they_share_the_base(tiny_base, tmp_path, monkeypatch) -> None:
    path = distilled.write(tmp_path / "rows.jsonl")
    for top_k, message in ((None, "teachers write no answers where the base is sharded"), (2, "top_k cannot be had")):
        run = trainer(tmp_path, SoftPromptCallback(starts()), limit_val_batches=0)
        module = module_of(tiny_base, top_k=top_k)
        monkeypatch.setattr("lightning_softprompt.training.distillation.ModelParallelStrategy", type(run.strategy))
        with pytest.raises(SoftPromptError, match=message):
            run.fit(module, data_of(tiny_base, path))
