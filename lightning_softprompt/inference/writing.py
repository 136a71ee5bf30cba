"""Free text: how it is generated, and where it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_softprompt.attachment.generation import options_of
from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.padding import pad_token_id, padded_inputs
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.answers import Written
from lightning_softprompt.inference.requests import Request
from lightning_softprompt.inference.streaming import as_they_come

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# With one of these options a text may come to its end without an end token.
_OTHER_ENDS = ("stop_strings", "stopping_criteria", "max_time")


class Writer:
    """Generates the texts of a call.

    Args:
        model: a causal LM with prompts attached.
        tokenizer: the model's tokenizer.
        max_new_tokens: the most tokens a text may have.
        options: any option of Hugging Face's `generate` that gives one text per row. Generation is greedy unless an
            option, or a `generation_config` among them, says otherwise.

    Attributes:
        end_tokens: the tokens that end a text.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, max_new_tokens: int, options: dict[str, Any]) -> None:
        self._model: Any = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self.end_tokens = _end_tokens(model, tokenizer, options)
        defaults = {"pad_token_id": pad_token_id(tokenizer, vocabulary_size(model)), "tokenizer": tokenizer}
        if options.get("generation_config") is None:
            defaults["do_sample"] = False
            # Without an end token, Hugging Face's `generate` continues a row behind its stop string until all rows
            # have stopped.
            if self.end_tokens:
                defaults["eos_token_id"] = self.end_tokens
        self._options = {**defaults, **options, "max_new_tokens": max_new_tokens}
        held = options_of(model, options)
        self._has_other_ends = any(held.get(name) for name in _OTHER_ENDS)
        strings = held.get("stop_strings") or []
        self._stop_strings = [strings] if isinstance(strings, str) else strings

    def write(self, batch: list[Request]) -> list[Written]:
        """The text behind each request of a batch."""
        inputs = self._inputs(batch)
        out = self._model.generate(**inputs, **self._options)
        sequences: Tensor = getattr(out, "sequences", out)
        self._check_count(len(sequences), batch)
        return [self._written(row) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]

    def stream(self, batch: list[Request]) -> Iterator[tuple[int, str]]:
        """The texts behind the requests of a batch so far, without surrounding space, whenever one has grown.

        Each comes with the index of its request, and each at least once.
        """
        if ModelTraits.of(self._model).padding_side == "right" and len(batch) > 1:
            # Rows of different lengths in one batch would not be continued as they are alone.
            for request in batch:
                yield from self.stream([request])
            return
        inputs = self._inputs(batch)
        rows: list[list[int]] = [[] for _ in batch]
        told: list[str | None] = [None] * len(batch)
        for tokens in as_they_come(lambda streamer: self._model.generate(**inputs, **self._options, streamer=streamer)):
            new = (tokens if tokens.ndim == 2 else tokens[:, None]).tolist()
            self._check_count(len(new), batch)
            for place, row in enumerate(rows):
                if any(token in self.end_tokens for token in row):
                    continue
                row += new[place]
                text = self._written(row).text.strip()
                # A character of several tokens is no character yet.
                if text and text != told[place] and not text.endswith("\ufffd"):
                    told[place] = text
                    yield batch[place].index, text
        for place, row in enumerate(rows):
            text = self._written(row).text.strip()
            if text != told[place]:
                yield batch[place].index, text

    def _inputs(self, batch: list[Request]) -> dict[str, Any]:
        inputs = padded_inputs([request.ids for request in batch], self._options["pad_token_id"], self._model.device)
        return {**inputs, "tasks": [request.task for request in batch]}

    def _check_count(self, count: int, batch: list[Request]) -> None:
        if count != len(batch):
            raise SoftPromptError(
                f"the options give {count} answers for {len(batch)} texts, and a text has one here; leave "
                "num_return_sequences out and give the text several times"
            )

    def _written(self, ids: list[int]) -> Written:
        """What a row says, from the ids that `generate` put behind its text."""
        end = next((place for place, token in enumerate(ids) if token in self.end_tokens), None)
        kept = ids[:end]
        if end is None and self._has_other_ends:
            # Pads are fed behind a row that ended otherwise, and need not be a special token of the tokenizer. Where no
            # row ends otherwise there are none, and a token that looks like one was written.
            while kept and kept[-1] == self._options["pad_token_id"]:
                kept.pop()
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        ended_otherwise = len(kept) < self._max_new_tokens or any(string in text for string in self._stop_strings)
        stopped = end is not None or (self._has_other_ends and ended_otherwise)
        return Written(text, kept, "stop" if stopped else "length")


def _end_tokens(model: PreTrainedModel, tokenizer: Any, options: dict[str, Any]) -> list[int]:
    """The tokens that end a text: the caller's, else those of the model's generation config and of the tokenizer.

    Targets are trained to end in the tokenizer's token, and chat models have other ones in their generation config.
    """
    if "eos_token_id" in options:
        return _listed(options["eos_token_id"])
    given = options.get("generation_config")
    of_model = _listed(getattr(model.generation_config, "eos_token_id", None))
    if given is not None:
        return _listed(given.eos_token_id) or of_model  # `generate` takes from the model's what is not given
    return [*dict.fromkeys([*of_model, *_listed(tokenizer.eos_token_id)])]


def _listed(tokens: Any) -> list[int]:
    return [] if tokens is None else torch.as_tensor(tokens, device="cpu").reshape(-1).tolist()
