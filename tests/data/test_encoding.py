"""Rows as token ids: what gives way where there is no room, and chats."""

from __future__ import annotations

import pytest

from lightning_softprompt import SoftPromptError, TaskDataModule, TaskTemplate
from lightning_softprompt.data.encoding import encode
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from tests.data.rows import ids, module, write

CHAT = "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}so{% endif %}"


def test_truncation_takes_from_the_column_and_never_from_the_target(tokenizer, tmp_path) -> None:
    rows = [{"task": "kind", "text": "a b c d e a b c d e", "kind": "film"}]
    data = module(tokenizer, test=write(tmp_path / "rows.jsonl", rows), max_length=7)
    data.setup("test")
    (example,) = data.examples["test"]
    assert example.text_ids == ids(tokenizer, "so a b c d =")
    assert example.target_ids == ids(tokenizer, "film")
    cramped = module(tokenizer, test=str(tmp_path / "rows.jsonl"), max_length=2)
    with pytest.raises(SoftPromptError, match="line 1: max_length=2 has no room for the template and a target of 1"):
        cramped.setup("test")


def test_a_chat_is_what_the_tokenizer_makes_of_it(tokenizer, tmp_path) -> None:
    tokenizer.chat_template = CHAT
    tasks = {
        "said": TaskTemplate("{text} =", "{tone}", labels=["good", "bad"], chat=True),
        "free": TaskTemplate("{text}", "{answer}", chat=True, system="d e"),
    }
    rows = [{"task": "said", "text": "a b", "tone": "good"}, {"task": "free", "text": "c", "answer": "a b"}]
    data = TaskDataModule(tokenizer, tasks, train=write(tmp_path / "rows.jsonl", rows), max_length=40)
    data.setup("fit")
    said, free = data.examples["train"]
    turns = [{"role": "user", "content": "a b ="}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert said.text_ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert said.target_ids == ids(tokenizer, "good")
    expected = "<system> d e <user> c so"
    assert free.text_ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert free.target_ids == [*ids(tokenizer, "a b"), tokenizer.eos_token_id]
    long = [{"task": "said", "text": "a b c d e a b c d e", "tone": "bad"}]
    room = len(said.text_ids) + 3
    data = TaskDataModule(tokenizer, tasks, test=write(tmp_path / "long.jsonl", long), max_length=room)
    data.setup("test")
    (short,) = data.examples["test"]
    assert len(short.text_ids) <= room - 1 and short.text_ids[-2:] == ids(tokenizer, "= so")


def test_a_chat_needs_a_template(tokenizer, tmp_path) -> None:
    tasks = {"said": TaskTemplate("{text}", "{tone}", chat=True)}
    rows = [{"task": "said", "text": "a", "tone": "good"}]
    with pytest.raises(SoftPromptError, match="the tokenizer has no chat template"):
        TaskDataModule(tokenizer, tasks, train=write(tmp_path / "rows.jsonl", rows)).setup("fit")
    with pytest.raises(SoftPromptError, match="'said' has words of the system and is no chat"):
        TaskDataModule(tokenizer, {"said": TaskTemplate(system="so")})


def test_a_text_of_names_of_tokens_is_cut_and_not_left_out(tokenizer) -> None:
    row = {"text": "a b " * 3 + "<eos>" * 30, "q": "c", "answer": "d"}
    for template in ("so {q} = {text}", "{text}"):
        encoding = TaskEncoding.of(tokenizer, "t", TaskTemplate(template, "{answer}"))
        whole = encoding.text_ids(row, "row")
        text, target = encode(encoding, row, "row", 40)
        assert 35 <= len(text) + len(target) <= 40 < len(whole)
        assert text[: 40 - 10] == whole[: 40 - 10]
