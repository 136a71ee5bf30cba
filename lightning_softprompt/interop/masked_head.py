"""A head that never gives a virtual token: its new rows point away from every state of the model.

The states that a head reads have a direction in common. A row against it has a logit far below those of the
vocabulary wherever the model stands, so that no engine needs a bias of logits. How far is measured on texts and
ids that the direction was not made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_softprompt.base.special_ids import special_ids
from lightning_softprompt.base.tokens import encode_text
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.interop.probe_texts import FITTED, HELD_OUT
from lightning_softprompt.interop.virtual_rows import VirtualRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# At temperature 2 a token that stands 30 below the best one comes once in three million draws.
SMALLEST_GAP = 30.0
_LOGIT = -1000.0
_RIDGE = 1e-3
_LONGEST = 64
_FITTED_TASKS = 16
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")


def probe_rows(model: PreTrainedModel, tokenizer: Any, rows: VirtualRows, held_out: bool) -> list[list[int]]:
    """Ids to read states from: texts of many kinds, random ids, and each task's virtual tokens with a text behind.

    Args:
        model: the model, with the virtual tokens appended.
        tokenizer: the base's tokenizer.
        rows: where the virtual tokens stand.
        held_out: which of two sets of texts and seeds; they share no text. The one that is held out has all tasks, the
            other one at most 16.
    """
    texts = [encode_text(tokenizer, text) for text in (HELD_OUT if held_out else FITTED)]
    texts = [[id for id in ids if id < rows.known][:_LONGEST] for ids in texts]
    texts = [ids for ids in texts if ids]
    draw = torch.Generator("cpu").manual_seed(int(held_out))
    special = special_ids(model, tokenizer)
    known = range(min(rows.known, len(tokenizer)))
    usual = [id for id in known if id not in special] or [*known]
    for length, count in ((1, 64), (_LONGEST, 6)):
        chosen = torch.randint(len(usual), (count, length), generator=draw, device="cpu")
        texts += [[usual[place] for place in row] for row in chosen.tolist()]
    tasks = [*rows.ids.values()][: None if held_out else _FITTED_TASKS]
    texts += [[*ids, *texts[number % len(texts)]] for number, ids in enumerate(tasks)]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(map(len, texts))
    return [ids[:longest] for ids in texts]


def mask_head(model: PreTrainedModel, tokenizer: Any, rows: VirtualRows) -> None:
    """Give the head's rows from `rows.first` on, which must be zeros, logits of about -1000 wherever the model stands.

    A head with a bias gets -1000 there. Another one gets the row `-1000 d`, where `d` is the ridge solution of
    `states @ d = 1` over the states of the texts that are not held out.

    Args:
        model: the model, with the virtual tokens appended.
        tokenizer: the base's tokenizer.
        rows: where the virtual tokens stand.
    """
    head = model.get_output_embeddings()
    with torch.no_grad():
        if head.bias is not None:
            head.bias[rows.first :] = _LOGIT
            return
        width = head.weight.shape[1]
        exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        square, total = torch.zeros(width, width, **exact), torch.zeros(width, **exact)
        for states in _states(model, probe_rows(model, tokenizer, rows, held_out=False)):
            square, total = square + states.T @ states, total + states.sum(0)
        ridge = _RIDGE * square.diagonal().mean() * torch.eye(width, **exact)
        direction = torch.linalg.solve(square + ridge, total)
        head.weight[rows.first :] = (_LOGIT * direction).to(head.weight)


def measure_gap(model: PreTrainedModel, tokenizer: Any, rows: VirtualRows) -> float:
    """How far the best logit of a real token stands above every virtual one on held-out texts, where it is nearest.

    Raises:
        SoftPromptError: a gap below 30.
    """
    gap, first = float("inf"), rows.first
    with torch.no_grad():
        for ids in _of_equal_length(probe_rows(model, tokenizer, rows, held_out=True)):
            logits = model(ids.to(model.device)).logits.float()
            gap = min(gap, float((logits[..., :first].amax(-1) - logits[..., first:].amax(-1)).min()))
    if gap >= SMALLEST_GAP:
        return gap
    config = model.config.get_text_config()
    caps = [f"{name}={getattr(config, name)}" for name in _CAPS if getattr(config, name, None)]
    why = f"the model caps its logits ({', '.join(caps)})" if caps else "its states have no direction in common"
    raise SoftPromptError(
        f"{type(model).__name__} could give virtual tokens as text: on held-out texts the best logit stands "
        f"{gap:.1f} above those of virtual tokens, and at least {SMALLEST_GAP:.0f} is needed, as {why}. Serve these "
        "prompts with MixedTaskGenerator or `lightning-softprompt generate`"
    )


def _states(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """What the head reads at every position of each text: float64 `[length, hidden]`."""
    found: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, given: found.append(given[0]))
    try:
        for ids in _of_equal_length(texts):
            model(ids.to(model.device))
            yield from (states.detach().flatten(0, -2).double().cpu() for states in found)
            found.clear()
    finally:
        hook.remove()


def _of_equal_length(texts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """The texts as batches without pads: int64 `[batch, length]`."""
    for length in sorted({len(ids) for ids in texts}):
        yield torch.tensor([ids for ids in texts if len(ids) == length], device="cpu")
