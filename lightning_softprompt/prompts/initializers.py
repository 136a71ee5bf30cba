"""How a prompt starts: `Text`, `Tokens`, `Vocabulary`, `Labels`, `Normal` and `Prompt`.

They follow Lester et al. 2021 (arXiv 2104.08691, section 3.2), who found class labels best and sampled vocabulary
close to it, and SPoT (Vu et al. 2022, arXiv 2110.07904), which starts a prompt from another task's prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_softprompt.base.embedding import look_up, vocabulary_size
from lightning_softprompt.base.special_ids import special_ids
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.checkpoint import read_checkpoint
from lightning_softprompt.prompts.folder import load_folder
from lightning_softprompt.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class InitializerContext:
    """What an initializer may use to make a prompt.

    Attributes:
        task: the task whose prompt is made.
        model: the causal LM.
        tokenizer: the model's tokenizer, or None.
        prompts: the prompts that exist already, by task.
        seed: the run's seed. Every task draws from a random stream of its own, so the order of tasks has no effect.
    """

    task: str
    model: PreTrainedModel
    tokenizer: Any = None
    prompts: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0

    def embed(self, ids: Sequence[int]) -> Tensor:
        """The output of the model's embedding module for these ids: float32 `[len(ids), hidden]`.

        The module is called because some modules, such as that of Gemma in transformers, scale the values they look up.
        """
        embedding = self.model.get_input_embeddings()
        vocabulary = vocabulary_size(self.model)
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        wrong = [i for i in ids if not isinstance(i, Integral) or isinstance(i, bool) or not 0 <= int(i) < vocabulary]
        if wrong:
            raise SoftPromptError(f"task {self.task!r}: token ids must lie in [0, {vocabulary}), found {wrong[:5]}")
        with torch.no_grad():
            device = next(embedding.parameters()).device
            return look_up(embedding, torch.tensor([ids], device=device))[0].float()

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without special tokens."""
        if self.tokenizer is None:
            raise SoftPromptError(
                f"task {self.task!r} starts from text, which needs a tokenizer: pass tokenizer=…, "
                "or start from Tokens([ids]) or a length"
            )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def generator(self) -> torch.Generator:
        """A random generator for this task alone, seeded from the run's seed and the task's name."""
        return generator(self.seed, self.task)


class Initializer:
    """How a prompt starts. When called, a subclass returns the prompt's first value, float32 `[length, hidden]`."""

    needs_tokenizer: ClassVar[bool] = False

    def __call__(self, context: InitializerContext) -> Tensor:
        """Make the prompt's first value."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line that says how the prompt started; it is saved with the prompt."""
        return repr(self)


