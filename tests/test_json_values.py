"""Numbers that stand as they are written, in memory, in copies and in what is written again."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest

from lightning_softprompt import SoftPromptError
from lightning_softprompt.json_values import Number, dumps, loads

NUMBERS = ["3.10", "1e5", "1E5", "0.1", "-0", "-0.0", "5", "1e400", "0.12345678901234567890", "9" * 30, "7" * 5000]


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:24])
def test_a_number_is_written_as_it_was_read(text: str) -> None:
    (number,) = loads(f"[{text}]")
    assert f"{number}" == str(number) == text and dumps({"n": [number]}) == f'{{"n": [{text}]}}'
    assert type(number) in (int, Number) or repr(number) == text
    for copied in (pickle.loads(pickle.dumps(number)), copy.deepcopy(number)):
        assert f"{copied}" == text and type(copied) is type(number)


def test_a_number_counts_as_one() -> None:
    number = loads("3.10")
    assert number == 3.1 and number + 1 == 4.1 and f"{number:.1f}" == "3.1" and {3.1: "a"}[number] == "a"
    assert loads("0.5").__class__ is float and loads("5").__class__ is int


def test_what_is_no_number_is_null() -> None:
    found = loads('{"a": NaN, "b": [-Infinity, Infinity]}')
    assert math.isnan(found["a"]) and f"{found['a']}" == "NaN" and found["b"] == [-math.inf, math.inf]
    assert dumps(found) == '{"a": null, "b": [null, null]}' == dumps({"a": math.nan, "b": (-math.inf, math.inf)})


def test_values_are_written_as_json_writes_them() -> None:
    value = {"a": [1, 2.5, None, True, '\u00e9"\n'], "b": {"c": {}}, "d": []}
    assert dumps(value) == json.dumps(value, ensure_ascii=False)
    assert dumps(value, ensure_ascii=True) == json.dumps(value)
    assert dumps({"when": pytest}) == json.dumps({"when": str(pytest)})


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(SoftPromptError, match="the key 'b' stands in it twice"):
        loads('{"a": {"b": 1, "c": 2, "b": 3}}')
    with pytest.raises(ValueError):
        loads('{"a": ')


@pytest.mark.parametrize("opened", ["[", '{"a": '])
def test_what_is_read_is_not_too_deep_to_be_written(opened: str) -> None:
    closed = {"[": "]", "{": "}"}[opened[0]]
    text = opened * 100 + "1" + closed * 100
    assert dumps(loads(text)) == text
    for depth in (101, 500, 100_000):
        with pytest.raises(RecursionError):
            loads(opened * depth + "1" + closed * depth)
    flat = "[" + ", ".join(["[1]"] * 300) + "]"
    assert dumps(loads(flat)) == flat
