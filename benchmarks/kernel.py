"""The prompt concatenation against PEFT, eager torch and torch.compile: time, launches, memory, and bytes a second.

    python benchmarks/kernel.py [--quick] [--device cpu|cuda] [--json PATH]

Every peer gets the same ids, mask and labels, and gives embeddings, mask and labels; ours and the eager peers also give
positions, and ours checks its arguments. PEFT is its own forward around a base that does nothing. Rows of one task it
lays out at once; for rows of several tasks it is called once a task, as its users have to; rows padded on the left it
lays out otherwise, and is left out. On the CPU, ours is the path in plain torch. Where a result differs, a failure is
printed, not a time. What torch.compile launches and holds is told on a GPU alone.
"""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from measure import (
    LiveMemory,
    copy_bandwidth,
    keep_freed_memory,
    medians_in_turn,
    parse_options,
    peak_memory,
    progress,
    report,
)
from peft import PromptTuningConfig, TaskType, get_peft_model
from softprompt_kernels import concat, prompt_concat, triton_concat, triton_gradients
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

# Batch, length, hidden, virtual tokens, tasks, padding side: from bound by launches to bound by memory.
SIZES = [
    (1, 16, 576, 8, 1, "right"),
    (8, 16, 576, 8, 1, "right"),
    (8, 16, 576, 20, 8, "right"),
    (16, 128, 576, 20, 1, "right"),
    (16, 128, 576, 20, 4, "right"),
    (16, 128, 576, 20, 4, "left"),
    (32, 512, 2048, 20, 1, "right"),
    (32, 512, 2048, 100, 16, "right"),
    (32, 512, 2048, 100, 16, "left"),
    (64, 2048, 4096, 8, 1, "right"),
    (64, 2048, 4096, 100, 64, "right"),
]
QUICK = 6

Outputs = dict[str, Tensor]


@dataclass
class Batch:
    """One size: padded rows of distinct ids, of tasks whose prompts are `longest` to half as long."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    table: Tensor
    prompts: Tensor
    offsets: Tensor
    task_ids: Tensor
    longest: int
    side: str

    @classmethod
    def of(cls, size: tuple[Any, ...], dtype: torch.dtype, device: str) -> Batch:
        batch, length, hidden, longest, tasks, side = size
        generator = torch.Generator().manual_seed(0)
        lengths = [longest - task * longest // (2 * tasks) for task in range(tasks)]
        kept = length - torch.arange(batch) * length // (2 * batch)
        mask = (torch.arange(length) < kept[:, None]).long()
        if side == "left":
            mask = mask.flip(1)
        # As many ids as tokens, so that a cache does not serve one row of the table twice.
        vocabulary = max(1024, batch * length)
        ids = torch.randperm(vocabulary, generator=generator)[: batch * length].reshape(batch, length)
        return cls(
            ids=ids.to(device),
            mask=mask.to(device),
            labels=ids.masked_fill(mask == 0, -100).to(device),
            table=torch.randn(vocabulary, hidden, device=device, dtype=dtype),
            prompts=torch.randn(sum(lengths), hidden, device=device).requires_grad_(),
            offsets=torch.tensor([0, *lengths]).cumsum(0).to(device),
            task_ids=(torch.arange(batch) % tasks).to(device),
            longest=longest,
            side=side,
        )


def ours(batch: Batch) -> Outputs:
    out = prompt_concat(
        batch.table, batch.ids, batch.prompts, batch.offsets, batch.task_ids, batch.mask, batch.labels,
        padding_side=batch.side, max_prompt_length=batch.longest,
    )  # fmt: skip
    return out._asdict()


def eager_mixed(batch: Batch) -> Outputs:
    """As one writes it without a kernel: gather prompts, concatenate, and select each row's columns from that."""
    rows, longest = len(batch.ids), batch.longest
    begin = batch.offsets[batch.task_ids]
    lengths = (batch.offsets[batch.task_ids + 1] - begin)[:, None]
    column = torch.arange(longest + batch.ids.shape[1], device=begin.device)
    # The column of `prompt of full length | text` that stands in each column of the layout.
    if batch.side == "right":
        source = torch.where(column < lengths, column, column + longest - lengths)
        is_pad = source >= len(column)
    else:
        text = longest + ((batch.mask != 0).cumsum(1) == 0).sum(1, keepdim=True)
        source = torch.where(column < text, column - text + lengths, column)
        is_pad = source < 0
    source = source.masked_fill(is_pad, 0)
    place = torch.arange(longest, device=begin.device)
    prompts = batch.prompts[(begin[:, None] + place).clamp(max=len(batch.prompts) - 1)].to(batch.table.dtype)
    wide = torch.cat([prompts, functional.embedding(batch.ids, batch.table)], 1)
    flat = (source + torch.arange(rows, device=begin.device)[:, None] * wide.shape[1]).flatten()
    embeds = wide.flatten(0, 1).index_select(0, flat).view(wide.shape).masked_fill(is_pad[:, :, None], 0)
    mask = functional.pad(batch.mask, (longest, 0), value=1).gather(1, source).masked_fill(is_pad, 0)
    labels = functional.pad(batch.labels, (longest, 0), value=-100).gather(1, source).masked_fill(is_pad, -100)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return dict(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, labels=labels)


