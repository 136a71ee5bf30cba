"""Reading and writing adapters of PEFT's prompt tuning, without any change of their values.

An adapter of PEFT is a folder with `adapter_config.json` and `adapter_model.safetensors`. An adapter of prompt tuning
holds one tensor, `prompt_embeddings` `[length, hidden]`. PEFT itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.folder import write_atomically
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "lightning_softprompt.json"
# Adapters of these types hold a prompt of embeddings; those of prefix tuning and of other types do not.
_READ = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")


def export_peft(
    prompts: SoftPrompts,
    task: str | Sequence[str],
    folder: str | Path,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write a prompt as an adapter that `PeftModel.from_pretrained` loads. On unpadded rows its logits are the same.

    Args:
        prompts: the prompts that hold the task.
        task: the task's name, or several names. With several, each adapter is written into a folder inside `folder`
            that is named after its task.
        folder: the folder of the adapter.
        base_model_name_or_path: the base model's name for the adapter's config; None takes the name that the prompts
            remember.

    Raises:
        SoftPromptError: an unknown task, or a prompt that is not finite.
    """
    if not isinstance(task, str):
        for name in task:
            export_peft(prompts, name, Path(folder) / name, base_model_name_or_path)
        return
    value = prompts[task].detach().cpu().contiguous()
    if not bool(torch.isfinite(value).all()):
        raise SoftPromptError(f"the prompt of task {task!r} holds NaN or Inf and is not exported; train it again")
    if base_model_name_or_path is None:
        base_model_name_or_path = prompts.base.name if prompts.base else ""
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path or None,
        "inference_mode": True,
        "num_virtual_tokens": len(value),
        "token_dim": prompts.hidden_size,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSORS, save_tensors({"prompt_embeddings": value}, metadata={"format": "pt"}))
    write_atomically(folder / OWN, _json({"task": task}))
    write_atomically(folder / CONFIG, _json(config))


def import_peft(folder: str | Path, task: str | None = None) -> SoftPrompts:
    """Read an adapter of PEFT's prompt tuning, P-tuning or multitask prompt tuning.

    Of P-tuning, PEFT saves the prompt that its encoder put out. Of multitask prompt tuning, the prompt of each task is
    computed here, as the product of the shared prompt and the task's factors.

    Args:
        folder: the folder of the adapter.
        task: the name of the task; None takes the name from which `export_peft` wrote the adapter, else the folder's
            name. If an adapter of multitask prompt tuning holds several tasks, a number is added to the name of each.

    Raises:
        SoftPromptError: a folder that does not hold such an adapter, or a damaged adapter.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    kind, length = config.get("peft_type"), config.get("num_virtual_tokens")
    if kind not in _READ:
        raise SoftPromptError(
            f"{folder} holds an adapter of {kind}, which is not a prompt of embeddings; {', '.join(_READ)} are"
        )
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise SoftPromptError(f"{folder} holds a prompt for {config['task_type']}; soft prompts here are for CAUSAL_LM")
    value = tensors.get("prompt_embeddings")
    if value is None or value.ndim != 2 or len(value) != length:
        found = "none" if value is None else list(value.shape)
        raise SoftPromptError(
            f"{folder / TENSORS} should hold prompt_embeddings of {length} tokens, found {found}; copy the folder again"
        )
    if task is None:
        task = _own_name(folder)
    made = SoftPrompts(value.shape[1])
    if kind == "MULTITASK_PROMPT_TUNING":
        factors = tensors["prefix_task_cols"].float() @ tensors["prefix_task_rows"].float()
        names = [task] if len(factors) == 1 else [f"{task}{number}" for number in range(len(factors))]
        for name, factor in zip(names, factors, strict=True):
            made.add(name, value.float() * factor)
    else:
        made.add(task, value)
    return made


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise SoftPromptError(f"{folder} is no adapter of PEFT: there is no {name}; give the folder of one adapter")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_tensors((folder / TENSORS).read_bytes())
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise SoftPromptError(f"{folder} is damaged ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise SoftPromptError(f"{folder / CONFIG} is not the config of an adapter; give the folder of one adapter")
    return config, tensors


def _own_name(folder: Path) -> str:
    own = folder / OWN
    if own.is_file():
        return str(json.loads(own.read_text(encoding="utf-8"))["task"])
    return folder.resolve().name


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
