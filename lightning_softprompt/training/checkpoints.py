"""What the checkpoints of a run hold, and how it is resumed from one: prompts and what else trains, never the base."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from lightning_softprompt.attachment.attachment import SUBMODULE
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.task_names import KEY, parameter_name, task_of_parameter

if TYPE_CHECKING:
    from lightning_softprompt.prompts.soft_prompts import SoftPrompts
    from lightning_softprompt.training.wiring import Wiring


class Checkpoints:
    """The state-dict hooks of one LightningModule: its frozen base is left out, and not missed on loading.

    Lightning's own `on_save_checkpoint` is not called where weights alone are saved (2.6), so these are PyTorch's.

    Args:
        wiring: of the module.
    """

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._load_prefix = ""

    def install(self) -> None:
        """Register the hooks."""
        module = self._wiring.module
        module.register_state_dict_post_hook(partial(self._strip_frozen))
        module.register_load_state_dict_pre_hook(self._check_prompts)
        module.register_load_state_dict_post_hook(self._forgive_frozen)

    def _frozen(self, prefix: str = "") -> set[str]:
        """Names of the base's frozen parameters and its buffers, under whatever name: what a checkpoint leaves out."""
        prompts, model, module = self._wiring.prompts, self._wiring.model, self._wiring.module
        if prompts is None:
            return set()
        kept = {id(parameter) for parameter in prompts.parameters()}
        frozen = {id(p) for p in model.parameters() if not p.requires_grad} | {id(b) for b in model.buffers()}
        tensors = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        return {prefix + name for name, tensor in tensors if id(tensor) in frozen - kept}

    def _strip_frozen(self, module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for name in self._frozen(prefix) & set(state_dict):
            del state_dict[name]

    def _check_prompts(self, module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self._load_prefix = prefix  # averaged models load the module under a name
        strict, prompts = rest[1], self._wiring.prompts
        if strict and prompts is not None:
            check_prompts(prompts, state_dict, f"{prefix}{self._wiring.name}.{SUBMODULE}.")

    def _forgive_frozen(self, module: Any, incompatible_keys: Any) -> None:
        frozen = self._frozen(self._load_prefix)
        incompatible_keys.missing_keys[:] = [name for name in incompatible_keys.missing_keys if name not in frozen]


def check_prompts(prompts: SoftPrompts, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise a `SoftPromptError` that names the task whose prompt a checkpoint lacks or holds in another shape.

    Args:
        prompts: of the run that is to go on.
        state_dict: of the checkpoint.
        prefix: in front of the names of the prompts in it.
    """
    start = prefix + KEY
    found = [task_of_parameter(key[len(prefix) :]) for key in state_dict if key.startswith(start)]
    has = f"it holds prompts of: {', '.join(map(repr, found)) or 'no task'}"
    for task in prompts.tasks:
        value = state_dict.get(prefix + parameter_name(task))
        if value is None:
            raise SoftPromptError(
                f"the checkpoint has no prompt of task {task!r}; {has}. Run with the tasks it was made with, "
                "or start this task from a saved folder with Prompt(task, folder)"
            )
        if value.shape != prompts[task].shape:
            raise SoftPromptError(
                f"the checkpoint's prompt of task {task!r} has shape {list(value.shape)}, this run's "
                f"{list(prompts[task].shape)}; give the task the length it was trained with"
            )
    unknown = [task for task in found if task not in prompts]
    if unknown:
        raise SoftPromptError(
            f"the checkpoint has a prompt of task {unknown[0]!r}, which this run does not; "
            f"its tasks: {', '.join(map(repr, prompts.tasks))}. Run with the tasks it was made with"
        )