class EmbeddingAlone(LlamaForCausalLM):
    """A base whose forward gives back what it was called with: what is left is PEFT."""

    def forward(self, **arguments: Any) -> Outputs:
        return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


class Peft:
    """PEFT's own forward of a prompt-tuned causal LM, with an adapter for each task."""

    def __init__(self, batch: Batch) -> None:
        vocabulary, hidden = batch.table.shape
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=0, intermediate_size=64,
            num_attention_heads=hidden // 64, num_key_value_heads=1, tie_word_embeddings=True,
        )  # fmt: skip
        with torch.device("meta"):
            base = EmbeddingAlone(config)
        base.get_input_embeddings().weight = torch.nn.Parameter(batch.table, requires_grad=False)
        base.tie_weights()
        bounds = batch.offsets.tolist()
        for task, (begin, end) in enumerate(itertools.pairwise(bounds)):
            settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=end - begin)
            if task == 0:
                self.model = get_peft_model(base, settings, "0")
            else:
                self.model.add_adapter(str(task), settings)
            prompt = self.model.prompt_encoder[str(task)].embedding.weight
            prompt.data = batch.prompts.detach()[begin:end].clone()
            self.model.prompt_tokens[str(task)] = torch.arange(end - begin)
        self.rows = [(batch.task_ids == task).nonzero()[:, 0] for task in range(len(bounds) - 1)]
        self.batch = batch

    def __call__(self) -> list[Outputs]:
        batch = self.batch
        if len(self.rows) == 1:
            return [self.model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels)]
        outputs = []
        for task, rows in enumerate(self.rows):
            if not len(rows):
                continue
            self.model.set_adapter(str(task))
            ids, mask, labels = batch.ids[rows], batch.mask[rows], batch.labels[rows]
            outputs.append(self.model(input_ids=ids, attention_mask=mask, labels=labels))
        return outputs

    def operations(self) -> Outputs:
        """The same operations for one task, without PEFT's Python around them."""
        batch = self.batch
        rows, length = batch.ids.shape[0], batch.longest
        prompt = self.model.prompt_encoder["0"].embedding.weight
        tokens = self.model.prompt_tokens["0"].unsqueeze(0).expand(rows, -1).to(prompt.device)
        ones = torch.ones(rows, length).to(batch.mask.device)
        ignored = torch.full((rows, length), -100).to(batch.labels.device)
        embeds = functional.embedding(batch.ids, batch.table)
        prompts = functional.embedding(tokens, prompt).to(embeds.dtype)
        return dict(
            inputs_embeds=torch.cat((prompts, embeds), 1),
            attention_mask=torch.cat((ones, batch.mask), 1),
            labels=torch.cat((ignored, batch.labels), 1),
        )

    def agrees_with(self, mine: Outputs) -> bool:
        """Whether each task's rows are what PEFT gives for them; behind a shorter prompt's text we have pads."""
        for rows, theirs in zip([rows for rows in self.rows if len(rows)], self(), strict=True):
            width = theirs["labels"].shape[1]
            for name in ("inputs_embeds", "attention_mask", "labels"):
                if not torch.equal(mine[name][rows, :width], theirs[name].to(mine[name].dtype)):
                    return False
        return True


