"""Whether the served model is the one that prompts were trained for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from softprompt_vllm.errors import SoftPromptError

logger = logging.getLogger("vllm.softprompt")

# Loading the same weights as bfloat16 changes a value by up to 2^-8 of it; another model's embedding is unrelated.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class ServedModel:
    """What the plugin knows of the model that vLLM serves.

    Attributes:
        name: its hub id or path.
        folder: where its files lie; None if that is not known.
        hidden_size: the width of its input embeddings.
        vocabulary: the number of ids that its embedding has.
        dtype: the dtype that it runs in.
        takes_embeddings: whether the engine was started with `--enable-prompt-embeds`.
    """

    name: str
    folder: Path | None
    hidden_size: int
    vocabulary: int
    dtype: torch.dtype
    takes_embeddings: bool


@dataclass(frozen=True)
class BaseModel:
    """A base model as saved prompts remember it.

    Attributes:
        name: its hub id or path; empty if it has none.
        ids: the token ids whose embeddings make up the fingerprint.
        fingerprint: the first values of each of those embeddings, as the embedding module returns them.
    """

    name: str
    ids: tuple[int, ...]
    fingerprint: tuple[float, ...]

    def check(self, model: ServedModel) -> None:
        """Raise a `SoftPromptError` if `model` is another one. Names are not compared: the same weights have several.

        Weights that lie in no safetensors file, or whose embedding is quantized, cannot be compared: it warns.
        """
        columns = len(self.fingerprint) // max(1, len(self.ids))
        wanted = torch.tensor(self.fingerprint).reshape(len(self.ids), columns)
        found = [] if model.folder is None else list(_embeddings(model.folder, model, self.ids, columns))
        if not found:
            logger.warning(
                "softprompt: no embedding was found in the files of %s, so nobody checked that the prompts were "
                "trained for it (their base: %s); only the width was compared",
                model.name,
                self.name or "without a name",
            )
        elif not any(_is_same(each, wanted) for each in found):
            raise SoftPromptError(
                f"the prompts were trained for another base model ({self.name or 'without a name'}) than {model.name}: "
                "the embeddings differ; serve that model, or train prompts for this one"
            )


def _embeddings(folder: Path, model: ServedModel, ids: Sequence[int], columns: int) -> Iterator[Tensor]:
    """The first `columns` values of the rows `ids` of each matrix that could be the embedding: float32."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    shape = part.get_shape()
                    fits = len(shape) == 2 and shape[0] >= model.vocabulary and shape[1] == model.hidden_size
                    if fits and max(ids, default=0) < shape[0]:
                        yield torch.cat([part[index : index + 1, :columns] for index in ids]).float()
        except (SafetensorError, OSError) as error:
            logger.warning("softprompt: %s cannot be read (%s)", path.name, error)


def _is_same(found: Tensor, wanted: Tensor) -> bool:
    """Whether the weights `found` are the embeddings `wanted`, up to rounding and one factor.

    Some models (Gemma) multiply their embedding's weights by a number inside the module, as vLLM does, too.
    """
    factor = (found * wanted).sum() / found.square().sum().clamp_min(1e-30)
    return bool(factor > 0) and bool((factor * found - wanted).norm() <= _TOLERANCE * wanted.norm())
