"""Texts as they are: what a batch of any make-up answers is what each request is answered alone."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from lightning_softprompt import MixedTaskGenerator, SoftPromptError, SoftPrompts, Tokens, attach
from tests import tiny
from tests.tokenizer import word_tokenizer

# The stop strings of transformers want a tokenizer that knows "abcdef".
TOKENIZER = word_tokenizer(["abcdef", *(f"w{index}" for index in range(5, tiny.VOCABULARY))])
NEW = 6
Request = tuple[str, str | None]


def make(kind: str = "llama") -> MixedTaskGenerator:
    model = tiny.tiny_model(kind)
    prompts = SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()})
    return MixedTaskGenerator(attach(model, prompts), TOKENIZER)


def requests(count: int, longest: int = 12, seed: int = 0) -> list[Request]:
    draw = random.Random(seed)
    lengths = [draw.randint(1, longest) for _ in range(count)]
    texts = [" ".join(f"w{draw.randrange(5, tiny.VOCABULARY)}" for _ in range(length)) for length in lengths]
    return [(text, draw.choice([*tiny.HARD, None])) for text in texts]


def alone(request: Request, new: int = NEW, decoded_by: Any = TOKENIZER, **options: Any) -> str:
    """The bare model's answer up to its end, with hard tokens, in a batch of one."""
    text, task = request
    row = tiny.Row(0, tiny.HARD[task] if task else [], TOKENIZER(text)["input_ids"])
    options = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 1, "tokenizer": TOKENIZER, **options}
    (ids,) = tiny.hard_greedy(tiny.tiny_model(), row, new, **options)
    return decoded_by.decode(ids[: ids.index(2)] if 2 in ids else ids, skip_special_tokens=True)


def length(request: Request) -> int:
    return len(tiny.HARD.get(request[1] or "", [])) + len(request[0].split())


def split(asked: list[Request]) -> dict[str, Any]:
    return {"texts": [text for text, _ in asked], "tasks": [task for _, task in asked], "max_new_tokens": NEW}


class Spy:
    """Stands in the model's `generate`: remembers the batches, and may fail or answer in its place."""

    def __init__(self, generator: MixedTaskGenerator, memory: int = 10**9, is_fake: bool = False) -> None:
        model: Any = generator.model
        self.real, self.memory, self.is_fake = model.generate, memory, is_fake
        self.batches: list[list[Request]] = []
        self.options: dict[str, Any] = {}
        self.out_of_memory = 0
        model.generate = self

    def __call__(self, input_ids, attention_mask, tasks, **options: Any) -> Any:
        self.options = options
        texts = [TOKENIZER.decode(i[m != 0].tolist()) for i, m in zip(input_ids, attention_mask, strict=True)]
        batch = [(text.replace("w", " w").strip(), task) for text, task in zip(texts, tasks, strict=True)]
        if sum(attention_mask.shape) > self.memory:
            self.out_of_memory += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append(batch)
        if self.is_fake:  # each request's own last token
            return torch.cat([input_ids, input_ids[:, -1:]], 1)
        return self.real(input_ids=input_ids, attention_mask=attention_mask, tasks=tasks, **options)

    @property
    def width(self) -> list[int]:
        return [max(map(length, batch)) + NEW for batch in self.batches]


@pytest.mark.parametrize("budget", [1, 60, 200, 10**6])
def test_every_request_is_answered_as_it_is_alone(budget: int) -> None:
    asked, generator = requests(40), make()
    before = {name: (value.data_ptr(), value.clone()) for name, value in generator.model.named_parameters()}
    answers = generator.generate(**split(asked), max_batch_tokens=budget)
    assert answers == [alone(request) for request in asked]
    assert len(set(answers)) > 30 and generator.failures == {}
    for name, value in generator.model.named_parameters():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1]), name


@pytest.mark.parametrize("budget", [1, 17, 100, 300])
def test_batches_are_as_full_as_the_budget_lets_them_be_and_of_like_length(budget: int) -> None:
    asked, generator = requests(100, longest=40), make()
    spy = Spy(generator, is_fake=True)
    generator.generate(**split(asked), max_batch_tokens=budget)
    sent = [request for batch in spy.batches for request in batch]
    assert sorted(sent, key=str) == sorted(asked, key=str)
    assert [length(request) for request in sent] == sorted(map(length, asked), reverse=True)
    for batch, width in zip(spy.batches, spy.width, strict=True):
        assert len(batch) * width <= budget or len(batch) == 1
    for batch, width in zip(spy.batches[:-1], spy.width, strict=False):
        assert (len(batch) + 1) * width > budget
    if budget == 300:
        columns = sum(len(batch) * (width - NEW) for batch, width in zip(spy.batches, spy.width, strict=True))
        assert columns < 1.15 * sum(map(length, asked))  # pads are few
        assert any(len({task for _, task in batch}) > 2 for batch in spy.batches)


