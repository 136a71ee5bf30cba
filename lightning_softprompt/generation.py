"""`MixedTaskGenerator`: texts and task names in, texts out, many tasks in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from lightning_softprompt.attachment import attach, attachment_of
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.loading import load_causal_lm, load_tokenizer
from lightning_softprompt.prompts import SoftPrompts
from lightning_softprompt.tokens import decode_new, encode_text, pad_token_id, padded_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MixedTaskGenerator:
    """Generate for rows of many tasks at once, from one frozen model.

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
        texts: Sequence[str],
        tasks: Sequence[str | None],
        batch_size: int = 16,
        max_new_tokens: int = 64,
        show_progress: bool = False,
        **options: Any,
    ) -> list[str]:
        """The texts' continuations, in the order given.

        Texts of like length share a batch, whatever their tasks.

        Args:
            texts: inputs.
            tasks: one a text; None is no prompt.
            batch_size: texts a batch.
            max_new_tokens: most tokens of an answer.
            show_progress: draw a progress bar.
            options: any option of Hugging Face's `generate`.

        Raises:
            SoftPromptError: an unknown task, or another number of tasks than texts; before anything runs.
        """
        if isinstance(texts, str) or isinstance(tasks, str) or len(texts) != len(tasks):
            raise SoftPromptError("texts and tasks must be lists of equal length, one task a text")
        self.prompts.task_ids(tasks)
        encoded = [encode_text(self.tokenizer, text) for text in texts]
        if [] in encoded:
            raise SoftPromptError(f"text {encoded.index([])} of the list has no tokens; give it some words")
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
        model: Any = self.model
        answers, pad = [""] * len(texts), pad_token_id(self.tokenizer)
        begins = range(0, len(order), batch_size)
        for begin in track(begins, description="generating", disable=not show_progress):
            chosen = order[begin : begin + batch_size]
            batch = padded_inputs([encoded[index] for index in chosen], pad, self.model.device)
            out = model.generate(
                **batch,
                tasks=[tasks[index] for index in chosen],
                max_new_tokens=max_new_tokens,
                **{"pad_token_id": pad, "do_sample": False, **options},
            )
            for index, text in zip(chosen, decode_new(self.tokenizer, out, batch["input_ids"].shape[1]), strict=True):
                answers[index] = text
        return answers
