"""Reading and writing adapters of PEFT's prompt tuning, without any change of their values.

An adapter of PEFT is a folder with `adapter_config.json` and `adapter_model.safetensors`. An adapter of prompt tuning
holds one tensor, `prompt_embeddings` `[length, hidden]`. PEFT itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.characters import shown
from lightning_softprompt.prompts.files import errors_name, write_atomically
from lightning_softprompt.prompts.index import template_of
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.prompts.task_names import check_task_name
from lightning_softprompt.prompts.templates import check_templates

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "lightning_softprompt.json"
# PEFT reads none of the files that it does not know.
TEMPLATE = "soft_prompt_template.json"
# Adapters of these types hold a prompt of embeddings; those of prefix tuning and of other types do not.
_READ = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")


def export_peft(
    prompts: SoftPrompts,
    task: str | Sequence[str],
    folder: str | Path,
    base_model_name_or_path: str | Path | None = None,
) -> None:
    """Write a prompt as an adapter that `PeftModel.from_pretrained` loads. On unpadded rows its logits are the same.

    A template of the task goes into a file of its own, which PEFT does not read and `import_peft` does.

    Args:
        prompts: the prompts that hold the task.
        task: the task's name, or several names. With several, each adapter is written into a folder inside `folder`
            that is named after its task.
        folder: the folder of the adapter.
        base_model_name_or_path: the base model's name for the adapter's config; None takes the name that the prompts
            remember.

    Raises:
        SoftPromptError: an unknown task, a prompt that is not finite, a template that cannot be used, or a folder that
            cannot be written.
    """
    for name in [task] if isinstance(task, str) else task:
        _check_can_be_exported(prompts, name)
    if not isinstance(task, str):
        for name in task:
            export_peft(prompts, name, Path(folder) / name, base_model_name_or_path)
        return
    value = prompts[task].detach().cpu().contiguous()
    template = prompts.templates.get(task)
    if base_model_name_or_path is None:
        base_model_name_or_path = prompts.base.name if prompts.base else ""
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model_name_or_path) or None,
        "inference_mode": True,
        "num_virtual_tokens": len(value),
        "token_dim": prompts.hidden_size,
    }
    folder = Path(folder)
    with errors_name(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / TENSORS, save_tensors({"prompt_embeddings": value}, metadata={"format": "pt"}))
        write_atomically(folder / OWN, _json({"task": task}))
        if template is None:
            (folder / TEMPLATE).unlink(missing_ok=True)
        else:
            write_atomically(folder / TEMPLATE, _json(asdict(template)))
        write_atomically(folder / CONFIG, _json(config))


def _check_can_be_exported(prompts: SoftPrompts, task: str) -> None:
    if not bool(torch.isfinite(prompts[task]).all()):
        raise SoftPromptError(f"the prompt of task {task!r} holds NaN or Inf and is not exported; train it again")
    if task in prompts.templates:
        check_templates({task: prompts.templates[task]})


def import_peft(folder: str | Path, task: str | None = None, base: BaseModel | None = None) -> SoftPrompts:
    """Read an adapter of PEFT's prompt tuning, P-tuning or multitask prompt tuning.

    Of P-tuning, PEFT saves the prompt that its encoder put out. Of multitask prompt tuning, the prompt of each task is
    computed here, as the product of the shared prompt and the task's factors. A template that `export_peft` wrote goes
    with the prompt.

    Args:
        folder: the folder of the adapter.
        task: the name of the task; None takes the name from which `export_peft` wrote the adapter, else the folder's
            name. If an adapter of multitask prompt tuning holds several tasks, a number is added to the name of each.
        base: the base model that the prompts belong to, for example `prompts.base` of the prompts that they join; an
            adapter that names another one is refused. None means that it is not known.

    Raises:
        SoftPromptError: a folder that does not hold such an adapter, a damaged adapter, or one of another base model.

    Example:
        >>> import tempfile
        >>> prompts = SoftPrompts(hidden_size=4)
        >>> prompts.add("topic", torch.ones(3, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_peft(prompts, "topic", folder)
        ...     import_peft(folder).tasks
        ('topic',)
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    value = _check_adapter(folder, config, tensors, base)
    name = _own_name(folder) if task is None else check_task_name(task)
    made = SoftPrompts(value.shape[1], base)
    try:
        for each, prompt in _prompts_of(config, tensors, name).items():
            made.add(each, prompt)
    except (SoftPromptError, RuntimeError, KeyError) as error:  # PyTorch's, where shapes do not fit, or a tensor's name
        raise SoftPromptError(
            f"{folder / TENSORS} cannot be used: {' '.join(str(error).split())}; copy the folder again or train anew"
        ) from error
    if (folder / TEMPLATE).is_file() and name in made:
        made.templates[name] = template_of(_read_json(folder / TEMPLATE), name, folder / TEMPLATE)
    return made


def _check_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], base: BaseModel | None) -> Tensor:
    """Check that the adapter is one of prompts for `base`, and return its tensor of embeddings."""
    kind, length = config.get("peft_type"), config.get("num_virtual_tokens")
    if kind not in _READ:
        raise SoftPromptError(
            f"{folder} holds an adapter of {shown(kind)}, which is not a prompt of embeddings; {', '.join(_READ)} are"
        )
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise SoftPromptError(
            f"{folder} holds a prompt for {shown(config['task_type'])}; soft prompts here are for CAUSAL_LM"
        )
    value = tensors.get("prompt_embeddings")
    if value is None or value.ndim != 2 or len(value) != length:
        found = "none" if value is None else list(value.shape)
        raise SoftPromptError(
            f"{folder / TENSORS} should hold prompt_embeddings of {shown(length)} tokens, found {found}; copy the "
            "folder again"
        )
    theirs = config.get("base_model_name_or_path")
    is_other = base is not None and bool(theirs and base.name) and not _may_be_same(str(theirs), base.name)
    if base is not None and (is_other or value.shape[1] != base.hidden_size):
        raise SoftPromptError(
            f"{folder} holds a prompt for another base model, {shown(theirs)} (width {value.shape[1]}), than "
            f"{base.name!r} (width {base.hidden_size}); import it into a folder of its own, or, if both are the same "
            f"model, write {base.name!r} as base_model_name_or_path into {folder / CONFIG}"
        )
    return value


