"""How a LightningModule that was written without soft prompts is made to train and use them.

Methods of the module's instance are wrapped, because callback hooks would not always run: Lightning's learning-rate
finder and batch-size scaler replace `trainer.callbacks` while they run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import nn
from torch.optim import Optimizer

from lightning_softprompt.attachment import routing
from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.base.support import check_model, has_language_modelling_head
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.checkpoint import ENTRY
from lightning_softprompt.prompts.task_names import parameter_name
from lightning_softprompt.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_softprompt.prompts.soft_prompts import SoftPrompts

_ATTRIBUTE = "_soft_prompt_wiring"
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class Wiring:
    """The wrapped methods of one LightningModule and its state-dict hooks.

    Args:
        module: the user's module.
        path: attribute path of the causal LM; None if the module has only one.
        attach: a function that is called with the causal LM once that exists.

    Attributes:
        made: the prompts that the owner of `attach` made for the module; None if there are none yet.
    """

    def __init__(self, module: LightningModule, path: str | None, attach: Callable[[PreTrainedModel], Any]) -> None:
        self.module = module
        self.path = path
        self.attach = attach
        self.made: SoftPrompts | None = None
        self.name = ""
        self.is_armed = False  # True in runs whose model gets prompts
        self._attached: PreTrainedModel | None = None  # the model that got them in this run
        self._originals: dict[str, Callable[..., Any]] = {}
        for step in _STEPS:
            if step == "predict_step" or is_overridden(step, module):
                self._wrap(step, self._step)
        self._wrap("configure_optimizers", self._configure_optimizers)
        self._wrap("on_save_checkpoint", self._on_save_checkpoint)
        self._wrap("configure_model", self._configure_model)
        # Lightning calls configure_model only if the module overrides it, and follows `__wrapped__` to find that out.
        del vars(module.configure_model)["__wrapped__"]
        Checkpoints(self).install()

    @classmethod
    def install(cls, module: LightningModule, path: str | None, attach: Callable[[PreTrainedModel], Any]) -> Wiring:
        """Wire `module`; if it is wired already, its wiring gets the new `path` and `attach`.

        Another owner of `attach` makes prompts of its own.
        """
        wiring = module.__dict__.get(_ATTRIBUTE)
        if wiring is None:
            wiring = cls(module, path, attach)
            module.__dict__[_ATTRIBUTE] = wiring
        if wiring.attach != attach:
            wiring.made = None
        wiring.path, wiring.attach, wiring._attached = path, attach, None
        return wiring

    def find_model(self) -> tuple[str, PreTrainedModel] | None:
        """The attribute path of the causal LM, and the LM itself; None if there is none yet.

        Raises:
            SoftPromptError: several causal LMs and no path, or something else at the given path.
        """
        outermost = _outermost_models(self.module).items()
        found = {name: model for name, model in outermost if has_language_modelling_head(model)}
        if self.path is not None:
            if self.path in found:
                return self.path, found[self.path]
            present = dict(self.module.named_modules()).get(self.path)
            if present is not None:
                raise SoftPromptError(
                    f"model={self.path!r} is a {type(present).__name__}, not a Hugging Face causal LM; causal LMs of "
                    f"{type(self.module).__name__}: {', '.join(map(repr, found)) or 'none'}"
                )
            return None
        if len(found) > 1:
            raise SoftPromptError(
                f"{type(self.module).__name__} holds several causal LMs ({', '.join(map(repr, found))}); say which one "
                f"with SoftPromptCallback(model={next(iter(found))!r})"
            )
        return next(iter(found.items()), None)

    def attach_if_built(self) -> bool:
        """Attach the prompts if the causal LM exists already; return whether it does.

        A model that got them in this run does not get them again.
        """
        found = self.find_model()
        if found is not None and found[1] is not self._attached:
            self.name, model = found
            self.attach(model)
            self._attached = model
        return found is not None

    @property
    def model(self) -> PreTrainedModel:
        """The causal LM."""
        return self.module.get_submodule(self.name)  # type: ignore[return-value]

    @property
    def prompts(self) -> SoftPrompts | None:
        """The attached prompts; None if there are none."""
        attachment = attachment_of(self.model) if self.name else None
        return attachment.prompts if attachment else None

    # ---------------------------------------------------------------- wrapped methods

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(self.module, name)
        self._originals[name] = original
        # A partial is copied with the module, a closure is not. So in a deep copy of the module, as Lightning's weight
        # averaging makes one, the wrapped methods belong to the copy.
        setattr(self.module, name, update_wrapper(partial(wrapper, name), original))

    def _step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        attachment = attachment_of(self.model) if self.name else None
        batch = args[0] if args else next(iter(kwargs.values()), None)
        if attachment is None:
            return self._originals[name](*args, **kwargs)
        with attachment.routed(routing.from_batch(batch)):
            return self._originals[name](*args, **kwargs)

    def _configure_model(self, name: str) -> None:
        self._originals[name]()
        if self.is_armed and not self.attach_if_built():
            for model in _outermost_models(self.module).values():
                check_model(model)
            where = f"at {self.path!r}" if self.path else "in it"
            raise SoftPromptError(
                f"{type(self.module).__name__} has no Hugging Face causal LM {where} after setup and configure_model; "
                "hold one as an attribute, for example self.model = AutoModelForCausalLM.from_pretrained(…)"
            )

    def _configure_optimizers(self, name: str) -> Any:
        configured = self._originals[name]()
        prompts = self.prompts
        if prompts is not None:
            put_prompts_into(list(_optimizers_of(configured)), prompts)
        return configured

    def _on_save_checkpoint(self, name: str, checkpoint: dict[str, Any]) -> None:
        self._originals[name](checkpoint)
        prompts = self.prompts
        if prompts is not None:
            checkpoint[ENTRY] = prompts.description().content()


def put_prompts_into(optimizers: list[Optimizer], prompts: SoftPrompts) -> None:
    """Make the optimizers train the prompts and no frozen parameter, whichever parameters they were made from.

    Frozen parameters are taken out of their groups. A prompt that no group holds is put into the first group of the
    first optimizer, because a group of its own would break schedulers that have one setting for each group. Within a
    group the prompts come last, in the order of their names, because a checkpoint keeps the optimizer's state by
    position.
    """
    if not optimizers:
        return
    names = {id(prompts[task]): task for task in sorted(prompts.tasks) if prompts[task].requires_grad}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for index, group in enumerate(groups):
        mine = {id(parameter) for parameter in group["params"] if id(parameter) in names}
        if index == 0:
            mine |= set(names) - held
        others = [p for p in group["params"] if p.requires_grad and id(p) not in names]
        known = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        # In place, as some optimizers hold on to this very list, such as LBFGS of PyTorch 2.13.
        group["params"][:] = others + [prompts[names[i]] for i in sorted(mine, key=names.__getitem__)]
        if "param_names" in group:  # an optimizer made from named_parameters() keeps each one's name
            group["param_names"][:] = [known.get(id(p)) or parameter_name(names[id(p)]) for p in group["params"]]


def prompts_in(optimizer: Optimizer, prompts: SoftPrompts) -> dict[str, nn.Parameter]:
    """The prompts that an optimizer holds, by task.

    They are in the order of the tasks' names, because the rounding of a sum over tasks depends on its order.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {task: prompts[task] for task in sorted(prompts) if id(prompts[task]) in held}


