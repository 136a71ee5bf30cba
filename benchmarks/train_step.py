"""A training step of a mixed batch against PEFT's, against a step without prompts, and against its floor.

    python benchmarks/train_step.py [--quick] [--device cpu|cuda] [--json PATH]

A step is the forward pass with labels on every text token, and the backward pass down to the prompts; gradients are
None before. All peers share the frozen weights of SmolLM2-135M in float32; on a GPU those of a random Llama of a
billion parameters, timed in bfloat16.

- ours: `attach(model, prompts)`; inline: the same with `prefix="never"`, every row with its prompt in the sequence.
- ours_loss_alone: ours with `logits="labels"`, which gives the loss and no logits, of which few exist at once.
- ours_packed, on a CPU: ours, and the base went through `pack_linear_layers`, as that of `fit` does.
- ours_in_parts: the same with `micro_batch_size=6`, so that of 16 rows 6 at most are under way.
- peft: PEFT has one active prompt a batch, so its user passes the rows of each task in turn (`set_adapter`, forward,
  backward), losses weighted so that they add up to the loss of the batch. Rows are grouped before the clock starts.
- peft_one_task: PEFT over all rows at once with one task's prompt. For several tasks that is not the step asked for; it
  is what PEFT would take if it could mix. vs_peft is the FASTER of the two over ours.
- no_prompt: the bare model on the same text, gradients going down to its embeddings.

vs_floor is ours over the time without prompts, scaled by the tokens that have to be computed: B·L of text and one
prompt of P for each of T tasks. Before anything is timed, losses and prompt gradients of ours, in all its ways, and
of peft are compared in float32; a row where they differ prints a failure, not a time. Differences told are
those of ours and inline, the worst task's. Memory is the peak of tensors beside the weights, in a call of its own. On
the CPU the C library keeps what is freed, for all peers, as GPUs' allocators do; without that, peers that hold more
wait more.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from measure import digits, keep_freed_memory, medians_in_turn, parse_options, peak_memory, progress, report
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_softprompt import SoftPrompts, pack_linear_layers

# Batch, text length, prompt length, tasks.
SIZES = [(16, 32, 20, 4), (16, 48, 100, 4), (32, 32, 20, 1), (8, 128, 20, 8)]
QUICK = 1
PART = 6  # rows
COMPARED = ("ours_in_parts", "ours_packed", "inline", "peft")  # with ours
BANKS = (8, 1000)  # tasks
SAME_LOSS, SAME_GRADIENT = 1e-5, 1e-4  # relative, in float32

Size = tuple[int, int, int, int]


@dataclass
class Peer:
    """One way to run the step: it gives the loss, and leaves gradients on the prompts."""

    run: Callable[[], Tensor]
    prompts: list[nn.Parameter]

    def __call__(self) -> Tensor:
        for prompt in self.prompts:
            prompt.grad = None
        return self.run()

    def loss_and_gradients(self) -> tuple[Tensor, list[Tensor]]:
        loss = self()
        gradients = []
        for prompt in self.prompts:
            assert prompt.grad is not None, "a prompt got no gradient"
            gradients.append(prompt.grad.clone())
        return loss, gradients


def peers_of(base: PreTrainedModel, size: Size, always: bool = False) -> dict[str, Peer]:
    """All peers on the same full rows of random ids, tasks in turn; with `always`, other ways of ours, too."""
    batch, text_length, prompt_length, tasks = size
    device, vocabulary = base.device, base.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, text_length), generator=generator).to(device)
    starts = torch.randint(vocabulary, (tasks, prompt_length), generator=generator).tolist()
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    task_ids = (torch.arange(batch) % tasks).to(device)
    steps = {
        "ours": _ours(base, starts, "auto", inputs, task_ids),
        "ours_loss_alone": _ours(base, starts, "auto", inputs, task_ids, "labels"),
        "ours_in_parts": _ours(base, starts, "auto", inputs, task_ids, "labels", micro_batch_size=PART),
        "inline": _ours(base, starts, "never", inputs, task_ids),
        "peft": _peft(base, starts, inputs, task_ids),
        "peft_one_task": _peft(base, starts[:1], inputs, torch.zeros_like(task_ids)),
        "no_prompt": _no_prompt(base, inputs),
    }
    if device.type == "cpu":
        steps["ours_packed"] = _ours(base, starts, "auto", inputs, task_ids, packed=True)
    if always:
        steps["always"] = _ours(base, starts, "always", inputs, task_ids)
        steps["inline_loss_alone"] = _ours(base, starts, "never", inputs, task_ids, "labels")
    return steps


def _ours(
    base: PreTrainedModel,
    starts: peers.Ids,
    prefix: str,
    inputs: dict[str, Tensor],
    task_ids: Tensor,
    logits: str = "all",
    packed: bool = False,
    **options: Any,
) -> Peer:
    model = peers.ours(base, starts, prefix, logits, **options)
    if packed:
        pack_linear_layers(model)

    def run() -> Tensor:
        loss = model(**inputs, task_ids=task_ids).loss
        loss.backward()
        return loss.detach()

    return Peer(run, list(model.soft_prompts.parameters()))


def _peft(base: PreTrainedModel, starts: peers.Ids, inputs: dict[str, Tensor], task_ids: Tensor) -> Peer:
    model = peers.peft(base, starts)
    rows_of_tasks = peers.rows_of_tasks(task_ids)
    whole = len(rows_of_tasks) == 1
    groups = {
        task: inputs if whole else {name: value[rows] for name, value in inputs.items()}
        for task, rows in rows_of_tasks.items()
    }
    # Behind a prompt every labelled token counts, the first of a row, too.
    total = int((inputs["labels"] != -100).sum())
    weights = {task: int((group["labels"] != -100).sum()) / total for task, group in groups.items()}

    def run() -> Tensor:
        losses = []
        for task, group in groups.items():
            model.set_adapter(f"task{task}")
            loss = model(**group).loss * weights[task]
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    return Peer(run, [peers.peft_prompt(model, task) for task in range(len(starts))])


def _no_prompt(base: PreTrainedModel, inputs: dict[str, Tensor]) -> Peer:
    model = peers.twin(base)
    model.enable_input_require_grads()  # the embeddings' output: the backward pass goes through every layer

    def run() -> Tensor:
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    return Peer(run, [])


def differences(mine: Peer, theirs: Peer) -> tuple[float, float]:
    """Relative differences of the losses, and of the gradients of the task that differs most."""
    loss, gradients = mine.loss_and_gradients()
    their_loss, their_gradients = theirs.loss_and_gradients()
    pairs = zip(gradients, their_gradients, strict=True)
    worst = max(float((one - other).norm() / other.norm()) for one, other in pairs)
    return float((loss - their_loss).abs() / their_loss.abs()), worst


def compare(steps: dict[str, Peer]) -> tuple[dict[str, float], str]:
    """Differences of ours and inline, and why the results are not the same: empty where they are."""
    found = {name: differences(steps["ours"], steps[name]) for name in steps if name in COMPARED}
    failures = [
        f"{name}: loss {loss:.1e}, gradient {gradient:.1e}"
        for name, (loss, gradient) in found.items()
        if not (loss <= SAME_LOSS and gradient <= SAME_GRADIENT)  # a nan is a failure
    ]
    loss, gradient = (float(f"{value:.1e}") for value in found["inline"])
    return {"loss_difference": loss, "gradient_difference": gradient}, "; ".join(failures)


def measure(size: Size, base: PreTrainedModel, device: str, exact: PreTrainedModel | None = None) -> dict[str, Any]:
    """One row: `base` is timed; results are compared on `exact`, the same model in float32, None if `base` is that."""
    row: dict[str, Any] = dict(zip(("batch", "text_length", "prompt_length", "tasks"), size, strict=True))
    steps = peers_of(base, size)
    difference, failure = compare(steps if exact is None else peers_of(exact, size))
    if failure:
        return {**row, "ours_s": f"FAILED: ours differs from {failure}"}
    seconds = medians_in_turn(steps, device)
    row |= {f"{name}_s": digits(value) for name, value in seconds.items()}
    batch, text_length, prompt_length, tasks = size
    floor = seconds["no_prompt"] * (1 + tasks * prompt_length / (batch * text_length))
    row["vs_peft"] = digits(min(seconds["peft"], seconds["peft_one_task"]) / seconds["ours"])
    row["vs_no_prompt"] = digits(seconds["ours"] / seconds["no_prompt"])
    row["vs_floor"] = digits(seconds["ours"] / floor)
    row |= difference
    return row | {f"{name}_MB": round(peak_memory(step, device) / 1e6) for name, step in steps.items()}


def bank_of_tasks(base: PreTrainedModel, device: str) -> list[dict[str, Any]]:
    """A whole training step, the optimizer's included, of the first size's rows, beside few tasks and beside many."""
    batch, text_length, prompt_length, tasks = SIZES[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (batch, text_length), generator=generator).to(base.device)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    inputs["task_ids"] = (torch.arange(batch) % tasks).to(base.device)

    def step_of(model: PreTrainedModel) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.soft_prompts.parameters(), lr=1e-3)

        def step() -> None:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    table = []
    steps, stored = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for count in BANKS:
            starts = torch.randint(base.config.vocab_size, (count, prompt_length), generator=generator).tolist()
            model = peers.ours(base, starts, "auto")
            steps[str(count)] = step_of(model)
            place = Path(folder) / str(count)
            save = functools.partial(model.soft_prompts.save_pretrained, place)
            save()
            stored[count] = {"save": save, "load": functools.partial(SoftPrompts.from_pretrained, place)}
        seconds = medians_in_turn(steps, device)
        for count in BANKS:
            times = medians_in_turn(stored[count], "cpu")
            row = {"tasks": count, "step_s": seconds[str(count)], "save_s": times["save"], "load_s": times["load"]}
            table.append({name: digits(value) for name, value in row.items()})
    return table


def main() -> None:
    options = parse_options(__doc__.splitlines()[0])
    # transformers 5.23 warns of a name that PEFT 0.21.2 reads.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    keep_freed_memory(True)
    exact, _ = peers.load_base(options.device)
    base = peers.to_time(exact, options.device)
    rows = []
    for size in SIZES[:QUICK] if options.quick else SIZES:
        progress.print("batch {}, text {}, prompt {}, tasks {}".format(*size))
        rows.append(measure(size, base, options.device, None if base is exact else exact))
    parameters = sum(parameter.numel() for parameter in base.parameters()) / 1e6
    title = f"A training step, {parameters:.0f} M parameters, {str(base.dtype).removeprefix('torch.')}"
    progress.print("banks of {} and {} tasks".format(*BANKS))
    banks = "Banks of tasks: a step of 16 rows of 4 tasks with AdamW, and the file of all"
    report(title, {"Steps": rows, banks: bank_of_tasks(base, options.device)}, options)


if __name__ == "__main__":
    main()