def _may_be_same(name: str, other: str) -> bool:
    """Whether two names may stand for one model: two hub ids only if equal, and a path if it ends like the other."""
    if name.count("/") == other.count("/") == 1:
        return name == other
    return Path(name).name == Path(other).name


def _prompts_of(config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The prompts of an adapter by task."""
    value = tensors["prompt_embeddings"]
    if config["peft_type"] != "MULTITASK_PROMPT_TUNING":
        return {name: value}
    factors = tensors["prefix_task_cols"].float() @ tensors["prefix_task_rows"].float()
    names = [name] if len(factors) == 1 else [f"{name}{number}" for number in range(len(factors))]
    return {each: value.float() * factor for each, factor in zip(names, factors, strict=True)}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise SoftPromptError(f"{folder} is no adapter of PEFT: there is no {name}; give the folder of one adapter")
    config = _read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise SoftPromptError(f"{folder / CONFIG} is not the config of an adapter; give the folder of one adapter")
    try:
        tensors = load_tensors((folder / TENSORS).read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise SoftPromptError(f"{folder / TENSORS} is damaged ({shown(str(error))}); copy it again") from error
    return config, tensors


def _own_name(folder: Path) -> str:
    path = folder / OWN
    if not path.is_file():
        return folder.resolve().name
    own = _read_json(path)
    try:
        return check_task_name(own.get("task") if isinstance(own, dict) else None)
    except SoftPromptError as error:
        raise SoftPromptError(f"{path}: {error}; give the task's name") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SoftPromptError(f"{path} is damaged ({shown(str(error))}); copy it again") from error


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
