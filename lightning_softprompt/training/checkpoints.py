"""What the checkpoints of a run hold: the prompts and all else that trains, but never the frozen base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from lightning_softprompt.attachment.attachment import SUBMODULE
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.task_names import KEY, parameter_name, task_of_parameter

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_softprompt.prompts.soft_prompts import SoftPrompts
    from lightning_softprompt.training.wiring import Wiring


class Checkpoints:
    """State-dict hooks of one LightningModule that leave its frozen base out and do not require it on loading.

    They are hooks of PyTorch, because Lightning 2.6 does not call the hook `on_save_checkpoint` of callbacks when it
    saves only the weights. It calls that of the module, in which `Wiring` adds what else is known of the prompts.

    Args:
        wiring: the wiring of the module.
    """

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._load_prefix = ""

    def install(self) -> None:
        """Register the hooks with the module."""
        module = self._wiring.module
        module.register_state_dict_post_hook(partial(self._strip_frozen))
        module.register_load_state_dict_pre_hook(self._check_prompts)
        module.register_load_state_dict_post_hook(self._forgive_frozen)

    def _frozen(self, prefix: str = "") -> set[str]:
        """All names of the base's frozen parameters and of its buffers, which a checkpoint leaves out."""
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
        self._load_prefix = prefix  # not empty if the module is loaded as a submodule, as in averaged models
        strict, prompts = rest[1], self._wiring.prompts
        if strict and prompts is not None:
            check_prompts(prompts, state_dict, f"{prefix}{self._wiring.name}.{SUBMODULE}.")

    def _forgive_frozen(self, module: Any, incompatible_keys: Any) -> None:
        frozen = self._frozen(self._load_prefix)
        incompatible_keys.missing_keys[:] = [name for name in incompatible_keys.missing_keys if name not in frozen]


def check_prompts(prompts: SoftPrompts, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise a `SoftPromptError` if the tasks of a checkpoint, or the shapes of their prompts, are not those of the run.

    Args:
        prompts: the prompts of the run that is resumed.
        state_dict: the state dict of the checkpoint.
        prefix: the text in front of the prompts' parameter names in the state dict.
    """
    start = prefix + KEY
    found = [task_of_parameter(key[len(prefix) :]) for key in state_dict if key.startswith(start)]
    has = f"it holds prompts of: {', '.join(map(repr, found)) or 'no task'}"
    for task in (task for task in prompts.tasks if task not in prompts.teachers):
        value = state_dict.get(prefix + parameter_name(task))
        if value is None:
            raise SoftPromptError(
                f"the checkpoint has no prompt of task {task!r}; {has}. Run with the tasks it was made with. To "
                "train a new task beside them, leave ckpt_path out and start each old task with Prompt(task, path): "
                "path is this checkpoint, or a folder of saved prompts"
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


def group_sizes(optimizers: Iterable[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
    """How many parameters each group of each optimizer has, from the groups of all optimizers."""
    return [[len(group["params"]) for group in groups] for groups in optimizers]


def check_sizes(saved: list[list[int]], optimizers: Sequence[Optimizer], prompts: SoftPrompts) -> None:
    """Raise a `SoftPromptError` if the states that a checkpoint holds of optimizers do not fit those of the run.

    Args:
        saved: the `group_sizes` of the checkpoint.
        optimizers: those of the run that is resumed.
        prompts: those of the run.
    """
    found = group_sizes(optimizer.param_groups for optimizer in optimizers)
    if saved == found:
        return
    frozen = [task for task in prompts if not prompts[task].requires_grad]
    raise SoftPromptError(
        f"the groups of the checkpoint's optimizers have {saved} parameters, those of this run {found}, so that their "
        f"states cannot go on; frozen tasks here: {', '.join(map(repr, frozen)) or 'none'}. Freeze before fit "
        "what was frozen when those optimizers were made, or start a new run with "
        "SoftPromptCallback(SoftPrompts.from_checkpoint(path)), without ckpt_path"
    )
