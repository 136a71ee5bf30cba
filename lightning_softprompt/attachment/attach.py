"""`attach` and `detach`: soft prompts in front of the rows of a Hugging Face causal LM, in place. Plain PyTorch.

An attached model speaks of the text alone: ids, masks, positions, labels, logits and cache lengths have the text's
columns, and so everything built on a model works on it unchanged. Three hooks do it. Before a forward pass the rows
are laid out by `prompt_concat`, and the model is handed ids of that width, with placeholders where prompts stand;
after its input embedding the laid-out embeddings take the place of those ids' own; after the pass, outputs are
brought back to the text's columns. Placeholder ids serve models whose generation refuses `inputs_embeds`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_softprompt.attachment import caches, routing
from lightning_softprompt.attachment.call import Call
from lightning_softprompt.attachment.forward_pass import ForwardPass
from lightning_softprompt.attachment.generation import generate
from lightning_softprompt.attachment.gradient_checkpointing import GradientCheckpointing
from lightning_softprompt.attachment.lock import Lock
from lightning_softprompt.attachment.loss import LogitsChoice
from lightning_softprompt.attachment.prefix import Prefixes
from lightning_softprompt.attachment.prefix_choice import PrefixChoice, PrefixPolicy, new_cache
from lightning_softprompt.attachment.presence import Presence
from lightning_softprompt.attachment.routing import Route
from lightning_softprompt.attachment.running import PASSES, route_of, set_route
from lightning_softprompt.attachment.substitution import Substitution
from lightning_softprompt.base.support import check_model
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError, check_choice
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")

_ATTRIBUTE = "soft_prompt_attachment"
SUBMODULE = "soft_prompts"


def attach(model: Model, prompts: SoftPrompts, prefix: PrefixChoice = "auto", logits: LogitsChoice = "all") -> Model:
    """Put `prompts` in front of the rows of `model`, in place.

    Afterwards `model(input_ids=…, attention_mask=…, labels=…, task_ids=…)` and `model.generate(…, task_ids=…)` take
    one task a row (int64 `[batch]`, -1 for none, or `tasks=[names]`) and return what they always return, at the
    columns of the input. The base is frozen and kept in eval mode; the prompts become its submodule
    `soft_prompts`, which its state dict leaves out.

    Args:
        model: any Hugging Face decoder-only model with a language-modelling head.
        prompts: made for this base model.
        prefix: "auto": where that is exact and pays, a prompt is computed once for a task, as attention keys and
            values that all its rows share; elsewhere it stands in every row's sequence. "always" raises where it is
            not exact, "never" puts all prompts into the sequence.
        logits: "all", or "labels": with labels given, logits are computed where a label is alone, and the output
            carries the loss and no logits.

    Returns:
        `model`.

    Raises:
        SoftPromptError: a model that cannot take soft prompts, or prompts of another base model; a model that takes
            no prefix, with "always".

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_softprompt import SoftPrompts, Tokens
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> text = torch.tensor([[9, 8, 7]])
        >>> hard = model(torch.tensor([[5, 6, 9, 8, 7]])).logits[:, 2:]
        >>> _ = attach(model, SoftPrompts.for_model(model, {"toy": Tokens([5, 6])}))
        >>> torch.allclose(model(text, task_ids=torch.tensor([0])).logits, hard, atol=1e-6)
        True
    """
    check_model(model)
    if attachment_of(model) is not None:
        raise SoftPromptError("this model has soft prompts attached already; call detach(model) first")
    check_choice("prefix", prefix, PrefixChoice)
    check_choice("logits", logits, LogitsChoice)
    if not isinstance(prompts, SoftPrompts):
        raise SoftPromptError(f"prompts must be SoftPrompts, got {type(prompts).__name__}; make them with for_model")
    prompts.check_fits(model)
    setattr(model, _ATTRIBUTE, Attachment(model, prompts, prefix, logits))
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the model is what it was, its parameters' `requires_grad` and its modes included.

    Returns:
        `model`.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise SoftPromptError("this model has no soft prompts attached; there is nothing to detach")
    attachment.remove()
    delattr(model, _ATTRIBUTE)
    return model


def attachment_of(model: nn.Module) -> Attachment | None:
    """What `attach` left on `model`, or None."""
    return model.__dict__.get(_ATTRIBUTE)


class Attachment:
    """Prompts attached to a model: the hooks, and what they need to know. Nothing of a call is kept here.

    Attributes:
        model: the causal LM.
        prompts: the attached prompts.
        traits: of the model.
        presence: which tasks had rows in passes that recorded gradients.
        prefixes: what is kept of the prompts' keys and values.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: SoftPrompts, prefix: PrefixChoice, logits: LogitsChoice
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.logits = logits
        self.presence = Presence()
        self.traits = ModelTraits.of(model)
        self._gradient_checkpointing = GradientCheckpointing(model, self._recomputes)
        self._policy = PrefixPolicy(self.traits, prompts, prefix)
        self.prefixes = Prefixes(self.traits, prompts, self._run_prompts)
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._modes = {name: module.training for name, module in model.named_modules()}
        model.requires_grad_(False)
        model.eval()
        prompts.to(next(model.get_input_embeddings().parameters()).device)
        model.add_module(SUBMODULE, prompts)
        self._lock = Lock()
        self._ends: tuple[nn.Module, nn.Module] | None = None
        self._handles_of_ends: list[Any] = []
        self._hook_ends()
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            model.register_state_dict_post_hook(_leave_prompts_out),
            model.register_load_state_dict_post_hook(_do_not_miss_prompts),
        ]
        self._replaced: dict[str, Any] = {
            "generate": self._generate,
            "train": self._stay_in_eval_mode,
            "create_masks_for_generate": caches.given_mask,
        }
        self._before = {name: model.__dict__[name] for name in self._replaced if name in model.__dict__}
        model.__dict__.update(self._replaced)

    def remove(self) -> None:
        """Take everything off the model again."""
        for handle in (*self._handles, *self._handles_of_ends):
            handle.remove()
        for name in self._replaced:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self._before)
        PASSES.end(self)  # one that was interrupted in this thread
        self._gradient_checkpointing.remove()
        del self.model._modules[SUBMODULE]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        for name, module in self.model.named_modules():
            module.training = self._modes.get(name, module.training)

    @contextmanager
    def routed(self, given: routing.Routing | None, repeats: bool = False, columns_to_come: int = 0) -> Iterator[Route]:
        """Route the passes inside, in this thread or asyncio task, that name no tasks themselves.

        Args:
            given: the tasks of the rows; None: as it is around.
            repeats: rows may stand several times in place, as beams do.
            columns_to_come: columns of text that will follow.
        """
        ids = routing.resolve(self.prompts, given)
        around = route_of(self)
        route = Route(around.ids if ids is None and around else ids, repeats, columns_to_come)
        set_route(self, route)
        try:
            yield route
        finally:
            set_route(self, around)

    def _hook_ends(self) -> None:
        """Put the hooks on the embedding and the head; again where they were replaced or wrapped since."""
        ends = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        with self._lock:
            if self._ends is not None and all(map(operator.is_, ends, self._ends)):
                return
            for handle in self._handles_of_ends:
                handle.remove()
            self._handles_of_ends = [
                ends[0].register_forward_hook(self._after_embedding),
                ends[1].register_forward_pre_hook(self._before_head),
            ]
            self._ends = ends

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's `generate`."""
        return generate(self, *args, **kwargs)

    def _stay_in_eval_mode(self, mode: bool = True) -> PreTrainedModel:
        """In place of the model's `train`, which another thread may call while a pass runs."""
        own: Any = type(self.model)
        return own.train(self.model, False)

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        self._hook_ends()
        interrupted = PASSES.end(self)
        if isinstance(interrupted, ForwardPass):  # never came to its end
            caches.hide_prompt_columns(interrupted.cache)
        given = {name: kwargs.pop(name, None) for name in ("task_ids", "tasks")}
        explicit = routing.resolve(self.prompts, routing.from_batch(given))
        call = Call.of(model, self.traits.arguments, args, kwargs)
        layout = caches.remembered(call.cache)
        recomputes = torch.is_grad_enabled() and self._gradient_checkpointing.is_on
        caches.reveal_prompt_columns(call.cache)
        try:
            if layout is None:
                this = self._insert(call, explicit, recomputes)
            else:
                layout = layout.of_rows(len(call.text), explicit)
                this = ForwardPass.continuing(self.traits, call, call.cache, layout)
        except BaseException:
            caches.hide_prompt_columns(call.cache)
            raise
        if recomputes and "use_cache" in self.traits.arguments:
            this.arguments["use_cache"] = False  # a layer that runs twice would fill it twice
        this.recomputes = recomputes
        PASSES.begin(this, self)
        return (), this.arguments

    def _insert(self, call: Call, explicit: tuple[int, ...] | None, recomputes: bool) -> ForwardPass:
        caches.check_can_continue(call.cache)
        route = route_of(self) or Route()
        route = route if explicit is None else replace(route, ids=explicit)
        rows = routing.rows_of(self.prompts, route, len(call.text))
        trained = rows.active if torch.is_grad_enabled() else ()
        self.presence.count(self.prompts.tasks[task] for task in trained)
        if self._policy.applies(call, rows, route.columns_to_come, recomputes):
            prefix = self.prefixes.of_tasks(rows.active)
            cache = new_cache(self.traits) if call.cache is None else call.cache
            most_columns = self._policy.most_columns(call)
            return ForwardPass.behind_prefix(self.traits, call, cache, prefix, rows, self.logits, most_columns)
        return ForwardPass.inserting(self.traits, call, self.prompts, rows, self.logits)

    def _run_prompts(self, arguments: dict[str, Any], this: Substitution) -> Any:
        PASSES.begin(this, self)
        try:
            return self.model.forward(**arguments)
        finally:
            PASSES.end(self)

    def _recomputes(self) -> bool:
        this = PASSES.innermost
        return this is not None and this.owner is self and this.recomputes

    def _after_embedding(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor:
        this = PASSES.innermost
        return output if this is None or this.owner is not self else this.replace_embeddings(output)

    def _before_head(self, head: nn.Module, args: Any) -> Any:
        this = PASSES.innermost
        if this is None or this.owner is not self or this.scored is None or not args:
            return None
        return (this.select_hidden(args[0]), *args[1:])

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        this = PASSES.end(self)
        if not isinstance(this, ForwardPass):
            return output
        if output is None:  # the pass raised
            caches.hide_prompt_columns(this.cache)
            return None
        return this.finish(output)


def _leave_prompts_out(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    # Asked for by itself, the model's state is the base's; inside a LightningModule, the prompts belong to that.
    if prefix == "":
        for name in [name for name in state_dict if name.startswith(SUBMODULE + ".")]:
            del state_dict[name]


def _do_not_miss_prompts(model: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if not name.startswith(SUBMODULE + ".")]
