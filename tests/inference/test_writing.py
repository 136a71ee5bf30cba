"""Free text: where it ends, and what of it is told while it is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach
from lightning_softprompt.inference.answers import Written
from lightning_softprompt.inference.requests import Request
from lightning_softprompt.inference.writing import Writer
from tests import tiny
from tests.conformance import models
from tests.inference.tasks import END, HARD, generator, words, written

TEXTS = [[30, 31, 32], [33], [34, 35]]
BATCH = [Request(index + 4, ids, task, 12, "") for index, (ids, task) in enumerate(zip(TEXTS, HARD, strict=False))]
NEW = 8


class Says(LogitsProcessor):
    """A model that says the same in every row."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = torch.full_like(scores, -1e9)
        said[:, self.tokens[min(self.step, len(self.tokens) - 1)]] = 0
        self.step += 1
        return said


def says(*tokens: int) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList([Says([*tokens])])}


def of_model(eos: Any) -> Any:
    model = generator().model
    model.generation_config.eos_token_id = eos
    return model


def write(model: Any, tokenizer: Any = None, **options: Any) -> list[Written]:
    return Writer(model, tokenizer or words(), options.pop("new", NEW), options).write(BATCH)


@pytest.mark.parametrize(
    ("eos", "options", "ends"),
    [
        (None, {}, [END]),
        (END, {}, [END]),
        (7, {}, [7, END]),
        ([7, 8], {}, [7, 8, END]),
        ([7, 8], {"eos_token_id": 9}, [9]),
        (7, {"eos_token_id": [9, 10]}, [9, 10]),
        (7, {"eos_token_id": torch.tensor([9])}, [9]),
        (7, {"eos_token_id": None}, []),
        (7, {"generation_config": GenerationConfig(eos_token_id=9)}, [9]),
        (7, {"generation_config": GenerationConfig(do_sample=False)}, [7]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_text_ends_at_every_end_token_and_shows_none(eos: Any, options: dict[str, Any], ends: list[int]) -> None:
    model = of_model(eos)
    for token in (END, 7, 8, 9, 10):
        (found, *_) = write(model, **options, **says(20, token, 30))
        if token in ends:
            assert found == Written("w20", [20], "stop"), token
        else:
            assert found.token_ids == [20, token, *[30] * (NEW - 2)] and found.finish_reason == "length", token


def test_each_row_ends_where_it_ends_alone() -> None:
    unended = [written("llama", request.task, request.ids, NEW, [END])[0] for request in BATCH]
    ends = [unended[0][2], unended[1][5]]
    found = write(of_model(ends))
    right = [written("llama", request.task, request.ids, NEW, [*ends, END]) for request in BATCH]
    assert [(one.token_ids, one.finish_reason) for one in found] == right
    assert [one.text for one in found] == [words().decode(ids, skip_special_tokens=True) for ids, _ in right]
    assert len({len(ids) for ids, _ in right}) > 1 and {reason for _, reason in right} >= {"stop"}


def test_a_tokenizer_and_a_model_without_an_end() -> None:
    tokenizer = words()
    tokenizer.eos_token = None
    (found, *_) = write(of_model(None), tokenizer, **says(20, 2, 30), new=3)
    assert found.token_ids == [20, 2, 30] and found.finish_reason == "length"
    # The pad is a token as others, and was written.
    (found, *_) = write(of_model(None), tokenizer, **says(20, 1, 1), new=3)
    assert found.token_ids == [20, 1, 1] and found.finish_reason == "length"


def test_other_ends_and_pads() -> None:
    stop = written("llama", "long", TEXTS[0], NEW, [END])[0][2]
    found = write(of_model(None), stop_strings=[f"w{stop}"])
    assert found[0].token_ids[-1] == stop and found[0].finish_reason == "stop"
    for one, request in zip(found, BATCH, strict=True):
        alone, reason = written("llama", request.task, request.ids, NEW, [END])
        cut = alone[: alone.index(stop) + 1] if stop in alone else alone
        assert (one.token_ids, one.finish_reason) == (cut, "stop" if stop in alone else reason)
    (found_at_the_last, *_) = write(of_model(None), stop_strings="w21", **says(20, 20, 21), new=3)
    assert found_at_the_last == Written("w20w20w21", [20, 20, 21], "stop")
    model = of_model(None)
    model.generation_config.stop_strings = ["w21"]
    assert write(model, **says(20, 21, 30))[0] == Written("w20w21", [20, 21], "stop")


@pytest.mark.filterwarnings("ignore")
def test_a_stop_string_of_the_model_ends_a_text_beside_a_configuration_of_the_call() -> None:
    model = of_model(None)
    model.generation_config.stop_strings = ["w21"]
    config = GenerationConfig(do_sample=False)  # names none, so that generate takes those of the model
    assert write(model, generation_config=config, **says(20, 21), new=2)[0] == Written("w20w21", [20, 21], "stop")


def test_options_that_give_several_texts_are_refused() -> None:
    options = {"do_sample": True, "num_return_sequences": 2}
    with pytest.raises(SoftPromptError, match="the options give 6 answers for 3 texts"):
        write(of_model(None), **options)
    with pytest.raises(SoftPromptError, match="the options give 6 answers for 3 texts"):
        list(Writer(of_model(None), words(), NEW, options).stream(BATCH))


def mamba() -> Any:
    return models.build("mamba")


@pytest.mark.parametrize("make", [tiny.tiny_model, mamba], ids=["padded on the left", "padded on the right"])
def test_a_stream_tells_each_row_as_it_is_alone(make) -> None:
    bare, model = make(), make()
    attach(model, SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in HARD.items()}))
    said: dict[int, list[str]] = {}
    for index, text in Writer(model, words(), NEW, {}).stream(BATCH):
        said.setdefault(index, []).append(text)
    for request in BATCH:
        row = tiny.Row(0, HARD[str(request.task)], request.ids)
        (ids,) = tiny.hard_greedy(bare, row, NEW, do_sample=False, eos_token_id=END, pad_token_id=1)
        kept = ids[: ids.index(END)] if END in ids else ids
        # A token that the tokenizer does not know, or a special one, adds nothing to the text.
        grown = dict.fromkeys(words().decode(kept[: n + 1], skip_special_tokens=True) for n in range(len(kept)))
        assert said[request.index] == [*grown]


def test_a_text_that_is_empty_is_told_once_and_half_a_character_is_not() -> None:
    tokenizer = words()
    assert list(Writer(of_model(None), tokenizer, NEW, says(END)).stream(BATCH[:2])) == [(4, ""), (5, "")]

    class Halves:
        """Decodes w21 as the first half of a character, and w21 w22 as all of it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def decode(self, ids: list[int], **options: Any) -> str:
            return (
                tokenizer.decode(ids, **options).replace("w21w22", "é").replace("w21", "\ufffd").replace("w20", " a ")
            )

    writer = Writer(of_model(None), Halves(), 5, says(20, 21, 22, 20, 21))
    assert list(writer.stream(BATCH[:1])) == [(4, "a"), (4, "a é"), (4, "a é a"), (4, "a é a \ufffd")]