def test_a_bad_request_stops_no_other_one_and_is_reported(caplog) -> None:
    asked: Any = requests(12)
    fitting = tiny.tiny_model().config.max_position_embeddings - NEW - len(tiny.HARD["long"])
    bad = {
        1: (("w5", "tone"), r"unknown task 'tone'; known tasks: 'long', 'short', 'one'"),
        2: (("", "one"), "the text has no tokens; give it some words"),
        4: ((float("nan"), "one"), "the text must be a string or a list of token ids, found nan"),
        5: (("w5 \ud800", "one"), r"the tokenizer cannot read 'w5 \ud800'"),
        8: (("w5 " * (fitting + 1), "long"), "7 tokens of prompt, 116 of text and max_new_tokens=6 are more than the"),
        9: (
            ([4, tiny.VOCABULARY], "one"),
            "the text has token 61, the model's embedding knows 0 to 60; take the model's own",
        ),
    }
    for index, (request, _) in bad.items():
        asked[index] = request
    asked[10] = ("w5 " * fitting, "long")  # fits to the last position
    generator = make()
    answers = generator.generate(**split(asked))
    assert [index for index, answer in enumerate(answers) if answer is None] == list(bad) == list(generator.failures)
    for index, (_, reason) in bad.items():
        assert reason in generator.failures[index]
    assert answers[:1] + answers[10:] == [alone(request) for request in asked[:1] + asked[10:]]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name == "lightning_softprompt"
    assert record.message.startswith("6 of 12 requests have no answer. request 1: unknown task 'tone'; known")
    assert "request 2: the text has no tokens" in record.message
    assert "request 9" not in record.message and record.message.endswith("1 more in answers.failures")
    assert generator.generate(["w5"], ["one"]) and generator.failures == {}


def test_failures_are_of_the_call_of_each_thread() -> None:
    generator, turns = make(), threading.Barrier(2)

    def ask(bad: int) -> bool:
        asked: list[Any] = [[5, 6]] * 3
        asked[bad] = []  # has no tokens
        answers = generator.generate(asked, ["one"] * 3)
        turns.wait(20)  # now both have asked
        return [*answers.failures] == [bad] == [*generator.failures]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, [0, 2])) == [True, True]
    assert generator.failures == {}  # this thread has asked nothing
    generator.generate([[]], ["one"])
    assert list(generator.failures) == [0] and make().failures == {}
    with pytest.raises(SoftPromptError, match="one task a text"):
        generator.generate(["w5"], [])
    assert list(generator.failures) == [0]  # a call that was refused is none


def test_learned_positions_are_used_up_and_not_passed() -> None:
    generator = make("gpt2")
    longest = 128 - NEW - len(tiny.HARD["short"])
    answers = generator.generate(["w5 " * longest, "w5 " * (longest + 1)], ["short", "short"], max_new_tokens=NEW)
    assert answers[0] is not None and list(generator.failures) == [1]


def test_a_batch_without_memory_is_halved_and_so_are_those_after_it(caplog) -> None:
    asked, generator = requests(40), make()
    spy = Spy(generator, memory=20)
    answers = generator.generate(**split(asked), max_batch_tokens=10**6)
    assert answers == [alone(request) for request in asked] and generator.failures == {}
    assert 1 <= spy.out_of_memory <= 5 and sum(map(len, spy.batches)) == len(asked)
    assert caplog.text.count("out of memory; going on with max_batch_tokens=") == spy.out_of_memory


def test_a_request_that_no_memory_is_left_for_is_reported() -> None:
    asked, generator = requests(10), make()
    asked[3] = ("w7 " * 60, None)
    spy = Spy(generator, memory=30)
    answers = generator.generate(**split(asked))
    assert generator.failures == {3: "there is no memory for its 66 tokens; shorten the text or lower max_new_tokens"}
    asked[3] = ("w7", None)
    assert answers == [None if index == 3 else alone(request) for index, request in enumerate(asked)]
    assert spy.out_of_memory > 1


def test_thousands_of_requests_are_a_matter_of_batches() -> None:
    asked, generator = requests(2000, longest=20), make()
    spy = Spy(generator, is_fake=True)
    answers = generator.generate(**split(asked), max_batch_tokens=4096)
    assert answers == [text.split()[-1] for text, _ in asked]
    assert len(spy.batches) < 2000 * 25 // 4096 + 5


