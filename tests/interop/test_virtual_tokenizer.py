"""A tokenizer with virtual tokens: a text behind a prefix is what it is alone, and the start token stands between."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizerLegacy

from lightning_softprompt import SoftPromptError, SoftPrompts, TaskTemplate
from lightning_softprompt.base.tokens import encode_text
from lightning_softprompt.interop.virtual_rows import VirtualRows
from lightning_softprompt.interop.virtual_tokenizer import (
    alias_of,
    is_exact,
    start_ids,
    with_virtual_tokens,
)
from lightning_softprompt.interop.virtual_tokens import _save_tokenizer
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from tests.interop.bases import ODD, WORDS, real_kinds_of_tokenizers, with_start_token
from tests.tokenizer import word_tokenizer

KINDS = ["smollm2", "llama 3", "llama 2", "llama 1", "gemma", "qwen 2"]
TEXTS = ["a film", " leading", "  two", "\nline", "Größe 情感", "x = f(y)", "|> b", "film<s>a", "<|task:gone|>a"]


@pytest.fixture(scope="module")
def kinds():
    return real_kinds_of_tokenizers()


def rows_behind(tokenizer, gap: int = 5) -> VirtualRows:
    first = len(tokenizer) + gap
    names = ["sentiment", ODD, "a", "a|>b", "A"]
    ids = {name: [first + 2 * number, first + 2 * number + 1] for number, name in enumerate(names)}
    return VirtualRows(first, first, first + 64, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_behind_an_alias_is_what_it_is_alone(kind: str, kinds, tmp_path) -> None:
    base, config = kinds[kind]
    before = base.backend_tokenizer.to_str()
    rows = rows_behind(base)
    virtual = with_virtual_tokens(base, rows)
    assert is_exact(virtual, base, rows) and base.backend_tokenizer.to_str() == before
    virtual.tokenizer.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    same = kind != "qwen 2"  # of which transformers makes the tokenizer anew, without its aliases
    assert is_exact(dataclasses.replace(virtual, tokenizer=loaded), base, rows) == same
    for tokenizer in (virtual.tokenizer, loaded) if same else (virtual.tokenizer,):
        for task, ids in rows.ids.items():
            for text in TEXTS:
                assert tokenizer(virtual.aliases[task] + text)["input_ids"] == [*ids, *encode_text(base, text)], text
        for text in TEXTS:
            assert tokenizer(text)["input_ids"] == base(text, add_special_tokens=False)["input_ids"]
    whole = virtual.tokenizer(virtual.aliases["a"] + "a film")["input_ids"]
    assert virtual.tokenizer.decode(whole, skip_special_tokens=True).strip() == "a film"


@pytest.mark.parametrize("kind", [*KINDS[:2], "gemma", "qwen 2"])
def test_virtual_tokens_may_be_written_out(kind: str, kinds, tmp_path) -> None:
    base, config = kinds[kind]
    rows = rows_behind(base, gap=0)
    for has_aliases in (True, False):
        virtual = with_virtual_tokens(base, rows, has_aliases)
        virtual.tokenizer.save_pretrained(tmp_path)
        config.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        written = dataclasses.replace(virtual, tokenizer=loaded, aliases={})
        assert is_exact(written, base, rows) or (kind == "qwen 2" and has_aliases)
    assert written.prefix(rows, "a").endswith("|>" + virtual.start_text)


def test_start_tokens_are_found(kinds) -> None:
    starts = {kind: len(start_ids(base)) for kind, (base, _) in kinds.items()}
    assert starts == {"smollm2": 0, "llama 3": 1, "llama 2": 1, "llama 1": 1, "gemma": 1, "qwen 2": 0}
    assert start_ids(with_start_token()) == [0] and start_ids(word_tokenizer(WORDS)) == []


def test_aliases_are_never_a_part_of_another() -> None:
    names = ["a", "a|>", "a|>b", "<|task:a|>", "%7C", "|", "A", ODD, "1", "11"]
    aliases = [alias_of(name) for name in names]
    assert not [(one, other) for one in aliases for other in aliases if one != other and one in other]


def test_ids_that_the_tokenizer_gives_otherwise_are_noticed() -> None:
    base = word_tokenizer(WORDS)
    rows = rows_behind(base)
    virtual = with_virtual_tokens(base, rows)
    assert is_exact(virtual, base, rows)
    moved = {task: [id - 5 for id in ids] for task, ids in rows.ids.items()}
    assert not is_exact(virtual, base, dataclasses.replace(rows, ids=moved))
    state = json.loads(virtual.tokenizer.backend_tokenizer.to_str())
    assert [each["id"] for each in state["added_tokens"]] == sorted(each["id"] for each in state["added_tokens"])


def test_what_cannot_be_extended_is_refused(tmp_path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nfilm\n")
    base = word_tokenizer(WORDS)
    rows = rows_behind(base)
    with pytest.raises(SoftPromptError, match="BertTokenizerLegacy is no tokenizer of the `tokenizers` library"):
        with_virtual_tokens(BertTokenizerLegacy(str(tmp_path / "vocab.txt")), rows)
    virtual = with_virtual_tokens(base, rows)
    with pytest.raises(SoftPromptError, match=r"the base knows <\|soft0_0\|> already"):
        with_virtual_tokens(virtual.tokenizer, rows_behind(virtual.tokenizer))


CHATS = ["{{ bos_token }}[INST] {{ messages[-1].content }}", "<|user|>\n{{ messages[-1].content }}</s>", "\n\n so"]


@pytest.mark.parametrize("template", CHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_behind_virtual_tokens_is_what_it_is_alone(kind: str, template: str, kinds, tmp_path) -> None:
    base, config = kinds[kind]
    rows = rows_behind(base)
    trained = {"sentiment": TaskTemplate("a {text}", chat=True), ODD: TaskTemplate("{text} of")}
    prompts = SoftPrompts(4)
    for task in rows.ids:
        prompts.add(task, torch.zeros(2, 4))
    prompts.templates.update(trained)
    config.save_pretrained(tmp_path)
    chat = [{"role": "user", "content": "film"}]
    base.chat_template = template
    try:
        virtual = _save_tokenizer(base, rows, prompts, tmp_path)
        for task, template in {**trained, "a": TaskTemplate("{text}", chat=True)}.items():
            asked = virtual.tokenizer.apply_chat_template(
                chat, task=task, add_generation_prompt=True, return_dict=False
            )
            expected = TaskEncoding.of(base, task, template).text_ids({"text": "film"}, "the row")
            assert asked == [*rows.ids[task], *expected]
        alone = virtual.tokenizer.apply_chat_template(chat, return_dict=False)
        assert alone == base.apply_chat_template(chat, return_dict=False)
    finally:
        base.chat_template = None


def test_named_tokens_and_sizes_stay() -> None:
    base = word_tokenizer(WORDS)
    base.add_special_tokens({"extra_special_tokens": ["<image>"]})
    base.model_max_length, base.padding_side = 77, "left"
    found = with_virtual_tokens(base, rows_behind(base)).tokenizer
    assert found.special_tokens_map == base.special_tokens_map
    assert (found.model_max_length, found.padding_side) == (77, "left")
    assert found("<image>a")["input_ids"] == base("<image>a")["input_ids"]
