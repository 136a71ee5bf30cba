"""The stages of gpu.py that run whole models: waits, train, generate, decode."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mixed_inference
import peers
import torch
import train_step
from measure import medians_in_turn, peak_memory, progress, second_time
from torch import Tensor
from torch.nn import functional
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

if TYPE_CHECKING:
    from gpu import Session

# Hidden, intermediate, layers, heads, key heads, vocabulary; and whether the head is the embedding.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512, True),
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
}

# Model, rows, text, prompt, tasks: what a prefix saves of the columns that prompts in the sequence take is from 4 to 73
# percent. What is wanted most comes first.
STEPS = [
    ("1B", 16, 128, 20, 4),
    ("1B", 64, 32, 100, 2),
    ("8B", 32, 32, 100, 2),
    ("8B", 8, 256, 100, 4),
    ("8B", 16, 64, 100, 2),
    ("8B", 8, 256, 20, 4),
    ("8B", 16, 128, 100, 4),
]
SMALL_STEPS = [("tiny", 8, 16, 5, 4)]
STEP_PEERS = {
    "no_prompt": "no prompt",
    "always": 'ours, prefix="always"',
    "inline": 'ours, prefix="never"',
    "inline_loss_alone": 'ours, prefix="never", logits="labels"',
    "ours": 'ours, prefix="auto"',
    "peft": "PEFT, task by task",
    "peft_one_task": "PEFT, one prompt for all",
}

# Model, rows, tasks, prompt, new tokens.
GENERATIONS = [("135M", 8, 4, 20, 16), ("1B", 8, 4, 20, 16), ("8B", 8, 4, 100, 16)]
SMALL_GENERATIONS = [("tiny", 8, 4, 5, 4)]
GENERATION_PEERS = {
    "no_prompt": "no prompt",
    "ours": "ours",
    "inline": 'ours, prefix="never"',
    "peft": "PEFT, task by task",
    "hard_prompt": "hard prompts",
}
DECODING = ("135M", 8, 4, 20, 8)
SMALL_DECODING = ("tiny", 8, 4, 5, 8)

WAIT = "called a synchronizing"  # what torch.cuda.set_sync_debug_mode warns of
NOT_TOLD = {Path(torch.__file__).parent, Path(__file__).parent}


def llama(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model of random weights, made on the device in the dtype; what rotates positions stays float32."""
    hidden, intermediate, layers, heads, key_heads, vocabulary, tied = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    progress.print(f"making a model of {name}")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return peers.never_ending(LlamaForCausalLM(config))
    finally:
        torch.set_default_dtype(before)


def waits(session: Session) -> None:
    base = llama("tiny", session.device, session.dtype)
    starts = [list(range(5, 13 + task)) for task in range(4)]
    ids = torch.randint(5, 512, (8, 12), device=session.device)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[3, :4] = right[3, -4:] = 0
    batch = dict(input_ids=ids, attention_mask=right, labels=ids.masked_fill(right == 0, -100))
    task_ids = (torch.arange(8) % 4).to(session.device)
    found = count_waits(session, "a number read from the device", lambda: ids.sum().item())
    if session.has_gpu and not found:
        raise RuntimeError("torch did not warn of a wait where there is one, so that none can be counted")
    bare = peers.twin(base)
    bare.enable_input_require_grads()
    count_waits(session, "a step, no prompt", step_of(bare, **batch))
    for prefix, logits, given in itertools.product(("auto", "never"), ("all", "labels"), (task_ids, task_ids.cpu())):
        model = peers.ours(base, starts, prefix, logits)
        what = f"a step, prefix={prefix}, logits={logits}, task_ids on the {given.device.type}"
        count_waits(session, what, step_of(model, **batch, task_ids=given))
    models: dict[str, tuple[Any, dict[str, Tensor]]] = {
        "no prompt": (bare, {}),
        "prefix=auto": (peers.ours(base, starts, "auto"), {"task_ids": task_ids}),
        "prefix=never": (peers.ours(base, starts, "never"), {"task_ids": task_ids}),
    }
    for (name, (model, more)), tokens in itertools.product(models.items(), (1, 11)):
        options = dict(input_ids=ids, attention_mask=left, max_new_tokens=tokens, do_sample=False, **more)
        count_waits(session, f"generate, {tokens} new tokens, {name}", functools.partial(model.generate, **options))


def step_of(model: PreTrainedModel, **inputs: Any) -> Callable[[], None]:
    def run() -> None:
        model(**inputs).loss.backward()

    return run


def count_waits(session: Session, what: str, call: Callable[[], Any]) -> int:
    """One row: how often the host waits for the device in a call that has run before, and where."""
    with session.row("Waits for the device", what=what) as row:
        call()
        with waits_of(session) as places:
            call()
        row["waits"] = sum(places.values()) if session.has_gpu else "none to be had on the CPU"
        row["where"] = "; ".join(f"{count}x {place}" for place, count in places.most_common())
        return sum(places.values())
    return 0


