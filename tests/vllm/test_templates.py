"""Tests of templates, against those of the library that trained with them."""

from __future__ import annotations

from typing import Any

import pytest
from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.templates import Template
from tokenizers import processors

from lightning_softprompt import TaskTemplate
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from tests.tokenizer import word_tokenizer

CHAT = "{% for turn in messages %}{{ turn.role }} {{ turn.content }} {% endfor %}{{ '=>' if add_generation_prompt }}"


@pytest.fixture
def tokenizer() -> Any:
    made = word_tokenizer(["good", "film", "=>", "system", "user", "so", "it", "is"])
    made.chat_template = CHAT
    return made


@pytest.mark.parametrize(
    ("text", "chat", "system"),
    [("{text} =>", False, None), ("{a} it {a}", False, None), ("{q}", True, None), ("it is {q}", True, "so")],
)
def test_ids_are_those_of_training(tokenizer: Any, text: str, chat: bool, system: str | None) -> None:
    encoding = TaskEncoding.of(tokenizer, "tone", TaskTemplate(text, "{label}", None, chat, system))
    row = dict.fromkeys(("text", "a", "q"), "good film {so}")
    expected = encoding.text_ids(row, "row")
    assert Template(text, chat, system).token_ids(tokenizer, "good film {so}") == expected and len(expected) > 3


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_special_tokens_of_a_client_are_read_as_in_training(tokenizer: Any, chat: bool, special: bool) -> None:
    text = "good <eos> film<bos><unk> it"
    encoding = TaskEncoding.of(tokenizer, "tone", TaskTemplate("<bos> {my text} =>", chat=chat, special_tokens=special))
    expected = encoding.text_ids({"my text": text}, "row")
    assert Template("<bos> {my text} =>", chat, None, special).token_ids(tokenizer, text) == expected
    assert expected.count(0) == (2 if special else 1) and expected.count(2) == special  # <bos> of the template, <eos>


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_a_client_completes_no_token(tokenizer: Any, chat: bool, ends: bool) -> None:
    tokenizer.add_tokens(["<|user|>"])  # not a special one
    tokenizer.chat_template = "{% for turn in messages %}<|user|> <{{ turn.content }}os> {% endfor %}=>"
    if ends:
        tokenizer.eos_token = None
        around = {"single": "<bos> $A <pad>", "special_tokens": [("<bos>", 0), ("<pad>", 1)]}
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**around)
    for template, text in (("<{text}", "eos> it"), ("{text}", "it <|user|>"), ("it {text}", " e")):
        encoding = TaskEncoding.of(tokenizer, "tone", TaskTemplate(template, chat=chat, end_token=False))
        found = Template(template, chat).token_ids(tokenizer, text)
        assert found == encoding.text_ids({"text": text}, "row")
        assert 2 not in found and found.count(tokenizer.convert_tokens_to_ids("<|user|>")) == chat
        assert ends is False or chat or found[-1] == 1


def test_no_end_of_text_token_stands_behind_the_text(tokenizer: Any) -> None:
    class Ending:
        eos_token_id = 2

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [*tokenizer(text)["input_ids"], 2]}

    assert Template("{text}").token_ids(Ending(), "good") == tokenizer("good")["input_ids"]
    assert Template("{text}").token_ids(Ending(), "") == [2]


@pytest.mark.parametrize("text", ["=>", "{one} {two}"])
def test_a_text_fills_one_column(text: str) -> None:
    with pytest.raises(SoftPromptError, match="fills a template of one column"):
        Template(text).render("good")


@pytest.mark.parametrize("text", ["{text", "{text!r}", "{text:>9}", "{text.__class__}", "{text[0]}", "{}"])
def test_templates_hold_plain_columns_alone(text: str) -> None:
    with pytest.raises(SoftPromptError, match="save it anew"):
        Template(text)


def test_a_chat_needs_a_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(SoftPromptError, match="no chat template"):
        Template("{text}", chat=True).token_ids(tokenizer, "good")
