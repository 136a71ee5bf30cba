"""Each claim about a type, held against the bare model on each row alone, unpadded, with hard tokens."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from contextlib import redirect_stdout

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from lightning_softprompt import SoftPromptError, SoftPrompts, Tokens, attach
from tests import tiny
from tests.conformance import generation, models
from tests.conformance.outcome import ABSENT, CHECKS, EXACT, FAILED, INLINE, PREFIX, REFUSED, WITHIN, Mismatch, Outcome


def examine(model_type: str) -> Outcome:
    """Build the type and run every check."""
    outcome = Outcome(model_type)
    try:
        bare = models.build(model_type)
    except Exception as error:
        (why, *_) = [*filter(None, map(str.strip, str(error).replace(". ", "\n").splitlines())), type(error).__name__]
        outcome.reason = f"cannot be built here: {why[:100]}"
        return outcome
    outcome.model = type(bare).__name__
    model, shared = copy.deepcopy(bare), copy.deepcopy(bare)
    prompts: list[SoftPrompts] = []

    def attach_prompts() -> str:
        prompts.append(_attach(model, "never"))
        return EXACT

    if _run(outcome, CHECKS[0], attach_prompts) != EXACT:
        outcome.results = dict.fromkeys(CHECKS, outcome.results[CHECKS[0]])
        return outcome
    checks: dict[str, Callable[[], str]] = {
        "logits, right": lambda: _logits(bare, model, "right"),
        "logits, left": lambda: _logits(bare, model, "left"),
        "loss": lambda: _loss(bare, model),
        "gradients": lambda: _gradients(bare, model, prompts[0]),
        "generation, left": lambda: generation.padded(bare, model, "left"),
        "generation, right": lambda: generation.padded(bare, model, "right"),
        "no cache": lambda: generation.padded(bare, model, "left", use_cache=False),
        "static cache": lambda: generation.static_cache(bare, model),
        "threads": lambda: generation.in_threads(bare, model),
    }
    for name, check in checks.items():
        _run(outcome, name, check)
    try:
        prefixed = _attach(shared, "always")
    except SoftPromptError:
        outcome.results |= dict.fromkeys(PREFIX, INLINE)
        return outcome
    _run(outcome, PREFIX[0], lambda: _training(bare, shared, prefixed), refused=INLINE)
    _run(outcome, PREFIX[1], lambda: _serving(bare, shared), refused=INLINE)
    if outcome.results[PREFIX[1]] == INLINE:
        bare = models.build(model_type, windows_cut=False)
        shared = copy.deepcopy(bare)
        _attach(shared, "always")
        if _run(outcome, PREFIX[1], lambda: _serving(bare, shared), refused=INLINE) == EXACT:
            outcome.results[PREFIX[1]] = WITHIN
    return outcome


def _attach(model: PreTrainedModel, prefix: str) -> SoftPrompts:
    prompts = SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in tiny.HARD.items()})
    attach(model, prompts, prefix=prefix)
    return prompts


def _run(outcome: Outcome, name: str, check: Callable[[], str], refused: str = REFUSED) -> str:
    try:
        with redirect_stdout(io.StringIO()):  # Reformer prints
            result = check()
        outcome.note(name, result)
    except SoftPromptError as error:
        outcome.note(name, refused, str(error) if refused == REFUSED else "")
    except Mismatch as error:
        outcome.note(name, FAILED, f"{name}: {error}")
    except Exception as error:
        outcome.note(name, FAILED, f"{name}: {type(error).__name__}: {str(error)[:200]}")
    return outcome.results[name]


def _inputs(batch: tiny.Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "task_ids": batch.task_ids}


def _require(error: float, bound: float, what: str) -> None:
    if not error < bound:
        raise Mismatch(f"{what}, relative error {error:.1e}")


def _training(bare: PreTrainedModel, model: PreTrainedModel, prompts: SoftPrompts) -> str:
    """Of rows padded on the right, whose prompts stand in the cache."""
    _logits(bare, model, "right", with_gradients=True)
    if _has_usual_loss(bare):
        _loss(bare, model, ("right",))
    return _gradients(bare, model, prompts)


def _serving(bare: PreTrainedModel, model: PreTrainedModel) -> str:
    """Of rows padded on the left, whose pads stand between prompt and text."""
    _logits(bare, model, "left")
    return generation.padded(bare, model, "left")


def _logits(bare: PreTrainedModel, model: PreTrainedModel, side: str, with_gradients: bool = False) -> str:
    for seed in (0, 1):
        batch = tiny.random_batch(seed, side)
        with torch.set_grad_enabled(with_gradients):
            logits = model(**_inputs(batch)).logits.detach()
        for index, row in enumerate(batch.rows):
            found = logits[index, batch.start[index] : batch.start[index] + len(row.text)]
            error = tiny.relative_error(found, tiny.hard_row(bare, row))
            if 1e-5 <= error < 1e-4:
                # Rounding, if the bare model rounds alike when it pads the same rows.
                error = 0.0 if error < 10 * _rounding(bare, batch) else error
            _require(error, 1e-5, f"row {index}")
    return EXACT


def _rounding(bare: PreTrainedModel, batch: tiny.Batch) -> float:
    """The largest relative error of the bare model on its rows with hard tokens, padded on the right."""
    rows = [torch.tensor(row.prompt + row.text) for row in batch.rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        logits = bare(ids, attention_mask=mask).logits
    errors = []
    for index, row in enumerate(batch.rows):
        found = logits[index, len(row.prompt) : len(rows[index])]
        errors.append(tiny.relative_error(found, tiny.hard_row(bare, row)))
    return max(errors)


def _cross_entropy(bare: PreTrainedModel, row: tiny.Row) -> tuple[Tensor, int]:
    """Sum of the losses of the row's text, run alone, and how many tokens that are."""
    ids = torch.tensor([row.prompt + row.text])
    logits = bare(ids).logits[0]
    first = max(len(row.prompt), 1)
    return functional.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum"), len(ids[0]) - first


