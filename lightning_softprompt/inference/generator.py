"""`MixedTaskGenerator`: thousands of texts and task names in, answers out in their order, many tasks in one batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_softprompt.attachment.attach import attach, attachment_of
from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
from lightning_softprompt.base.padding import pad_token_id, padded_inputs
from lightning_softprompt.base.tokens import decode_new, encode_text
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("lightning_softprompt")

_LISTED = 5  # failures that the log spells out


@dataclass(frozen=True)
class _Request:
    """One request that can be served; `length` is that of its prompt and its text."""

    index: int
    ids: list[int]
    task: str | None
    length: int


class Answers(list[str | None]):
    """The answers to a call's requests, in their order; None where there is none.

    Attributes:
        failures: the reason for each request without an answer, by its index.
    """

    def __init__(self, answers: Iterable[str | None], failures: dict[int, str]) -> None:
        super().__init__(answers)
        self.failures = failures


# The last call in this thread or asyncio task: of which generator, and its failures.
_LAST_CALL: ContextVar[tuple[object, dict[int, str]]] = ContextVar("soft_prompt_last_call", default=(None, {}))


class MixedTaskGenerator:
    """Generate for requests of many tasks at once, from one frozen model.

    A request's task is an index that goes with its row: no model or weight is touched to switch. A generator may be
    called from any number of threads and asyncio tasks at once.

    Args:
        model: a causal LM with prompts attached.
        tokenizer: its tokenizer.

    Raises:
        SoftPromptError: a model without prompts.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        attachment = attachment_of(model)
        if attachment is None:
            raise SoftPromptError("the model has no prompts; attach(model, prompts) first")
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = attachment.prompts

    @property
    def failures(self) -> dict[int, str]:
        """Those of this generator's last call, if it was the last one in this thread or asyncio task; else none.

        What `asyncio.to_thread` calls is in a thread of its own: take `answers.failures` there.
        """
        generator, failures = _LAST_CALL.get()
        return failures if generator is self else {}

    @classmethod
    def from_pretrained(cls, base: str | Path, prompts_folder: str | Path, **options: Any) -> MixedTaskGenerator:
        """Load a base model, its tokenizer and saved prompts.

        Args:
            base: hub id or path of the model.
            prompts_folder: what `SoftPrompts.save_pretrained` wrote.
            options: given to `AutoModelForCausalLM.from_pretrained`, for example `dtype` or `device_map`.
        """
        prompts = SoftPrompts.from_pretrained(prompts_folder)
        return cls(attach(load_causal_lm(base, **options), prompts), load_tokenizer(base))

    def generate(
        self,
        texts: Sequence[str | list[int]],
        tasks: Sequence[str | None],
        max_new_tokens: int = 64,
        max_batch_tokens: int = 16_384,
        show_progress: bool = False,
        **options: Any,
    ) -> Answers:
        """The texts' continuations, in the order given.

        Requests of like length share a batch, whatever their tasks; the longest go first, so that time and memory turn
        out no worse than they begin. A batch that runs out of the device's memory is halved, and so are those after it.

        A request that cannot be served stops no other one: its answer is None, `answers.failures` has the reason, and
        at the end one warning is logged. Such are unknown tasks, texts that are none or have no tokens, requests whose
        prompt, text and answer are longer than the model has positions, and those that no memory is left for.

        Args:
            texts: inputs, as text or as token ids.
            tasks: one a text; None is no prompt.
            max_new_tokens: most tokens of an answer.
            max_batch_tokens: most tokens of a batch when its answers are complete, pads included: its rows times the
                most that one may come to. A longer request has a batch of its own. Beams come on top.
            show_progress: draw a bar over the requests.
            options: any option of Hugging Face's `generate` that leaves one answer a text. Answers are greedy unless
                these, or a `generation_config` among them, say otherwise. `stop_strings` stay in the answers.

        Raises:
            SoftPromptError: another number of tasks than texts, a budget that is no positive number, options that do
                not leave one answer a text.
        """
        if isinstance(texts, str) or isinstance(tasks, str) or len(texts) != len(tasks):
            raise SoftPromptError("texts and tasks must be lists of equal length, one task a text")
        if max_batch_tokens < 1:
            raise SoftPromptError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
        _LAST_CALL.set((self, {}))
        answers = Answers([None] * len(texts), {})
        pending = self._checked(texts, tasks, max_new_tokens, answers.failures)
        options = {**self._defaults(options), **options, "max_new_tokens": max_new_tokens}
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Beside what a command prints, which may be read by another.
        with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
            bar = progress.add_task("", total=len(texts), completed=len(answers.failures))
            while pending:
                width = pending[0].length + max_new_tokens
                batch = pending[: max(1, max_batch_tokens // width)]
                try:
                    found = self._run(batch, options)
                except torch.OutOfMemoryError:
                    if len(batch) > 1:
                        max_batch_tokens = len(batch) * width // 2
                        logger.warning("out of memory; going on with max_batch_tokens=%d", max_batch_tokens)
                        continue
                    answers.failures[batch[0].index] = (
                        f"there is no memory for its {width} tokens; shorten the text or lower max_new_tokens"
                    )
                else:
                    for request, answer in zip(batch, found, strict=True):
                        answers[request.index] = answer
                del pending[: len(batch)]
                progress.advance(bar, len(batch))
        answers.failures = dict(sorted(answers.failures.items()))
        _LAST_CALL.set((self, answers.failures))
        _report(answers)
        return answers

    def _checked(
        self,
        texts: Sequence[str | list[int]],
        tasks: Sequence[str | None],
        max_new_tokens: int,
        failures: dict[int, str],
    ) -> list[_Request]:
        """The requests that can be served, the longest first; the others go into `failures`."""
        lengths: dict[str | None, int] = {None: 0, **dict(zip(self.prompts.tasks, self.prompts.lengths, strict=True))}
        vocabulary, positions = vocabulary_size(self.model), _positions(self.model)
        requests = []
        for index, (text, task) in enumerate(zip(texts, tasks, strict=True)):
            try:
                if task not in lengths:
                    self.prompts.task_ids([task])  # raises
                ids = text if isinstance(text, list) else self._encoded(text)
                if not ids:
                    raise SoftPromptError("the text has no tokens; give it some words")
                if max(ids) >= vocabulary:
                    raise SoftPromptError(
                        f"the text has token {max(ids)}, the model knows {vocabulary}; load the model's own tokenizer"
                    )
                length = lengths[task] + len(ids)
                if positions is not None and length + max_new_tokens > positions:
                    raise SoftPromptError(
                        f"{lengths[task]} tokens of prompt, {len(ids)} of text and max_new_tokens={max_new_tokens} are "
                        f"more than the model's {positions} positions; shorten the text or lower max_new_tokens"
                    )
                requests.append(_Request(index, ids, task, length))
            except SoftPromptError as error:
                failures[index] = str(error)
        return sorted(requests, key=lambda request: -request.length)

    def _encoded(self, text: object) -> list[int]:
        if not isinstance(text, str):
            raise SoftPromptError(f"expected a text, found {text!r}")
        try:
            return encode_text(self.tokenizer, text)
        except (TypeError, ValueError) as error:  # half a surrogate pair, as JSON may hold
            raise SoftPromptError(f"the tokenizer cannot read {text!r} ({error})") from error

    def _defaults(self, options: dict[str, Any]) -> dict[str, Any]:
        defaults = {"pad_token_id": pad_token_id(self.tokenizer, vocabulary_size(self.model)), "tokenizer": self.tokenizer}
        if options.get("generation_config") is None:
            defaults["do_sample"] = False
            # Without any, `generate` lets a row that has come to a stop string run on until all have.
            if getattr(self.model.generation_config, "eos_token_id", None) is None:
                defaults["eos_token_id"] = self.tokenizer.eos_token_id
        return defaults

    def _run(self, batch: list[_Request], options: dict[str, Any]) -> list[str]:
        model: Any = self.model
        inputs = padded_inputs([request.ids for request in batch], options["pad_token_id"], self.model.device)
        out = model.generate(**inputs, tasks=[request.task for request in batch], **options)
        sequences = getattr(out, "sequences", out)
        if len(sequences) != len(batch):
            raise SoftPromptError(
                f"the options give {len(sequences)} answers for {len(batch)} texts, and a text has one here; leave "
                "num_return_sequences out and give the text several times"
            )
        return decode_new(self.tokenizer, sequences, inputs["input_ids"].shape[1], options["pad_token_id"])


def _report(answers: Answers) -> None:
    if answers.failures:
        listed = [f"request {index}: {reason}" for index, reason in answers.failures.items()][:_LISTED]
        more = len(answers.failures) - len(listed)
        listed += [f"{more} more in answers.failures"] if more else []
        logger.warning("%d of %d requests have no answer. %s", len(answers.failures), len(answers), ". ".join(listed))


def _positions(model: PreTrainedModel) -> int | None:
    """How many tokens a row may have; None where the model's configuration sets no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found - ModelTraits.of(model).position_offset if isinstance(found, int) and found > 0 else None
