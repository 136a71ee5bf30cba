"""`MixedTaskGenerator`: answer thousands of rows of different tasks, many tasks in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_softprompt.attachment.attach import attach
from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
from lightning_softprompt.inference.answers import Answer, Answers, TextAnswers
from lightning_softprompt.inference.raw_generator import RawGenerator
from lightning_softprompt.inference.task_answers import Rows, TaskAnswers, TextStream
from lightning_softprompt.prompts.soft_prompts import SoftPrompts


class MixedTaskGenerator(RawGenerator):
    """Answer rows of many tasks at once, with one frozen model.

    `answer`, `classify` and `stream` take rows, and answer each as its task was trained: by the template of the task in
    `prompts.templates`. `generate` and `rank` take texts as they are.

    The task goes with the row through the model, so changing from one task to another loads or changes no weights. A
    generator may be called from any number of threads and asyncio tasks at once.

    Args:
        model: a causal LM with prompts attached.
        tokenizer: the model's tokenizer.

    Raises:
        SoftPromptError: a model without prompts.

    Example:
        >>> from lightning_softprompt import SoftPrompts, TaskTemplate, Tokens, attach
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = models.WordLevel({"film": 0, "good": 1, "bad": 2, "<pad>": 3}, unk_token="<pad>")
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>")
        >>> config = LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> prompts = SoftPrompts.for_model(model, {"tone": Tokens([0, 0])})
        >>> prompts.templates["tone"] = TaskTemplate("{text}", "{label}", labels=["good", "bad"])
        >>> generator = MixedTaskGenerator(attach(model, prompts), tokenizer)
        >>> generator.answer(["film"], tasks=["tone"])[0] in ("good", "bad")
        True
        >>> (found,) = generator.classify([{"text": "film"}], tasks=["tone"])
        >>> found.label in ("good", "bad"), round(sum(found.probabilities.values()), 6)
        (True, 1.0)
        >>> for index, text in generator.stream(["film"], tasks=["tone"]):
        ...     print(index, text in ("good", "bad"))
        0 True
    """

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

    def answer(
        self,
        rows: Rows,
        tasks: Sequence[str | None],
        max_new_tokens: int = 64,
        max_batch_tokens: int = 16_384,
        show_progress: bool = False,
        **options: Any,
    ) -> TextAnswers:
        """Answer each row as its task was trained: with the likeliest of the task's labels, else with free text.

        Batches, memory and rows that cannot be answered are treated as in `generate`. Further reasons for a row without
        an answer are a row that does not fit its task's template, and a template that cannot be used with the
        tokenizer.

        Args:
            rows: each a text, which fills a template of one column, or a dict of columns. Token ids are those of a text
                that went through the template before. A task without a template gets the text as it is.
            tasks: the task of each row; None means no prompt and no template.
            max_new_tokens: the most tokens free text may have.
            max_batch_tokens: the most tokens a batch may have when its answers are complete, pads included.
            show_progress: whether to draw a progress bar over the rows.
            options: options of Hugging Face's `generate` for free text, as in `generate`.

        Returns:
            The answers in the order of the rows, without surrounding space; None for a row without an answer. They have
            the reasons in `failures`, and `token_ids` and `finish_reasons` of each answer. Free text ends where its
            targets ended: at the end-of-text token of the tokenizer, or at one of the model's generation config.

        Raises:
            SoftPromptError: different numbers of rows and tasks, a `max_batch_tokens` below 1, or options that do not
                give one answer per row.
        """
        answers = self._task_answers(max_batch_tokens)
        return self._noted(lambda: answers.answer(rows, tasks, max_new_tokens, show_progress, **options))

    def classify(
        self,
        rows: Rows,
        tasks: Sequence[str | None],
        max_batch_tokens: int = 16_384,
        show_progress: bool = False,
    ) -> Answers[Answer]:
        """The likeliest label of each row, and the probability of each label of its task.

        At each token of a label, probabilities are those among the tokens with which a label of the task can go on
        there. So the probabilities of a task's labels sum to 1.

        Batches, memory and rows that cannot be answered are treated as in `answer`.

        Args:
            rows: as in `answer`.
            tasks: the task of each row.
            max_batch_tokens: the most tokens a batch may have, pads included.
            show_progress: whether to draw a progress bar over the rows.

        Returns:
            An `Answer` for each row, in the order of the rows, with labels as they stand in the template; None for a
            row without an answer, whose reason is in `failures`.

        Raises:
            SoftPromptError: a task whose template has no labels, or that has no template; different numbers of rows and
                tasks, or a `max_batch_tokens` below 1.
        """
        answers = self._task_answers(max_batch_tokens)
        return self._noted(lambda: answers.classify(rows, tasks, show_progress))

    def stream(
        self,
        rows: Rows,
        tasks: Sequence[str | None],
        max_new_tokens: int = 64,
        max_batch_tokens: int = 16_384,
        **options: Any,
    ) -> TextStream:
        """Answer each row as `answer` does, and give its text whenever it has grown.

        A label comes once, when it is known. Free text comes as it is generated, all of it so far each time, so that
        the last one is what `answer` gives. Where batches run out of memory, the texts of the batch begin anew.

        Generation runs in a thread of its own, and waits for who reads. When the stream is closed or dropped,
        generation stops at its next step and the thread ends.

        Args:
            rows: as in `answer`.
            tasks: the task of each row.
            max_new_tokens: the most tokens free text may have.
            max_batch_tokens: the most tokens a batch may have when its answers are complete, pads included.
            options: options of Hugging Face's `generate` for free text, as in `generate`; it streams no beams.

        Returns:
            An iterator of pairs, the index of a row and its text so far. Its `failures` say why rows have no answer.

        Raises:
            SoftPromptError: different numbers of rows and tasks, a `max_batch_tokens` below 1, or a `streamer` among
                the options.
        """
        return self._task_answers(max_batch_tokens).stream(rows, tasks, max_new_tokens, **options)

    def _task_answers(self, max_batch_tokens: int) -> TaskAnswers:
        return TaskAnswers(self.model, self.tokenizer, self.prompts.templates, max_batch_tokens)
