"""Texts as they are, without the templates of their tasks: what is generated behind them, and how likely labels are."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_softprompt.attachment.lock import Lock
from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.padding import pad_token_id
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.answers import NOT_FINITE, Answers
from lightning_softprompt.inference.batches import answer_in_batches, check_budget
from lightning_softprompt.inference.ranking import RankedRow, rank_labels
from lightning_softprompt.inference.requests import Request, RequestReader, attached_prompts
from lightning_softprompt.inference.writing import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("lightning_softprompt")

AnswersT = TypeVar("AnswersT", bound=Answers[Any])
Texts = Sequence[str | list[int]]

# The generator that was called last in this thread or asyncio task, and the failures of that call.
_LAST_CALL: ContextVar[tuple[object, dict[int, str]]] = ContextVar("soft_prompt_last_call", default=(None, {}))


class RawGenerator:
    """The part of `MixedTaskGenerator` that takes texts as they are.

    Args:
        model: a causal LM with prompts attached.
        tokenizer: the model's tokenizer.

    Raises:
        SoftPromptError: a model without prompts.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.prompts = attached_prompts(model)
        self.model = model
        self.tokenizer = tokenizer
        self._told: set[str] = set()  # the tasks whose unused template a warning has named
        self._lock = Lock()

    @property
    def failures(self) -> dict[int, str]:
        """The failures of the last call in this thread or asyncio task; empty if another generator made that call.

        A call through `asyncio.to_thread` runs in another thread. For such a call, use `failures` of the answers.
        """
        generator, failures = _LAST_CALL.get()
        return failures if generator is self else {}

    def generate(
        self,
        texts: Texts,
        tasks: Sequence[str | None],
        max_new_tokens: int = 64,
        max_batch_tokens: int = 16_384,
        show_progress: bool = False,
        **options: Any,
    ) -> Answers[str]:
        """Generate an answer to each text, as it is. The answers are in the order of the texts.

        The template of a task is not used; `answer` uses it.

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
                an option, or a `generation_config` among them, says otherwise. An answer ends at the end-of-text token
                of the tokenizer and at those of the model's generation config, unless `eos_token_id` or a
                `generation_config` says otherwise. No answer shows them. `stop_strings` are kept in the answers.

        Raises:
            SoftPromptError: different numbers of tasks and texts, a `max_batch_tokens` below 1, or options that do not
                give one answer per text.
        """
        if isinstance(texts, str) or isinstance(tasks, str) or len(texts) != len(tasks):
            raise SoftPromptError("texts and tasks must be lists of equal length, one task a text")
        check_budget(max_batch_tokens)
        self._tell_of_templates(tasks)
        writer = Writer(self.model, self.tokenizer, max_new_tokens, options)
        reader = RequestReader(self.model, self.tokenizer, self.prompts)

        def run(batch: list[Request]) -> list[str]:
            return [written.text for written in writer.write(batch)]

        def read(index: int) -> Request:
            return reader.to_generate(index, texts[index], tasks[index], max_new_tokens)

        bar = "generating" if show_progress else None
        return self._noted(lambda: answer_in_batches(len(texts), read, run, max_batch_tokens, bar))

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
            >>> from lightning_softprompt import MixedTaskGenerator, SoftPrompts, Tokens, attach
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
        check_budget(max_batch_tokens)
        reader = RequestReader(self.model, self.tokenizer, self.prompts)
        pad = pad_token_id(self.tokenizer, vocabulary_size(self.model))

        def run(batch: list[Request]) -> list[list[float] | SoftPromptError]:
            rows = [RankedRow(request.ids, request.task, request.labels) for request in batch]
            found = rank_labels(self.model, rows, pad)
            return [SoftPromptError(NOT_FINITE) if any(map(math.isnan, scores)) else scores for scores in found]

        def read(index: int) -> Request:
            return reader.to_rank(index, texts[index], tasks[index], labels[index])

        bar = "ranking" if show_progress else None
        return self._noted(lambda: answer_in_batches(len(texts), read, run, max_batch_tokens, bar))

    def _noted(self, call: Callable[[], AnswersT]) -> AnswersT:
        """The answers of a call, whose failures become those of the last call."""
        _LAST_CALL.set((self, {}))
        answers = call()
        _LAST_CALL.set((self, answers.failures))
        return answers

    def _tell_of_templates(self, tasks: Sequence[str | None]) -> None:
        """Warn, once for each task, that its template is not used."""
        with self._lock:
            for task in tasks:
                if isinstance(task, str) and task in self.prompts.templates and task not in self._told:
                    self._told.add(task)
                    logger.warning(
                        "the task %r has a template, and generate takes texts as they are; call answer(rows, tasks) "
                        "for what the task was trained to answer",
                        task,
                    )
