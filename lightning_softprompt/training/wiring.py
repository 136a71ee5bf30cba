"""How a LightningModule that has never heard of soft prompts is made to train and serve them.

Everything stands on the module's instance, not in callback hooks: the learning-rate finder and the batch-size
scaler replace `trainer.callbacks` while they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_softprompt.attachment import routing
from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.base.support import check_model, has_language_modelling_head
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.task_names import parameter_name
from lightning_softprompt.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_softprompt.prompts.soft_prompts import SoftPrompts

_ATTRIBUTE = "_soft_prompt_wiring"
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class Wiring:
    """The wrapped methods of one LightningModule, and what its checkpoints hold.

    Args:
        module: the user's module.
        path: attribute path of the causal LM, or None to find the only one.
        attach: called with the causal LM once it exists.
    """

    def __init__(self, module: LightningModule, path: str | None, attach: Callable[[PreTrainedModel], None]) -> None:
        self.module = module
        self.path = path
        self.attach = attach
        self.name = ""
        self.is_armed = False  # from a run's setup until the model is attached
        self._originals: dict[str, Callable[..., Any]] = {}
        for step in _STEPS:
            if step == "predict_step" or is_overridden(step, module):
                self._wrap(step, self._step)
        self._wrap("configure_optimizers", self._configure_optimizers)
        self._wrap("configure_model", self._configure_model)
        # Lightning calls this hook only where it is overridden, and now it always is.
        del vars(module.configure_model)["__wrapped__"]
        Checkpoints(self).install()

    @classmethod
    def install(cls, module: LightningModule, path: str | None, attach: Callable[[PreTrainedModel], None]) -> Wiring:
        """Wire `module`, or give the wiring it has to another callback."""
        wiring = module.__dict__.get(_ATTRIBUTE)
        if wiring is None:
            wiring = cls(module, path, attach)
            module.__dict__[_ATTRIBUTE] = wiring
        wiring.path, wiring.attach, wiring.is_armed = path, attach, True
        return wiring

    def find_model(self) -> tuple[str, PreTrainedModel] | None:
        """The causal LM and its attribute path; None where there is none yet.

        Raises:
            SoftPromptError: several, or something else at the given path.
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
        """Attach to the causal LM if there is one already."""
        found = self.find_model()
        if found is not None:
            self.name, model = found
            self.attach(model)
            self.is_armed = False
        return found is not None

    @property
    def model(self) -> PreTrainedModel:
        """The causal LM."""
        return self.module.get_submodule(self.name)  # type: ignore[return-value]

    @property
    def prompts(self) -> SoftPrompts | None:
        """The attached prompts, or None."""
        attachment = attachment_of(self.model) if self.name else None
        return attachment.prompts if attachment else None

    # ---------------------------------------------------------------- wrapped methods

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(self.module, name)
        self._originals[name] = original
        # A partial, not a closure: a deep copy of the module (weight averaging makes one) is then wired to itself.
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


def put_prompts_into(optimizers: list[Optimizer], prompts: SoftPrompts) -> None:
    """Make the optimizers train the prompts and nothing frozen, whatever they were made over.

    Frozen parameters leave their groups. A prompt that no group holds goes into the first group of the first
    optimizer: a group of its own would break schedulers that go over the groups one by one. Inside a group prompts
    stand last, by name, so that a checkpoint's optimizer state, which goes by position, finds its task.
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
        group["params"] = others + [prompts[names[i]] for i in sorted(mine, key=names.__getitem__)]
        if "param_names" in group:  # an optimizer made from named_parameters() keeps a name for each
            group["param_names"] = [known.get(id(p)) or parameter_name(names[id(p)]) for p in group["params"]]


def prompts_outside(optimizers: list[Optimizer], prompts: SoftPrompts) -> list[str]:
    """Trainable tasks whose prompt no optimizer holds."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [task for task in prompts if prompts[task].requires_grad and id(prompts[task]) not in held]


def _optimizers_of(configured: Any) -> Iterator[Optimizer]:
    """The optimizers in whatever form `configure_optimizers` may return them."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, LightningOptimizer):
        yield configured.optimizer
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