def minimal_bytes(batch: Batch) -> int:
    """What a forward pass has to read and write: text, prompts of the batch's tasks, integers; and the output."""
    rows, length = batch.ids.shape
    hidden, size = batch.table.shape[1], batch.table.element_size()
    bounds = batch.offsets.tolist()
    active = sum(bounds[task + 1] - bounds[task] for task in set(batch.task_ids.tolist()))
    columns = rows * (batch.longest + length)
    return rows * length * (hidden * size + 24) + active * hidden * 4 + columns * (hidden * size + 24)


def launches_and_memory(call: Callable[[], Any], device: str) -> tuple[int, int]:
    """On a GPU, kernels and memory copies launched, and peak bytes; on the CPU, operators and peak bytes."""
    gc.collect()
    if device == "cpu":
        with LiveMemory() as memory:
            result = call()
        del result
        return memory.operators, memory.peak
    peak = peak_memory(call, device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events()), peak


def with_backward(call: Callable[[], Any], gradients: dict[torch.Size, Tensor]) -> Callable[[], None]:
    """Forward, and backward of a gradient that is there already, as a model hands it back."""

    def run() -> None:
        results = call()
        for result in results if isinstance(results, list) else [results]:
            embeds = result["inputs_embeds"]
            if embeds.shape not in gradients:
                gradients[embeds.shape] = torch.ones_like(embeds)
            embeds.backward(gradients[embeds.shape])

    return run


def measure(size: tuple[Any, ...], dtype: torch.dtype, device: str, bandwidth: float) -> list[dict[str, Any]]:
    batch = Batch.of(size, dtype, device)
    compiled = torch.compile(eager_mixed, dynamic=False)
    calls: dict[str, Callable[[], Any]] = {
        "prompt_concat": lambda: ours(batch),
        "eager, mixed": lambda: eager_mixed(batch),
        "torch.compile of it": lambda: compiled(batch),
    }
    mine = ours(batch)
    agrees = {}
    if batch.side == "right":
        calls["PEFT"] = peft = Peft(batch)
        agrees["PEFT"] = peft.agrees_with(mine)
        if size[4] == 1:
            calls["PEFT's operations alone"] = peft.operations
    for name, call in calls.items():
        if name not in agrees:
            theirs = call()
            agrees[name] = all(torch.equal(mine[key], theirs[key].to(mine[key].dtype)) for key in theirs)
            del theirs
    del mine
    timed = {name: call for name, call in calls.items() if agrees[name]}
    seconds = medians_in_turn(timed, device)
    gradients: dict[torch.Size, Tensor] = {}
    both = medians_in_turn({name: with_backward(call, gradients) for name, call in timed.items()}, device)
    gradients.clear()
    rows = []
    for name in calls:
        row: dict[str, Any] = dict(zip(("B", "L", "H", "P", "tasks", "pads"), size, strict=True))
        row["what"] = name
        if not agrees[name]:
            rows.append({**row, "forward, us": "FAILED: another result"})
            continue
        per_second = minimal_bytes(batch) / seconds[name]
        row["forward, us"] = f"{seconds[name] * 1e6:.0f}"
        row["vs ours"] = f"{seconds[name] / seconds['prompt_concat']:.2f}x"
        row["with backward, us"] = f"{both[name] * 1e6:.0f}"
        row["vs ours "] = f"{both[name] / both['prompt_concat']:.2f}x"
        if device == "cuda" or not name.startswith("torch.compile"):
            launches, peak = launches_and_memory(calls[name], device)
            row["launches" if device == "cuda" else "operators"] = launches
            row["peak, MB"] = f"{peak / 1e6:.1f}"
        row["needed, MB"] = f"{minimal_bytes(batch) / 1e6:.1f}"
        row["needed GB/s"] = f"{per_second / 1e9:.1f}"
        row["of a copy"] = f"{100 * per_second / bandwidth:.0f} %"
        rows.append(row)
    return rows


