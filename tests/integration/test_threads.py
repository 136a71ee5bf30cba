"""One attached model in many threads and asyncio tasks at once: every call has its own tenant's prompt alone."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import TextIteratorStreamer

from lightning_softprompt import MixedTaskGenerator, SoftPromptError, SoftPrompts, Tokens, attach
from lightning_softprompt.attachment.attach import attachment_of
from tests import tiny
from tests.tokenizer import word_tokenizer

TENANTS = {f"tenant-{number}": [5 + 3 * number + offset for offset in range(2 + number)] for number in range(5)}
TEXT = [9, 8, 7]
NEW = 4


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def attached(prefix: str = "auto"):
    model = tiny.tiny_model()
    prompts = SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in TENANTS.items()})
    return attach(model, prompts, prefix)


def answers_alone() -> dict[str, list[int]]:
    """What the bare model says behind each tenant's hard tokens."""
    bare = tiny.tiny_model()
    rows = {task: tiny.Row(0, ids, TEXT) for task, ids in TENANTS.items()}
    found = {task: tiny.hard_greedy(bare, row, NEW, do_sample=False)[0] for task, row in rows.items()}
    assert len(set(map(tuple, found.values()))) == len(TENANTS), "a wrong prompt would not show"
    return found


def greedy(model, task: str, **options) -> list[int]:
    ids = torch.tensor([TEXT])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1, **options}
    return model.generate(ids, tasks=[task], **options)[0, len(TEXT) :].tolist()


def race(workers: list[Callable[[], Counter]]) -> Counter:
    """What all workers counted, each in a thread of its own, begun together."""
    gate = threading.Barrier(len(workers))

    def begin(worker: Callable[[], Counter]) -> Counter:
        gate.wait()
        return worker()

    with ThreadPoolExecutor(len(workers)) as pool:
        return sum(pool.map(begin, workers), Counter())


def test_two_thousand_calls_of_every_kind(tmp_path) -> None:
    right = answers_alone()
    model, words = attached(), word_tokenizer([f"w{number}" for number in range(57)])
    generator = MixedTaskGenerator(model, words)
    texts = {task: words.decode(ids) for task, ids in right.items()}
    ended = {task: text.split("<eos>")[0] for task, text in texts.items()}  # where a generator stops
    logits = {task: tiny.hard_row(tiny.tiny_model(), tiny.Row(0, ids, TEXT)) for task, ids in TENANTS.items()}
    # Of five prefixes that are asked for all the time, two have room.
    with torch.no_grad():
        model(torch.tensor([TEXT]), tasks=["tenant-4"])
    prefixes = attachment_of(model).prefixes
    prefixes.most_bytes = 2 * sum(kept.bytes for kept in prefixes._kept.values())

    def by_model(task: str) -> bool:
        return greedy(model, task) == right[task]

    def by_forward(task: str) -> bool:
        with torch.no_grad():
            found = model(torch.tensor([TEXT]), tasks=[task]).logits[0]
        return tiny.relative_error(found, logits[task]) < 1e-5

    def by_generator(task: str) -> bool:
        other, bad = random.choice(list(TENANTS)), list(TENANTS).index(task)
        requests = [(TEXT, task), (TEXT, other)] * 3
        requests[bad] = ([], task)  # has no tokens
        found = generator.generate(*zip(*requests, strict=True), max_new_tokens=NEW)
        expected = [ended[whose] if text else None for text, whose in requests]
        return found == expected and [*found.failures] == [bad] == [*generator.failures]

    def by_streamer(task: str) -> bool:
        streamer = TextIteratorStreamer(words, skip_prompt=True, timeout=20)
        thread = threading.Thread(target=greedy, args=(model, task), kwargs={"streamer": streamer})
        thread.start()
        found = "".join(streamer)
        thread.join()
        return found.split() == texts[task].split()

    async def in_asyncio(task: str) -> bool:
        with attachment_of(model).routed([task]):  # lasts while other tasks of the loop run
            await asyncio.sleep(0)
            found = await asyncio.to_thread(model.generate, torch.tensor([TEXT]), max_new_tokens=NEW, do_sample=False)
            await asyncio.sleep(0)
            with torch.no_grad():
                near = tiny.relative_error(model(torch.tensor([TEXT])).logits[0], logits[task]) < 1e-5
        return near and found[0, len(TEXT) :].tolist() == right[task]

    def count(ways: list[Callable[[str], bool]], rounds: int) -> Counter:
        seen: Counter = Counter()
        for _, way, task in itertools.product(range(rounds), ways, TENANTS):
            try:
                seen["right" if way(task) else f"wrong {way.__name__}"] += 1
            except Exception as error:
                seen[f"{way.__name__}: {type(error).__name__}: {error}"] += 1
            if set(seen) != {"right"}:
                break
        return seen

    def loop() -> Counter:
        async def everybody() -> list[bool]:
            return await asyncio.gather(*(in_asyncio(task) for task in list(TENANTS) * 40))

        return Counter("right" if one else "wrong in_asyncio" for one in asyncio.run(everybody()))

    workers = [lambda: count([by_model, by_forward, by_generator, by_streamer], 23)] * 4 + [loop]
    seen = race(workers)
    assert set(seen) == {"right"} and seen.total() >= 2000, seen
    with pytest.raises(SoftPromptError, match="nothing says which row is which"):
        model(torch.tensor([TEXT]))