@dataclass(frozen=True)
class Text(Initializer):
    """Start from the embeddings of a text: the most reliable start for a task that can be put into words.

    Args:
        text: what the prompt says before training.
        length: number of virtual tokens. The text's tokens are repeated or cut to this number; None keeps the number
            of the text's tokens.
    """

    needs_tokenizer: ClassVar[bool] = True

    text: str
    length: int | None = None

    def __call__(self, context: InitializerContext) -> Tensor:
        """Embed the text's tokens."""
        ids = context.encode(self.text)
        if not ids:
            raise SoftPromptError(f"task {context.task!r}: the text {self.text!r} has no tokens; give it some words")
        if self.length is not None:
            _check_length(context.task, self.length)
            ids = (ids * (self.length // len(ids) + 1))[: self.length]
        return context.embed(ids)


@dataclass(frozen=True)
class Tokens(Initializer):
    """Start from the embeddings of given token ids: before training, the prompt acts exactly as these tokens would.

    Args:
        ids: token ids, in order.
    """

    ids: Sequence[int]

    def __call__(self, context: InitializerContext) -> Tensor:
        """Embed the ids."""
        _check_length(context.task, len(self.ids))
        return context.embed(self.ids)


@dataclass(frozen=True)
class Vocabulary(Initializer):
    """Start from tokens sampled without repetition from the most frequent ones (the lowest ids of a BPE vocabulary).

    Args:
        length: number of virtual tokens.
        most_frequent: how many of the lowest ids to sample from (5,000 in Lester et al. 2021).
    """

    length: int
    most_frequent: int = 5000

    def __call__(self, context: InitializerContext) -> Tensor:
        """Sample ids and embed them."""
        _check_length(context.task, self.length)
        return context.embed(self.sample(context, self.length))

    def sample(self, context: InitializerContext, count: int) -> list[int]:
        """Sample `count` different ids, none of them special."""
        special = special_ids(context.model, context.tokenizer)
        ids = [i for i in range(vocabulary_size(context.model)) if i not in special][: self.most_frequent]
        if len(ids) < count:
            raise SoftPromptError(
                f"task {context.task!r}: {count} tokens cannot be sampled from {len(ids)}; use a shorter prompt "
                "or raise most_frequent"
            )
        order = torch.randperm(len(ids), generator=context.generator(), device="cpu")[:count]
        return [ids[i] for i in order.tolist()]


@dataclass(frozen=True)
class Labels(Initializer):
    """Start from the class labels of a task, one virtual token each: the best start in Lester et al. 2021.

    The virtual token of a label with several tokens starts at the mean of their embeddings. Virtual tokens beyond the
    labels start from sampled vocabulary.

    Args:
        words: the class labels, as the model is to write them.
        length: number of virtual tokens, at least the number of labels; None means the number of labels.
    """

    needs_tokenizer: ClassVar[bool] = True

    words: Sequence[str]
    length: int | None = None

    def __call__(self, context: InitializerContext) -> Tensor:
        """Embed the labels, then fill the prompt up with sampled vocabulary."""
        length = len(self.words) if self.length is None else self.length
        _check_length(context.task, length)
        if not self.words or length < len(self.words):
            raise SoftPromptError(
                f"task {context.task!r}: Labels needs at least one word and a length of at least their number; "
                f"got {len(self.words)} words and length {length}"
            )
        encoded = [context.encode(word) for word in self.words]
        for word, ids in zip(self.words, encoded, strict=True):
            if not ids:
                raise SoftPromptError(f"task {context.task!r}: the label {word!r} has no tokens")
        rows = [context.embed(ids).mean(0) for ids in encoded]
        rest = length - len(rows)
        if rest:
            rows.extend(context.embed(Vocabulary(rest).sample(context, rest)))
        return torch.stack(rows)


@dataclass(frozen=True)
class Normal(Initializer):
    """Start from Gaussian noise. On average, its virtual tokens have the norm of the model's own embeddings.

    Args:
        length: number of virtual tokens.
        scale: factor by which that norm is multiplied.
    """

    length: int
    scale: float = 1.0

    def __call__(self, context: InitializerContext) -> Tensor:
        """Draw the noise."""
        _check_length(context.task, self.length)
        vocabulary = vocabulary_size(context.model)
        sample = context.embed(range(0, vocabulary, max(1, vocabulary // 1024)))
        hidden = sample.shape[1]
        noise = torch.randn(self.length, hidden, generator=context.generator(), device="cpu")
        return noise.to(sample.device) * (sample.norm(dim=1).mean() / hidden**0.5 * self.scale)


@dataclass(frozen=True)
class Prompt(Initializer):
    """Start from another task's prompt, of the same run, a saved folder or a checkpoint (the transfer of SPoT).

    Args:
        task: the task whose prompt is copied.
        folder: a folder that `SoftPrompts.save_pretrained` wrote, or the file of a checkpoint; None takes a task of the
            same prompts.
    """

    task: str
    folder: str | Path | None = None

    def __call__(self, context: InitializerContext) -> Tensor:
        """Copy the other prompt."""
        if self.folder is None:
            source: Mapping[str, Tensor] = context.prompts
            where = "these prompts"
        else:
            read = read_checkpoint if Path(self.folder).is_file() else load_folder
            source, where = read(Path(self.folder)).tensors, str(self.folder)
        if self.task not in source:
            raise SoftPromptError(
                f"task {context.task!r} starts from the prompt of {self.task!r}, which is not in {where}; "
                f"there: {', '.join(map(repr, source)) or 'none'}"
            )
        return source[self.task].detach().clone()


def as_initializer(task: str, initializer: object) -> Initializer:
    """The initializer that is meant: a str means `Text`, an int means `Vocabulary`, an initializer stays as it is."""
    if isinstance(initializer, Initializer):
        return initializer
    if isinstance(initializer, str):
        return Text(initializer)
    if isinstance(initializer, int) and not isinstance(initializer, bool):
        return Vocabulary(initializer)
    raise SoftPromptError(
        f"task {task!r} must start from a text, a length or one of Text, Tokens, Vocabulary, Labels, Normal, Prompt; "
        f"got {type(initializer).__name__}"
    )


def sources_first(initializers: Mapping[str, Initializer]) -> list[str]:
    """The tasks in an order in which each task comes after the task from whose prompt it starts."""
    sources: dict[str, set[str]] = {}
    for task, initializer in sorted(initializers.items(), key=lambda item: isinstance(item[1], Prompt)):
        sources[task] = set()
        if isinstance(initializer, Prompt) and initializer.folder is None:
            sources[task] = {initializer.task} & set(initializers)
    try:
        return list(TopologicalSorter(sources).static_order())
    except CycleError as error:
        circle = " from ".join(map(repr, reversed(error.args[1])))
        raise SoftPromptError(
            f"no prompt can start from itself: {circle}; start one of them from something else"
        ) from error


def _check_length(task: str, length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise SoftPromptError(f"task {task!r}: a prompt has at least one virtual token, got length {length!r}")