def share_of_a_step(dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    """How much of a training step the op is, forward and backward: measured for 135 M parameters, counted for 8 B."""
    batch, length, longest = 8, 128, 20
    small = Batch.of((batch, length, 576, longest, 4, "right"), dtype, device)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype).requires_grad_(False)
    small.table = model.get_input_embeddings().weight
    op = with_backward(lambda: ours(small), {})
    measured = medians_in_turn({"step": lambda: model(**ours(small)).loss.backward(), "op": op}, device)

    large = Batch.of((batch, length, 4096, longest, 4, "right"), dtype, device)
    side = 2048 if device == "cpu" else 8192
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    op = with_backward(lambda: ours(large), {})
    counted = medians_in_turn({"op": op, "product": lambda: left @ right}, device)
    # Forward, and backward through frozen weights: four operations a weight and token, as fast as a matrix product.
    counted["step"] = 4 * 8e9 * batch * (length + longest) * counted["product"] / (2 * side**3)
    rows = []
    for name, seconds in (("135 M, measured", measured), ("8 B, counted: at most", counted)):
        share = f"{100 * seconds['op'] / seconds['step']:.3f} %"
        times = {"op, ms": f"{seconds['op'] * 1e3:.3f}", "step, ms": f"{seconds['step'] * 1e3:.0f}"}
        rows.append({f"step of {batch} rows of {longest} + {length}": name, **times, "share": share})
    return rows


def host_of_a_call() -> list[dict[str, Any]]:
    """What the host does for a call with gradients, without its launches; and for its operator in place of it."""
    batch = Batch.of((16, 16, 64, 8, 4, "right"), torch.float32, "cpu")
    arguments = (
        batch.table, batch.ids, batch.prompts, batch.offsets, batch.task_ids, batch.mask, batch.labels, False,
        batch.longest, "padding",
    )  # fmt: skip
    gradient = torch.ones(16, 16 + batch.longest, 64)

    def outputs(table: Tensor, ids: Tensor, *others: Any) -> tuple[Tensor, ...]:
        return tuple(triton_concat.outputs(table, ids, *others[3:5], batch.longest, "padding"))

    def with_gradient(call: Callable[..., tuple[Tensor, ...]]) -> None:
        call(*arguments)[0].backward(gradient)
        batch.prompts.grad = None

    kinds = {"prompt_concat": concat._Concat.apply, "its operator": concat._concat}
    calls: dict[str, Callable[[], Any]] = {name: partial(kind, *arguments) for name, kind in kinds.items()}
    calls |= {f"{name}, backward": partial(with_gradient, kind) for name, kind in kinds.items()}
    with (
        patch.object(concat, "_check_triton_runs"),
        patch.object(triton_concat, "concat", outputs),
        patch.object(triton_gradients, "prompt_gradient", lambda *_: torch.empty_like(batch.prompts)),
    ):
        seconds = medians_in_turn(calls, "cpu", repeats=25)
    us = {name: f"{each * 1e6:.1f}" for name, each in seconds.items()}
    return [{"what": name, "forward, us": us[name], "with backward, us": us[f"{name}, backward"]} for name in kinds]


def main() -> None:
    options = parse_options(__doc__.splitlines()[0])
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    # transformers 5.23 warns of a name that PEFT 0.21.2 reads.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    keep_freed_memory(True)
    bandwidth = copy_bandwidth(options.device)
    rows = []
    for size in SIZES[:QUICK] if options.quick else SIZES:
        progress.print("batch {}, length {}, hidden {}, prompts {}, tasks {}, pads {}".format(*size))
        keep_freed_memory(size[0] * size[1] * size[2] < 2**28)
        rows += measure(size, dtype, options.device, bandwidth)
        torch._dynamo.reset()
    title = f"prompt_concat, {str(dtype).removeprefix('torch.')}, copies run at {bandwidth / 1e9:.1f} GB/s"
    tables = {"The op": rows, "Its share of a training step": share_of_a_step(dtype, options.device)}
    if options.device == "cpu":  # for a GPU, gpu.py measures the host with its launches
        tables["The host in a call with gradients, launches left out"] = host_of_a_call()
    report(title, tables, options)


if __name__ == "__main__":
    main()
