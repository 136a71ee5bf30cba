"""`MixedTaskGenerator`: thousands of texts and task names in, answers out in their order, many tasks in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.attachment.attach import attach, attachment_of
from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
from lightning_softprompt.base.padding import pad_token_id, padded_inputs
from lightning_softprompt.base.tokens import decode_new
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.batches import Answer, Answers, answer_in_batches
from lightning_softprompt.inference.ranking import RankedRow, rank_labels
from lightning_softprompt.inference.requests import Request, RequestReader
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Texts = Sequence[str | list[int]]

# The last call in this thread or asyncio task: of which generator, and its failures.
_LAST_CALL: ContextVar[tuple[object, dict[int, str]]] = ContextVar("soft_prompt_last_call", default=(None, {}))


class MixedTaskGenerator:
    """Generate, or rank labels, for requests of many tasks at once, with one frozen model.

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
        texts: Texts,
        tasks: Sequence[str | None],
        max_new_tokens: int = 64,
        max_batch_tokens: int = 16_384,
        show_progress: bool = False,
        **options: Any,
    ) -> Answers[str]:
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
        options = {**self._defaults(options), **options, "max_new_tokens": max_new_tokens}
        reader = self._reader()

        def read(index: int) -> Request:
            return reader.to_generate(index, texts[index], tasks[index], max_new_tokens)

        bar = "generating" if show_progress else None
        return self._answered(len(texts), read, partial(self._generate, options=options), max_batch_tokens, bar)

    def rank(
        self,
        texts: Texts,
        tasks: Sequence[str | None],
        labels: Sequence[Sequence[str | list[int]]],
        max_batch_tokens: int = 16_384,
        show_progress: bool = False,
    ) -> Answers[list[float]]:
        """The log-probability of each of a text's labels behind it: the likeliest label is the text's class.

        A label's log-probability is summed over its tokens. Labels of one token share one row of a batch with their
        text; longer ones that differ before their last token take rows of their own.

        Batches, memory and requests that cannot be served are as in `generate`. Such are texts without labels, too, and
        labels without tokens.

        Args:
            texts: inputs, as text or as token ids.
            tasks: one a text; None is no prompt.
            labels: one list a text, of texts or token ids. A label stands directly behind its text, so that most
                tokenizers expect it to start with a space; nothing is put around it.
            max_batch_tokens: most tokens of a batch, pads included: its rows times the most that one may come to, the
                longest label included. A longer request has a batch of its own.
            show_progress: draw a bar over the requests.

        Returns:
            One list of log-probabilities a text, in the order of its labels.

        Raises:
            SoftPromptError: another number of tasks or of lists of labels than of texts, a budget that is no positive
                number.

        Example:
            >>> from lightning_softprompt import SoftPrompts, Tokens, attach
            >>> from tokenizers import Tokenizer, models
            >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
            >>> words = models.WordLevel({"film": 0, "good": 1, "bad": 2, "<pad>": 3}, unk_token="<pad>")
            >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>")
            >>> config = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            ...                      num_attention_heads=2)
            >>> model = LlamaForCausalLM(config)
            >>> generator = MixedTaskGenerator(
            ...     attach(model, SoftPrompts.for_model(model, {"tone": Tokens([0, 0])})), tokenizer
            ... )
            >>> (scores,) = generator.rank(["film"], tasks=["tone"], labels=[["good", "bad"]])
            >>> len(scores), max(scores) < 0
            (2, True)
        """
        lists = (texts, tasks, labels)
        if any(isinstance(each, str) for each in lists) or len({len(each) for each in lists}) > 1:
            raise SoftPromptError(
                "texts, tasks and labels must be lists of equal length, one task and one list of labels a text"
            )
        reader = self._reader()

        def read(index: int) -> Request:
            return reader.to_rank(index, texts[index], tasks[index], labels[index])

        bar = "ranking" if show_progress else None
        return self._answered(len(texts), read, self._rank, max_batch_tokens, bar)

    def _reader(self) -> RequestReader:
        return RequestReader(self.model, self.tokenizer, self.prompts)

    def _answered(
        self,
        count: int,
        read: Callable[[int], Request],
        run: Callable[[list[Request]], list[Answer]],
        max_batch_tokens: int,
        bar: str | None,
    ) -> Answers[Answer]:
        """Answer the requests of a call, whose failures are then those of the last call."""
        if max_batch_tokens < 1:
            raise SoftPromptError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
        _LAST_CALL.set((self, {}))
        answers = answer_in_batches(count, read, run, max_batch_tokens, bar)
        _LAST_CALL.set((self, answers.failures))
        return answers

    def _defaults(self, options: dict[str, Any]) -> dict[str, Any]:
        defaults = {"pad_token_id": self._pad(), "tokenizer": self.tokenizer}
        if options.get("generation_config") is None:
            defaults["do_sample"] = False
            # Without any, `generate` lets a row that has come to a stop string run on until all have.
            if getattr(self.model.generation_config, "eos_token_id", None) is None:
                defaults["eos_token_id"] = self.tokenizer.eos_token_id
        return defaults

    def _pad(self) -> int:
        return pad_token_id(self.tokenizer, vocabulary_size(self.model))

    def _generate(self, batch: list[Request], options: dict[str, Any]) -> list[str]:
        model: Any = self.model
        pad = options["pad_token_id"]
        inputs = padded_inputs([request.ids for request in batch], pad, model.device)
        out = model.generate(**inputs, tasks=[request.task for request in batch], **options)
        sequences = getattr(out, "sequences", out)
        if len(sequences) != len(batch):
            raise SoftPromptError(
                f"the options give {len(sequences)} answers for {len(batch)} texts, and a text has one here; leave "
                "num_return_sequences out and give the text several times"
            )
        return decode_new(self.tokenizer, sequences, inputs["input_ids"].shape[1], pad)

    def _rank(self, batch: list[Request]) -> list[list[float]]:
        rows = [RankedRow(request.ids, request.task, request.labels) for request in batch]
        return rank_labels(self.model, rows, self._pad())