def _has_usual_loss(bare: PreTrainedModel) -> bool:
    """Whether the model's own loss is the shifted cross entropy; else it is the model's affair, and kept."""
    ids = torch.tensor([[5, 9, 30, 7, 22]])
    try:
        with torch.no_grad():
            out = bare(ids, labels=ids)
    except ValueError:  # GIT takes some columns for those of an image
        return False
    expected = functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    return bool(torch.isclose(out.loss, expected, rtol=1e-5))


def _loss(bare: PreTrainedModel, model: PreTrainedModel, sides: tuple[str, ...] = ("right", "left")) -> str:
    if not _has_usual_loss(bare):
        return "its own"
    for side in sides:
        batch = tiny.random_batch(2, side)
        with torch.no_grad():
            loss = float(model(**_inputs(batch), labels=batch.labels).loss)
            sums, counts = zip(*(_cross_entropy(bare, row) for row in batch.rows), strict=True)
        expected = float(sum(sums)) / sum(counts)
        _require(abs(loss - expected) / expected, 2e-6, f"padded on the {side}")
    return EXACT


def _gradients(bare: PreTrainedModel, model: PreTrainedModel, prompts: SoftPrompts) -> str:
    """Of a sum of cross entropies over logits, so that models with a loss of their own are held, too."""
    batch = tiny.random_batch(3, "right")
    try:
        of_rows = [_gradient_of_row(bare, row) for row in batch.rows]
    except (AssertionError, RuntimeError):
        return ABSENT  # the bare model has none outside of training: Reformer
    prompts.zero_grad()
    logits = model(**_inputs(batch)).logits
    total = logits.new_zeros(())
    for index, row in enumerate(batch.rows):
        text = torch.tensor(row.text)
        total = total + functional.cross_entropy(logits[index, : len(text) - 1], text[1:], reduction="sum")
    total.backward()
    expected = {task: torch.zeros_like(prompts[task]) for task in prompts.tasks}
    for row, gradient in zip(batch.rows, of_rows, strict=True):
        if row.task >= 0:
            expected[tiny.TASKS[row.task]] += gradient
    for task in prompts.tasks:
        found = prompts[task].grad
        assert found is not None
        _require(tiny.relative_error(found, expected[task]), 1e-4, f"task {task}")
    return EXACT


def _gradient_of_row(bare: PreTrainedModel, row: tiny.Row) -> Tensor:
    ids, leaves = torch.tensor([row.prompt + row.text]), []

    def make_leaf(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1] * 1  # CTRL and GIT write into their embeddings

    handle = bare.get_input_embeddings().register_forward_hook(make_leaf)
    # RWKV writes its state, where it keeps one, in place.
    options = {"use_cache": False} if "use_cache" in inspect.signature(bare.forward).parameters else {}
    try:
        logits = bare(ids, **options).logits[0, len(row.prompt) :]
    finally:
        handle.remove()
    text = torch.tensor(row.text)
    functional.cross_entropy(logits[:-1], text[1:], reduction="sum").backward()
    gradient = leaves[0].grad
    assert gradient is not None
    return gradient.reshape(ids.shape[1], -1)[: len(row.prompt)]
