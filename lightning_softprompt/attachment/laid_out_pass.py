"""A forward pass whose rows have prompts: what goes in with them, and what comes out without them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from lightning_softprompt.attachment import caches, masks
from lightning_softprompt.attachment.call import TYPES_OF_TOKENS, Call
from lightning_softprompt.attachment.forward_pass import ForwardPass
from lightning_softprompt.attachment.layout import Layout, check_gaps, lay_out, lay_out_positions, lay_out_types
from lightning_softprompt.attachment.loss import LogitsChoice, Scoring
from lightning_softprompt.attachment.prefix import Prefix
from lightning_softprompt.attachment.routing import TaskRows
from lightning_softprompt.base.model_types import (
    NO_BACKWARD,
    NO_CACHE_IN_TRAINING,
    NO_CONTINUATION,
    OWN_LOOK_UP,
    reason,
)
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError


class LaidOutPass(ForwardPass):
    """The arguments of a call, brought from the text's columns to the laid-out ones, and its outputs, brought back.

    Args:
        traits: of the model.
        call: what was given.
        cache: the cache among it, or a new one, or None.
        layout: the layout of the columns the model sees.
    """

    layout: Layout

    def __init__(self, traits: ModelTraits, call: Call, cache: Any, layout: Layout) -> None:
        super().__init__(traits, call.arguments, cache, layout)
        self._inserts = False
        self._logits_are_selected = False
        self._selected: Tensor | None = None
        self._drops_cache = False

    @classmethod
    def inserting(
        cls,
        traits: ModelTraits,
        call: Call,
        packed: Tensor,
        rows: TaskRows,
        logits: LogitsChoice,
    ) -> LaidOutPass:
        """A pass over rows that get their prompts now, out of the `packed` ones of the active tasks."""
        text = traits.model.get_input_embeddings()(call.text) if call.has_ids else call.text
        out, layout = lay_out(traits, packed, rows, text, call.mask, call.labels)
        this = cls(traits, call, call.cache, layout)
        this._inserts = True
        if call.has_ids:
            this.arguments["input_ids"] = layout.insert(call.text, traits.placeholder)
            this.embeds = out.inputs_embeds
            if reason(OWN_LOOK_UP, traits.model.config):
                this.keeps = layout.insert(torch.ones_like(call.text), 0).bool()
        else:
            this.arguments["inputs_embeds"] = out.inputs_embeds
        positions = call.positions
        if positions is not None:
            positions = lay_out_positions(traits, layout, positions, out.position_ids)
        elif traits.takes_positions:
            positions = out.position_ids + traits.position_offset
        this._set_mask_and_positions(out.attention_mask, positions)
        for name in TYPES_OF_TOKENS:
            if call.arguments.get(name) is not None:
                this.arguments[name] = lay_out_types(layout, call.arguments[name])
        if torch.is_grad_enabled() and reason(NO_CACHE_IN_TRAINING, traits.model.config):
            this.arguments["use_cache"] = False
        if out.labels is not None:
            this.arguments["labels"] = out.labels
            this._score(Scoring.inline(traits, call.arguments, out.labels, logits))
        this._select_logits()
        return this

    @classmethod
    def behind_prefix(
        cls,
        traits: ModelTraits,
        call: Call,
        cache: Cache,
        prefix: Prefix,
        rows: TaskRows,
        logits: LogitsChoice,
    ) -> LaidOutPass:
        """A pass over rows whose prompts go into the cache now, as keys and values.

        Args:
            traits: of the model.
            call: what was given.
            cache: an empty one.
            prefix: of the active tasks.
            rows: whose task is which.
            logits: "all" or "labels".
        """
        layout = prefix.layout(rows, call.text.device)
        # A prefix stands in a cache, also where the call or the configuration turns caching off, as people do to train.
        wanted = call.arguments.get("use_cache")
        this = cls.continuing(traits, call, cache, layout, logits)
        this._drops_cache = not (getattr(traits.model.config, "use_cache", True) if wanted is None else wanted)
        caches.put(this.arguments, traits, cache)
        prefix.fill(cache, rows)  # once nothing of the call can be refused any more
        if "use_cache" in traits.arguments:
            this.arguments["use_cache"] = True
        if call.labels is not None:
            # A row without a prompt gets any row of logits, as its first token has no target.
            after = prefix.logits.index_select(0, rows.on(prefix.logits.device).places.clamp(min=0))
            this._score(Scoring.behind_prefix(traits, call.arguments, call.labels, this.layout, after, logits))
        return this

    @classmethod
    def continuing(
        cls, traits: ModelTraits, call: Call, cache: Any, layout: Layout, logits: LogitsChoice
    ) -> LaidOutPass:
        """A pass over new columns of text, behind a cache that holds the prompts, or is to hold them."""
        new, mask = call.text.shape[1], call.mask
        held = _held_columns(traits, call, cache, layout)
        columns = held + new
        laid_out = layout.continued_mask(mask, columns, held)
        if mask is not None:
            check_gaps(traits, laid_out)
        if not layout.seen:
            # This is the first text behind a prefix, so the layout of both is known now.
            layout = replace(layout, attention_mask=laid_out, text_length=columns)
        this = cls(traits, call, cache, replace(layout, seen=columns))
        positions = call.positions
        if positions is not None:
            positions = positions + layout.prompt_lengths[:, None]
        elif traits.takes_positions:
            positions = ((laid_out != 0).cumsum(1)[:, -new:] - 1).clamp(min=0) + traits.position_offset
        this._set_mask_and_positions(laid_out, positions)
        keep = this.arguments.get("logits_to_keep")
        if isinstance(keep, int) and 0 < keep < new:
            this.arguments["logits_to_keep"] = _last_columns(keep, new, laid_out.device)
        if mask is None and bool((laid_out != 0).all()):
            # None was given and none is needed. Mamba would take it for a mask of its new columns.
            this.arguments.pop("attention_mask", None)
        if layout.seen and (made := masks.of_step(traits.model, cache, laid_out, call.text, positions)) is not None:
            this.arguments["attention_mask"] = made
        if layout.seen and call.labels is not None:
            this._score(Scoring.inline(traits, call.arguments, call.labels, logits))
        return this

    def finish(self, output: Any) -> Any:
        """Bring outputs back to the text's columns.

        Raises:
            SoftPromptError: a model that has not read the prompts, or puts out other columns than it was given.
        """
        if self.embeds is not None:
            raise SoftPromptError(
                f"{type(self.traits.model).__name__} does not look its ids up in get_input_embeddings(), so a soft "
                "prompt cannot stand in front of its rows"
            )
        trains = output.logits is not None and output.logits.requires_grad
        if trains and (why := reason(NO_BACKWARD, self.traits.model.config)):
            output.logits.register_hook(partial(_refuse_backward, type(self.traits.model).__name__, why))
        return super().finish(output)

    def _found(self, output: Any) -> dict[str, Any]:
        found = self._extracted(output) if self._inserts else {}
        found |= super()._found(output)
        if self._drops_cache:
            found[self.traits.cache_argument] = None
        return found

    def _set_mask_and_positions(self, mask: Tensor, positions: Tensor | None) -> None:
        if "attention_mask" in self.traits.arguments:
            self.arguments["attention_mask"] = masks.widened(self.cache, mask) if self.traits.cache_argument else mask
        if positions is not None:
            self.arguments["position_ids"] = positions
        self._check_length(mask.shape[1])

    def _check_length(self, columns: int) -> None:
        """Raise a `SoftPromptError` for a row that is longer than the model's table of positions."""
        positions, table = self.arguments.get("position_ids"), self.traits.positions
        if table is None or columns + self.traits.position_offset <= table:
            return  # as nearly always: no reason to wait for the device
        longest = columns if positions is None else int(positions.max()) + 1
        if longest > table:
            raise SoftPromptError(
                f"a row has {longest - self.traits.position_offset} tokens, its prompt's {self.layout.extra} at most "
                f"included, and {type(self.traits.model).__name__} has {table - self.traits.position_offset} "
                "positions; shorten the texts (max_length) or the prompt"
            )

    def _select_logits(self) -> None:
        """Translate `logits_to_keep` to the laid-out columns, or apply it to the outputs where the model cannot."""
        keep, length = self.arguments.get("logits_to_keep"), self.layout.text_length
        if keep is None or (isinstance(keep, int) and keep == 0):
            return
        if isinstance(keep, int):
            keep = _last_columns(keep, length, self.layout.attention_mask.device)
        elif keep.dtype == torch.bool:
            keep = keep.nonzero()[:, 0]
        keep = torch.where(keep < 0, keep + length, keep)
        if self.layout.is_left and "logits_to_keep" in self.traits.arguments:
            self._logits_are_selected = True
            self.arguments["logits_to_keep"] = keep + self.layout.extra
        else:
            self._selected = keep
            del self.arguments["logits_to_keep"]

    def _extracted(self, output: Any) -> dict[str, Any]:
        """The outputs that have columns, at the text's columns, by name."""
        found: dict[str, Any] = {}
        if output.logits is not None and not self._logits_are_selected and self.scored is None:
            columns, width = output.logits.shape[1], self.layout.attention_mask.shape[1]
            if columns != width:
                raise SoftPromptError(
                    f"{type(self.traits.model).__name__} was given {width} columns and puts out logits of {columns}, "
                    "so those of the text are not known; give it text alone"
                )
            logits, keep = self.layout.extract(output.logits, 1), self._selected
            found["logits"] = logits if keep is None else logits[:, keep]
        if output.get("hidden_states") is not None:
            found["hidden_states"] = tuple(
                None if each is None else self.layout.extract(each, 1) for each in output.hidden_states
            )
        if output.get("attentions") is not None:
            found["attentions"] = self._attentions(output.attentions)
        return found

    def _attentions(self, layers: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The attentions of the text's queries, of which the weights on the prompt's keys stay visible."""
        kinds = getattr(self.traits.model.config.get_text_config(decoder=True), "layer_types", None) or ()
        if len(kinds) != len(layers):  # some put out those of their attention layers alone
            kinds = [""] * len(layers)
        return tuple(self._attention(kind, weights) for kind, weights in zip(kinds, layers, strict=True))

    def _attention(self, kind: str, weights: Tensor | None) -> Tensor | None:
        if weights is None or kind == "linear_attention":
            return weights  # MiniMax puts out a state there, which has no columns
        if weights.ndim > 4:
            raise SoftPromptError(
                f"{type(self.traits.model).__name__} puts out attentions {list(weights.shape)}, whose columns are cut "
                "into chunks; leave output_attentions out"
            )
        return self.layout.extract(weights, 1 if weights.ndim == 3 else 2)  # RWKV has [batch, columns, hidden]


def _held_columns(traits: ModelTraits, call: Call, cache: Any, layout: Layout) -> int:
    """How many columns of text a cache holds, in front of the new ones of a call.

    Raises:
        SoftPromptError: a cache that cannot be continued, or not with the mask of the call.
    """
    name = type(traits.model).__name__
    if why := reason(NO_CONTINUATION, traits.model.config):
        raise SoftPromptError(f"{name} cannot be continued from its cache, as {why}; generate with use_cache=False")
    if traits.padding_side == "right" and layout.has_inner_pads:
        raise SoftPromptError(
            f"{name} takes no position_ids, so rows of different lengths cannot be continued in one batch; run rows of "
            "equal prompt and text length together, or one by one"
        )
    new, cached = call.text.shape[1], caches.length(cache)
    held = layout.seen if cached is None or not layout.seen else cached - layout.extra
    if call.mask is not None and call.mask.shape[1] != held + new:
        raise SoftPromptError(
            f"attention_mask has {call.mask.shape[1]} columns; the cache holds {held} columns of text and {new} are "
            f"new: pass the mask of the whole text, {held + new} columns"
        )
    if held < layout.text_length and held < layout.least_columns:
        raise SoftPromptError(
            f"the cache was cut back to {max(held, 0)} columns of text, and prompts stood in what is gone; keep more "
            "of it, or start with an empty one"
        )
    return held


def _last_columns(count: int, length: int, device: torch.device) -> Tensor:
    """Indices, not a slice, by which a frozen head would multiply a matrix of each row: up to ten times as slow."""
    return torch.arange(length - min(count, length), length, device=device)


def _refuse_backward(name: str, why: str, gradient: Tensor) -> None:
    raise SoftPromptError(f"prompts of {name} cannot be trained, as {why}; they can be served")
