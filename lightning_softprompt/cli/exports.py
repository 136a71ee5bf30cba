"""The commands that write a base and its prompts as one model, for engines that know nothing of prompts."""

from __future__ import annotations

from lightning_softprompt.cli.output import say
from lightning_softprompt.interop.gguf import Dtype


def export_model(base: str, prompts: str, output: str, json: bool = False) -> None:
    """Write a base and its prompts as an ordinary model folder, which transformers, vLLM and others serve.

    Each task's prompt becomes virtual tokens of the folder's tokenizer, with an alias and a chat template that takes
    the task. The folder's README.md shows requests. It is a second checkpoint, as large as the base.

    Args:
        base: hub id or path of the base model.
        prompts: folder of trained prompts, as `fit` leaves it, a checkpoint of a run, or an id on the hub.
        output: folder to write; an earlier export in it is replaced.
        json: print what was done as JSON.
    """
    from lightning_softprompt.interop.virtual_tokens import export_model as write

    _report(output, write(base, prompts, output), json)


def export_gguf(
    gguf: str,
    prompts: str,
    output: str,
    dtype: Dtype | None = None,
    base: str | None = None,
    json: bool = False,
) -> None:
    """Write a GGUF file of a base and its prompts, which llama.cpp serves. It needs the package gguf.

    A file beside it, with .json behind its name, has the ids of each task's virtual tokens.

    Args:
        gguf: GGUF file of the base model, of any quantization.
        prompts: folder of trained prompts, as `fit` leaves it, a checkpoint of a run, or an id on the hub.
        output: GGUF file to write.
        dtype: f32 stores all of the model as float32; default: the types of the base, prompts in at least 8 bits.
        base: hub id or path of the model that the file was made from, for types of models that transformers cannot
            read from GGUF.
        json: print what was done as JSON.
    """
    from lightning_softprompt.interop.gguf import export_gguf as write

    _report(output, write(gguf, prompts, output, dtype, base), json)


def _report(output: str, gap: float, json: bool) -> None:
    text = f"{output} is written; on held-out texts the best token stands {gap:.0f} above every virtual one"
    say({"output": output, "gap": round(gap, 1)}, json, text)