@pytest.mark.parametrize("prefix", ["auto", "never"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_beside_serving(prefix: str, checkpointing: bool) -> None:
    right = answers_alone()
    model = attached(prefix)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(4, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    trained = ["tenant-0", "tenant-1", "tenant-0", "tenant-1"]

    def gradients() -> dict[str, torch.Tensor | None]:
        model.soft_prompts.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids, tasks=trained).loss.backward()
        return {task: model.soft_prompts[task].grad for task in TENANTS}

    expected = {task: None if value is None else value.clone() for task, value in gradients().items()}
    assert [task for task, value in expected.items() if value is not None] == ["tenant-0", "tenant-1"]
    done = threading.Event()

    def train() -> Counter:
        seen: Counter = Counter()
        for _ in range(40):
            found = gradients()
            near = all(
                found[task] is None if value is None else tiny.relative_error(found[task], value) < 1e-5
                for task, value in expected.items()
            )
            seen["right gradient" if near else "wrong gradient"] += 1
        done.set()
        return seen

    def serve() -> Counter:
        seen: Counter = Counter()
        while not done.is_set():
            for task in TENANTS:
                seen["right answer" if greedy(model, task) == right[task] else "wrong answer"] += 1
        return seen

    seen = race([train, serve, serve])
    assert set(seen) == {"right gradient", "right answer"} and seen["right gradient"] == 40, seen


def test_what_is_kept_belongs_to_the_value_it_is_compared_with() -> None:
    """Another thread may change a prompt while its keys and values are computed."""
    model = attached()
    prompt, text = model.soft_prompts["tenant-3"], torch.tensor([TEXT])
    values = [torch.randn(prompt.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    expected = []
    for value in values:
        with torch.no_grad():
            prompt.copy_(value)
            expected.append(model(text, tasks=["tenant-3"]).logits)

    def change(*_: object) -> None:
        handle.remove()
        thread = threading.Thread(target=lambda: prompt.data.copy_(values[1]))
        thread.start()
        thread.join()

    prompt.data.copy_(values[0])
    handle = model.model.layers[1].register_forward_hook(change)
    with torch.no_grad():
        model(text, tasks=["tenant-3"])
        assert torch.equal(prompt, values[1])
        assert tiny.relative_error(model(text, tasks=["tenant-3"]).logits, expected[1]) < 1e-5


def test_tasks_come_and_go_beside_calls() -> None:
    """Everybody is answered with his own prompt while an editor moves the indices of all tasks."""
    right, model = answers_alone(), attached()
    prompts = attachment_of(model).prompts
    calls, done = 40, threading.Event()

    def editor() -> Counter:
        while not done.is_set():
            value = prompts["tenant-0"].detach().clone()
            prompts.remove("tenant-0")
            prompts.add("new", torch.randn(3, prompts.hidden_size))
            prompts.add("tenant-0", value)
            prompts.rename("new", "newer")
            prompts.remove("newer")
        return Counter()

    def caller(number: int) -> Counter:
        found = Counter()
        try:
            for call in range(calls):
                task = f"tenant-{1 + (call + number) % 4}"
                found[greedy(model, task, use_cache=call % 2 == 0) == right[task]] += 1
        finally:
            done.set()
        return found

    assert race([editor, *(lambda number=number: caller(number) for number in range(3))]) == Counter({True: 3 * calls})
