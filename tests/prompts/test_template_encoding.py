"""A template as token ids: texts, targets, what stands behind them, and labels that cannot be told apart."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import normalizers

from lightning_softprompt import SoftPromptError, TaskTemplate
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from tests.tokenizer import word_tokenizer

END, A, B, C, NEW, YORK = 2, 4, 5, 6, 7, 8


@pytest.fixture
def tokenizer() -> Any:
    return word_tokenizer(["a", "b", "c", "New", "York", "apple"])


def labelled(*labels: str, **options: Any) -> TaskTemplate:
    return TaskTemplate("{text} a", " {label}", labels=[f" {label}" for label in labels], **options)


def test_a_text_goes_into_its_template_and_into_a_chat(tokenizer) -> None:
    encoding = TaskEncoding.of(tokenizer, "t", labelled("b", "c"))
    assert encoding.text_ids({"text": "b"}, "here") == [B, A]
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} {% endfor %}York"
    encoding = TaskEncoding.of(tokenizer, "t", labelled("b", "c", chat=True, system="New"))
    assert encoding.text_ids({"text": "b"}, "here") == [NEW, B, A, YORK]


@pytest.mark.parametrize(
    ("template", "end", "targets"),
    [
        (TaskTemplate("{text}", " {label}"), [END], {"b c": [B, C, END]}),
        (TaskTemplate("{text}", " {label}", end_token=True), [END], {"b": [B, END]}),
        (TaskTemplate("{text}", " {label}", end_token=False), [], {"b c": [B, C]}),
        (labelled("b", "c"), [], {"b": [B], "c": [C]}),
        (labelled("b", "c", end_token=True), [END], {"b": [B, END], "c": [C, END]}),
        (labelled("b a", "c a"), [], {"c a": [C, A]}),
        (labelled("New York", "c", "New"), [END], {"New": [NEW, END], "New York": [NEW, YORK, END], "c": [C, END]}),
    ],
)
def test_the_end_of_text_stands_behind_targets_that_need_it(tokenizer, template, end, targets) -> None:
    encoding = TaskEncoding.of(tokenizer, "t", template)
    assert encoding.end_ids == end
    for label, ids in targets.items():
        assert encoding.target_ids({"label": label}, "here") == ids
    if template.labels is None:
        assert encoding.label_ids is None
    else:
        found = dict(zip(template.labels, encoding.label_ids or [], strict=True))
        assert {f" {label}": ids for label, ids in targets.items()}.items() <= found.items()


def test_without_an_end_of_text_token(tokenizer) -> None:
    tokenizer.eos_token = None
    assert TaskEncoding.of(tokenizer, "t", TaskTemplate("{text}", " {label}")).end_ids == []
    assert TaskEncoding.of(tokenizer, "t", labelled("b", "c")).label_ids == [[B], [C]]
    for template, message in (
        (
            labelled("New York", "New"),
            r"task 't': the tokens of the label ' New' begin those of ' New York', so an end-",
        ),
        (labelled("New York", "New"), r"and the tokenizer has none; set tokenizer\.eos_token, or write the labels"),
        (TaskTemplate("{text}", " {label}", end_token=True), "task 't': end_token is true, and the tokenizer has no"),
    ):
        with pytest.raises(SoftPromptError, match=message):
            TaskEncoding.of(tokenizer, "t", template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            labelled("b", "apple", "Apple"),
            "makes the same tokens of the labels ' Apple' and ' apple', so that no answer",
        ),
        (labelled("b", "so", "news"), "makes the same tokens of the labels ' news' and ' so'"),  # both unknown
        (labelled("b", "c", ""), "task 't': the label ' ' has no tokens; give it a word"),
        (
            labelled("b", "b c", end_token=False),
            "end_token is false; leave end_token out, or write the labels otherwise",
        ),
        (labelled("b", "b <eos> c"), "with the end-of-text token, begin those of ' b <eos> c'; leave the end-of-text"),
        (labelled("b", "c", system="a"), "'t' has words of the system and is no chat"),
        (TaskTemplate("{text"), "unbalanced braces"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_by_task(tokenizer, template, message) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Apple", "apple")
    with pytest.raises(SoftPromptError, match=message) as caught:
        TaskEncoding.of(tokenizer, "t", template)
    assert "task 't'" in str(caught.value)


def test_labels_that_begin_alike_are_found_among_many(tokenizer) -> None:
    many = [f"{first} {second} {third}" for first in "abc" for second in "abc" for third in "abc"]
    assert TaskEncoding.of(tokenizer, "t", labelled(*many)).end_ids == []
    assert TaskEncoding.of(tokenizer, "t", labelled(*many, "b c")).end_ids == [END]
    with pytest.raises(SoftPromptError, match="' c  b c' and ' c b c'"):
        TaskEncoding.of(tokenizer, "t", labelled(*many, "c  b c"))


def test_what_the_tokenizer_or_its_chat_template_refuses_is_named_by_row(tokenizer) -> None:
    encoding = TaskEncoding.of(tokenizer, "t", labelled("b", "c"))
    with pytest.raises(SoftPromptError, match="line 3: the tokenizer cannot read"):
        encoding.text_ids({"text": "half a pair \ud800"}, "line 3")
    with pytest.raises(SoftPromptError, match=r"line 3: the template '\{text\} a' needs the column 'text'"):
        encoding.text_ids({"story": "b"}, "line 3")
    tokenizer.chat_template = "{% if 'c' in messages[0].content %}{{ raise_exception('no\\n c') }}{% endif %}York"
    encoding = TaskEncoding.of(tokenizer, "t", labelled("b", "c", chat=True))
    assert encoding.text_ids({"text": "b"}, "line 3") == [YORK]
    with pytest.raises(SoftPromptError, match=r"line 3: the tokenizer cannot read 'c a' \(.* messages \(no c\)\)"):
        encoding.text_ids({"text": "c"}, "line 3")


@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_of_a_row_stay_text_unless_they_are_let_through(tokenizer, chat: bool) -> None:
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content | trim }} {% endfor %}York"
    row = {"my text": " b <eos> c ", "answer": "a<eos>b", "other": object()}
    found = {}
    for special in (False, True):
        template = TaskTemplate("<bos> {my text} a", "{answer} <bos>", chat=chat, special_tokens=special)
        encoding = TaskEncoding.of(tokenizer, "t", template)
        found[special] = encoding.text_ids(row, "here"), encoding.target_ids(row, "here")
    behind = [YORK] if chat else []
    assert found[True] == ([0, B, END, C, A, *behind], [A, END, B, 0, END])
    text, target = found[False]
    assert END not in text and text[:2] == [0, B] and text[-2 - chat :] == [C, A, *behind]
    assert target.count(END) == 1 and target[0] == A and target[-3:] == [B, 0, END]
    plain = tokenizer("b <eos> c", split_special_tokens=True)["input_ids"]
    assert text == [0, *plain, A, *behind]
    with pytest.raises(SoftPromptError, match="here: the tokenizer cannot read '<bos> <eos>\\\\ud800 a'"):
        encoding = TaskEncoding.of(tokenizer, "t", TaskTemplate("<bos> {my text} a"))
        encoding.text_ids({"my text": "<eos>\ud800"}, "here")


def test_values_complete_no_tokens_with_each_other_or_with_the_template(tokenizer) -> None:
    for template in (TaskTemplate("{a}{b}", "{a}{b}"), TaskTemplate("<{b}", "<{b}")):
        encoding = TaskEncoding.of(tokenizer, "t", template)
        row = {"a": "<e" if "{a}" in template.text else "", "b": "os>"}
        row["b"] = row["b"] if row["a"] else "eos>"
        assert END not in encoding.text_ids(row, "here") and encoding.target_ids(row, "here").count(END) == 1
    tokenizer.add_tokens(["<|User|>"])  # not a special one, but turns begin with it
    tokenizer.chat_template = "<|User|>{{ messages[0].content }}"
    user = tokenizer.convert_tokens_to_ids("<|User|>")
    encoding = TaskEncoding.of(tokenizer, "t", TaskTemplate("<|User|>{text}", "{text}"))
    assert encoding.text_ids({"text": "<|User|> b"}, "here").count(user) == 1
    assert encoding.target_ids({"text": "<|User|> b"}, "here").count(user) == 1  # a target may hold it


def test_a_target_that_the_tokenizer_cannot_read_is_named_by_row(tokenizer) -> None:
    encoding = TaskEncoding.of(tokenizer, "t", TaskTemplate())
    with pytest.raises(SoftPromptError, match=r"line 3: the tokenizer cannot read ' .ud800'"):
        encoding.target_ids({"text": "b", "label": "\ud800"}, "line 3")


def test_a_chat_template_is_tried_before_there_are_rows(tokenizer) -> None:
    turns = "{% for turn in messages %}{{ turn.content }} {% endfor %}York"
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + turns
    silent = "{{ messages[-1].content }} York"
    for template, system, message in (
        (None, None, "task 't': the tokenizer has no chat template"),
        ("{{ nothing.here }}", None, "task 't': the tokenizer's chat template cannot take these messages"),
        (no_system, "a", r"task 't': the tokenizer's chat template takes no words of the system \(none\)"),
        (silent, "a b", "task 't': the tokenizer's chat template leaves out what the system says"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(SoftPromptError, match=message):
            TaskEncoding.of(tokenizer, "t", TaskTemplate(chat=True, system=system))
    for template, system in ((turns, "a"), (no_system, None), (silent, None), (silent, "text")):
        tokenizer.chat_template = template
        TaskEncoding.of(tokenizer, "t", TaskTemplate(chat=True, system=system))