@contextlib.contextmanager
def waits_of(session: Session) -> Iterator[collections.Counter[str]]:
    """The places of the block at which torch warns of a wait."""
    places: collections.Counter[str] = collections.Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if WAIT in str(message):
            places[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        session.synchronize()
        if session.has_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if session.has_gpu:
                torch.cuda.set_sync_debug_mode("default")


def place() -> str:
    """The innermost line that is neither torch's nor a benchmark's, and the line of the package that led there."""
    innermost = ""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if NOT_TOLD.intersection(path.parents) or path.name == "warnings.py":
            continue
        line = f"{path.parent.name}/{path.name}:{frame.lineno}"
        innermost = innermost or line
        if "lightning_softprompt" in path.parts or "softprompt_kernels" in path.parts:
            return line if line == innermost else f"{innermost} from {line}"
    return innermost or "the call itself"


def train(session: Session) -> None:
    exact = llama("tiny", session.device, torch.float32)
    with session.row("A step in float32: prefix, inline and PEFT") as row:
        steps = train_step.peers_of(exact, (8, 16, 7, 4), always=True)
        steps["ours"] = steps["always"]  # whatever "auto" would choose
        difference, failure = train_step.compare(steps)
        row.update(difference, verdict=f"FAILED: ours differs from {failure}" if failure else "the same")
    sizes = SMALL_STEPS if session.is_small else STEPS
    for name, group in itertools.groupby(sizes, key=lambda size: size[0]):
        base = llama(name, session.device, session.dtype)
        for _, *size in group:
            step(session, name, base, tuple(size))
            session.free()
        del base
        session.free()


def step(session: Session, name: str, base: PreTrainedModel, size: train_step.Size) -> None:
    """A row for each peer, and one that tells whether a prefix won."""
    batch, length, prompt, tasks = size
    named = dict(model=name, rows=batch, text=length, prompt=prompt, tasks=tasks)
    steps = train_step.peers_of(base, size, always=True)
    seconds: dict[str, float] = {}
    for key, what in STEP_PEERS.items():
        with session.row("A training step", **named, what=what) as row:
            call = steps.pop(key)  # a peer that was measured holds its gradients no longer
            seconds[key] = medians_in_turn({key: call}, session.device, repeats=5)[key]
            row["ms"] = seconds[key] * 1e3
            row["vs no prompt"] = seconds[key] / seconds["no_prompt"]
            row["vs floor"] = row["vs no prompt"] / (1 + tasks * prompt / (batch * length))
            row["peak, MB"] = peak_memory(call, session.device) / 1e6
        if key == "inline":
            with session.row("Where a prefix wins", **named) as row:
                row["saved, % of the columns"] = 100 * (batch - tasks) * prompt / (batch * (length + prompt))
                row["never / always"] = seconds["inline"] / seconds["always"]
                row["prefix wins"] = "yes" if row["never / always"] > 1 else "no"


def generate(session: Session) -> None:
    for name, rows, tasks, prompt, count in SMALL_GENERATIONS if session.is_small else GENERATIONS:
        base = llama(name, session.device, session.dtype)
        batch = mixed_inference.Batch.of(stream_of(base), rows, tasks, prompt)
        runs = mixed_inference.runs_of(base, batch, count)
        named = {"model": name, "rows": rows, "tasks": tasks, "prompt": prompt, "new tokens": count}
        seconds: dict[str, float] = {}
        for key, what in GENERATION_PEERS.items():
            with session.row("Greedy generation", **named, what=what) as row:
                seconds[key] = second_time(runs[key], session.device)
                row["ms"] = seconds[key] * 1e3
                row["ms a token"] = row["ms"] / count
                row["vs no prompt"] = seconds[key] / seconds["no_prompt"]
        by_hand(session, name, base, batch, count)
        del base, runs
        session.free()
        if name in ("135M", "tiny"):
            right_tokens(session, name, batch)


def stream_of(base: PreTrainedModel) -> list[int]:
    """Ids that texts are cut from."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, base.config.vocab_size, (4096,), generator=generator).tolist()


@torch.no_grad()
def by_hand(session: Session, name: str, base: PreTrainedModel, batch: mixed_inference.Batch, count: int) -> None:
    """What a token takes behind a dynamic cache, and what of it passes before the call is back."""
    inputs = mixed_inference.padded(batch.texts, base.device)
    for what, model, more in contenders(base, batch):
        with session.row("A token by hand", model=name, what=what) as row:
            out = model(**inputs, **more, use_cache=True)
            handed, done, _ = next_tokens(session, model, out, inputs["attention_mask"], count)
            row["host, ms"], row["ms"] = (1e3 * statistics.median(times[count // 4 :]) for times in (handed, done))


def contenders(
    base: PreTrainedModel, batch: mixed_inference.Batch
) -> list[tuple[str, PreTrainedModel, dict[str, Any]]]:
    """Ours and the bare model, and what the first pass takes beside the texts."""
    task_ids = batch.task_ids.to(base.device)
    return [
        ("ours", peers.ours(base, batch.prompts, "auto"), {"task_ids": task_ids}),
        ("no prompt", peers.twin(base), {}),
    ]


def next_tokens(
    session: Session, call: Callable[..., Any], out: Any, mask: Tensor, count: int, room: int = 0
) -> tuple[list[float], list[float], Tensor]:
    """Greedy tokens one by one behind the cache of `out`.

    The mask is widened to `room` columns, those of a static cache, so that it has the same shape in all passes.

    Returns:
        Seconds until each pass was handed over, seconds until it was done, and the tokens.
    """
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    handed, done, tokens = [], [], []
    for _ in range(count):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        given = functional.pad(mask, (0, max(room - mask.shape[1], 0)))
        session.synchronize()
        start = time.perf_counter()
        out = call(input_ids=token, attention_mask=given, past_key_values=cache)
        handed.append(time.perf_counter() - start)
        token = out.logits[:, -1:].argmax(-1)
        session.synchronize()
        done.append(time.perf_counter() - start)
        tokens.append(token)
    return handed, done, torch.cat(tokens, 1)


def right_tokens(session: Session, name: str, batch: mixed_inference.Batch) -> None:
    """Ours against each row alone behind its hard prompt, in float32."""
    exact, count = llama(name, session.device, torch.float32), 4
    with session.row("Tokens in float32 against each row alone", model=name) as row:
        expected = mixed_inference.right_answer(exact, batch, count)
        found = mixed_inference.runs_of(exact, batch, count)["ours"]()
        row["equal, %"] = mixed_inference.percent_equal(found, expected)


@torch.no_grad()
def decode(session: Session) -> None:
    name, rows, tasks, prompt, count = SMALL_DECODING if session.is_small else DECODING
    base = llama(name, session.device, session.dtype)
    batch = mixed_inference.Batch.of(stream_of(base), rows, tasks, prompt)
    for what, model, more in contenders(base, batch):
        tokens: dict[str, Tensor] = {}
        calls: dict[str, Callable[..., Any]] = {"no": model, "yes": compiled_call(model, session)}
        for compiled, call in calls.items():
            with session.row("A token with a static cache", model=name, what=what, compiled=compiled) as row:
                progress.print(f"{what}, compiled: {compiled}")
                done, tokens[compiled] = static_tokens(session, model, call, batch, more, count)
                row["ms"], row["first, s"] = 1e3 * statistics.median(done[count // 2 :]), done[0]
                if compiled == "yes":
                    row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                    row["tokens as before, %"] = mixed_inference.percent_equal(tokens["yes"], tokens["no"])
        for compiled in ("no", "yes"):
            with session.row("generate with a static cache", model=name, what=what, compiled=compiled) as row:
                progress.print(f"generate, {what}, compiled: {compiled}")
                options = more | static_options(session, compiled == "yes")
                generated = functools.partial(mixed_inference.new_tokens, model, inputs_of(batch, model), **options)
                row["first, s"] = seconds_of(session, generated, count)
                row["ms a token"] = 1e3 * (seconds_of(session, generated, count) - seconds_of(session, generated, 1))
                row["ms a token"] /= count - 1
                tokens[f"generate, {compiled}"] = generated(count)
                if compiled == "yes":
                    now, before = (tokens[f"generate, {each}"] for each in ("yes", "no"))
                    row["tokens as before, %"] = mixed_inference.percent_equal(now, before)


def inputs_of(batch: mixed_inference.Batch, model: PreTrainedModel) -> dict[str, Tensor]:
    return mixed_inference.padded(batch.texts, model.device)


def static_options(session: Session, is_compiled: bool) -> dict[str, Any]:
    """Of `generate`, which compiles by itself on a GPU; on the CPU it is traced alone."""
    options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": not is_compiled}
    if is_compiled and not session.has_gpu:
        options["compile_config"] = CompileConfig(backend="eager")
        options["compile_config"]._compile_all_devices = True
    return options


def seconds_of(session: Session, generated: Callable[[int], Tensor], count: int) -> float:
    session.synchronize()
    start = time.perf_counter()
    generated(count)
    session.synchronize()
    return time.perf_counter() - start


def compiled_call(model: PreTrainedModel, session: Session) -> Callable[..., Any]:
    """The model, compiled into CUDA graphs when it is first called; on the CPU traced alone."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if not session.has_gpu:
        return torch.compile(model, backend="eager")
    compiled = torch.compile(model, mode="reduce-overhead")

    def call(**inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # what the graph gave before is no longer needed
        return compiled(**inputs)

    return call


def static_tokens(
    session: Session,
    model: PreTrainedModel,
    call: Callable[..., Any],
    batch: mixed_inference.Batch,
    more: dict[str, Any],
    count: int,
) -> tuple[list[float], Tensor]:
    """Seconds of each token that `call` makes behind the first pass of `model`, and the tokens."""
    inputs = inputs_of(batch, model)
    room = inputs["input_ids"].shape[1] + count
    cache = StaticCache(config=model.config, max_cache_len=room)
    out = model(**inputs, **more, past_key_values=cache, use_cache=True)
    # Ours takes the mask of the text alone, and widens it itself.
    _, done, tokens = next_tokens(session, call, out, inputs["attention_mask"], count, 0 if more else room)
    return done, tokens