def test_stop_strings_end_each_row_where_it_ends_alone() -> None:
    asked, generator = requests(30), make()
    unstopped = [alone(request, 20) for request in asked]
    stop = "w" + unstopped[0].split("w")[4] + "w"
    expected = [alone(request, 20, stop_strings=[stop]) for request in asked]
    for options in (
        {"stop_strings": [stop]},
        {"generation_config": GenerationConfig(stop_strings=stop, eos_token_id=2)},
    ):
        found = generator.generate(**{**split(asked), "max_new_tokens": 20}, **options)
        assert found == expected
    assert expected[0] != unstopped[0] and len({len(answer.split("w")) for answer in expected}) > 2


def test_options_of_generate_pass_through() -> None:
    asked, generator = requests(8), make()
    beams = [alone(request, num_beams=3) for request in asked]
    assert generator.generate(**split(asked), num_beams=3) == beams
    assert generator.generate(**split(asked), num_beams=3, return_dict_in_generate=True) == beams
    spy = Spy(generator)
    greedy = generator.generate(**split(asked))
    assert spy.options["do_sample"] is False
    torch.manual_seed(0)
    assert generator.generate(**split(asked), do_sample=True, temperature=5.0) != greedy
    assert generator.generate(**split(asked), generation_config=GenerationConfig(do_sample=True, top_k=9)) != greedy


def test_texts_may_be_token_ids() -> None:
    asked, generator = requests(8), make()
    ids = [TOKENIZER(text)["input_ids"] for text, _ in asked]
    assert generator.generate(ids, [task for _, task in asked], NEW) == [alone(request) for request in asked]


@pytest.mark.parametrize("has_others", [True, False])
def test_a_pad_token_beyond_the_embedding_does_no_harm_and_shows_in_no_answer(has_others: bool) -> None:
    inner = Tokenizer(models.WordLevel(TOKENIZER.get_vocab(), unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    special = {"eos_token": "<eos>"} if has_others else {}  # else pads are what is an ordinary token to the tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.add_special_tokens({"pad_token": "<beyond>"})
    assert tokenizer.pad_token_id == tiny.VOCABULARY
    asked = requests(20)
    unstopped = [alone(request) for request in asked]
    stop = "w" + unstopped[0].split("w")[2] + "w"
    generator = MixedTaskGenerator(make().model, tokenizer)
    found = generator.generate(**split(asked), stop_strings=[stop], eos_token_id=2)
    assert found == [alone(request, decoded_by=tokenizer, stop_strings=[stop]) for request in asked]
    assert found[0] != unstopped[0] and len({len(answer.split("w")) for answer in found}) > 1


def test_progress_goes_by_requests(capsys) -> None:
    asked, generator = requests(20), make()
    asked[7] = ("w5", "tone")
    generator.generate(**split(asked))
    assert "generating" not in "".join(capsys.readouterr())
    generator.generate(**split(asked), show_progress=True)
    printed = capsys.readouterr()
    assert "generating" in printed.err and "20/20" in printed.err and printed.out == ""
    assert make().generate([], []) == []


def test_mistakes_of_the_call_are_raised() -> None:
    generator = make()
    with pytest.raises(SoftPromptError, match="lists of equal length"):
        generator.generate(["w5", "w5"], ["one"])
    with pytest.raises(SoftPromptError, match="lists of equal length"):
        generator.generate("w5", ["one", "one"])  # type: ignore[arg-type]
    with pytest.raises(SoftPromptError, match="max_batch_tokens must be at least 1, got 0"):
        generator.generate(["w5"], ["one"], max_batch_tokens=0)
    with pytest.raises(SoftPromptError, match="the options give 2 answers for 1 texts"):
        generator.generate(["w5"], ["one"], do_sample=True, num_return_sequences=2)
    with pytest.raises(ValueError, match="typos"):
        generator.generate(["w5"], ["one"], max_length_of_text=2)
    with pytest.raises(SoftPromptError, match="has no prompts; attach"):
        MixedTaskGenerator(tiny.tiny_model(), TOKENIZER)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prompt_that_is_not_finite_fails_for_its_own_requests_alone(value: float) -> None:
    generator = make()
    texts, tasks, labels = ["w7 w8", "w9", "w10 w11"], ["long", "short", None], [["w20", "w21"]] * 3
    expected = generator.generate(texts, tasks, max_new_tokens=3), generator.rank(texts, tasks, labels)
    with torch.no_grad():
        generator.prompts["long"][1, 2] = value
    found = generator.generate(texts, tasks, max_new_tokens=3), generator.rank(texts, tasks, labels)
    for answers in found:
        assert answers[0] is None and list(answers.failures) == [0]
        assert "prompt of task 'long' holds a number that is not finite" in answers.failures[0]
    assert found[0][1:] == expected[0][1:]
    assert found[1][1:] == [pytest.approx(scores, rel=1e-5) for scores in expected[1][1:]]
