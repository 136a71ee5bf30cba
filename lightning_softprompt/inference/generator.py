"""`MixedTaskGenerator`: answer thousands of texts of different tasks, many tasks in one batch."""

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

# The generator that was called last in this thread or asyncio task, and the failures of that call.
_LAST_CALL: ContextVar[tuple[object, dict[int, str]]] = ContextVar("soft_prompt_last_call", default=(None, {}))


class MixedTaskGenerator:
    """Generate answers or rank labels for requests of many tasks at once, with one frozen model.

    A request is one text and its task. The task goes with the row through the model, so changing from one task to
    another loads or changes no weights. A generator may be called from any number of threads and asyncio tasks at once.

    Args:
        model: a causal LM with prompts attached.
        tokenizer: the model's tokenizer.

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
        """The failures of the last call in this thread or asyncio task; empty if another generator made that call.

        A call through `asyncio.to_thread` runs in another thread. For such a call, use `failures` of the answers.
        """
        generator, failures = _LAST_CALL.get()
        return failures if generator is self else {}

    @classmethod
    def from_pretrained(cls, base: str | Path, prompts_folder: str | Path, **options: Any) -> MixedTaskGenerator:
        """Load a base model, its tokenizer and saved prompts.

        Args:
            base: hub id or path of the model.
            prompts_folder: a folder that `SoftPrompts.save_pretrained` wrote.
            options: passed to `AutoModelForCausalLM.from_pretrained`, for example `dtype` or `device_map`.
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
        """Generate an answer to each text. The answers are in the order of the texts.

        Requests of similar length share a batch, whatever their tasks. The longest go first, so that no later batch
        needs more time or memory than the first. If a batch runs out of the device's memory, it and all later batches
        are halved.

        A request that cannot be answered does not stop the others: its answer is None, `answers.failures` has the
        reason, and one warning is logged at the end. The reasons are an unknown task, a prompt that is not finite, a
        text that is not a text, has no tokens or has ids that the model does not know, a request whose prompt, text and
        answer need more positions than the model has, and one that is alone in its batch and still finds no memory.

        Args:
            texts: the inputs, each as text or as token ids.
            tasks: the task of each text; None means no prompt.
            max_new_tokens: the most tokens an answer may have.
            max_batch_tokens: the most tokens a batch may have when its answers are complete, pads included: the number
                of its rows times the length of the longest. A request that is longer has a batch of its own. Beams are
                not counted.
            show_progress: whether to draw a progress bar over the requests.
            options: any option of Hugging Face's `generate` that gives one answer per text. Generation is greedy unless
                an option, or a `generation_config` among them, says otherwise. `stop_strings` are kept in the answers.

        Raises:
            SoftPromptError: different numbers of tasks and texts, a `max_batch_tokens` below 1, or options that do not
                give one answer per text.
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
        """The log-probability of each label behind its text. The class of a text is its likeliest label.

        The log-probability of a label is summed over its tokens. The labels of one token share one row of a batch with
        their text. Longer labels take rows of their own if they differ before their last token.

        Batches, memory and requests that cannot be answered are treated as in `generate`. Further reasons for a request
        without an answer are an empty list of labels and a label without tokens.

        Args:
            texts: the inputs, each as text or as token ids.
            tasks: the task of each text; None means no prompt.
            labels: for each text a list of labels, each as text or as token ids. A label stands directly behind its
                text and no token is added, so with most tokenizers it should start with a space.
            max_batch_tokens: the most tokens a batch may have, pads included: the number of its rows times the length
                of the longest, including its longest label. A request that is longer has a batch of its own.
            show_progress: whether to draw a progress bar over the requests.

        Returns:
            For each text a list of log-probabilities, in the order of its labels.

        Raises:
            SoftPromptError: different numbers of texts, tasks and lists of labels, or a `max_batch_tokens` below 1.

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
        """Answer the requests of a call, and make its failures those of the last call."""
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
            # Without an end-of-text id, Hugging Face's `generate` continues a row behind its stop string until all rows
            # have stopped.
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