def prompts_outside(optimizers: list[Optimizer], prompts: SoftPrompts) -> list[str]:
    """The tasks whose prompts are trainable but in no optimizer."""
    held = {task for optimizer in optimizers for task in prompts_in(optimizer, prompts)}
    return [task for task in prompts if prompts[task].requires_grad and task not in held]


def expect_eval_mode(module: LightningModule, base: nn.Module) -> None:
    """Keep Lightning from warning of modules in eval mode, unless there are others than those of the frozen base.

    Only a warning of exactly this many is kept away, so that other modules and other runs are still warned of.
    """
    found = [each for each in module.modules() if not each.training]
    if set(found) <= set(base.modules()):
        words = rf"Found {len(found)} module\(s\) in eval mode at the start of training"
        warnings.filterwarnings("ignore", words, PossibleUserWarning)


def _optimizers_of(configured: Any) -> Iterator[Optimizer]:
    """The optimizers in any of the forms that `configure_optimizers` may return."""
    if isinstance(configured, Optimizer):  # a LightningOptimizer is one, too
        yield configured
    elif isinstance(configured, dict):
        yield from _optimizers_of(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for item in configured:
            yield from _optimizers_of(item)


def _outermost_models(module: LightningModule) -> dict[str, PreTrainedModel]:
    from transformers import PreTrainedModel

    found: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and not any(name.startswith(outer + ".") for outer in found):
            found[name] = child
    return found
