"""`attach` and `detach`: soft prompts in front of the rows of a Hugging Face causal LM, in place. Plain PyTorch.

An attached model speaks of the text alone: ids, masks, positions, labels, logits and cache lengths have the text's
columns, and so everything built on a model works on it unchanged. Three hooks do it. Before a forward pass the rows
are laid out by `prompt_concat`, and the model is handed ids of that width, with placeholders where prompts stand;
after its input embedding the laid-out embeddings take the place of those ids' own; after the pass, outputs are
brought back to the text's columns. Placeholder ids serve models whose generation refuses `inputs_embeds`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_softprompt.attachment import caches, routing, row_by_row
from lightning_softprompt.attachment.call import check_generation, check_inputs, input_tensor, new_columns
from lightning_softprompt.attachment.forward_pass import ForwardPass
from lightning_softprompt.attachment.gradient_checkpointing import GradientCheckpointing
from lightning_softprompt.attachment.prefix import Prefixes
from lightning_softprompt.attachment.prefix_choice import PrefixPolicy, new_cache
from lightning_softprompt.attachment.substitution import Substitution
from lightning_softprompt.base.support import check_model
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")

_ATTRIBUTE = "soft_prompt_attachment"
SUBMODULE = "soft_prompts"


def attach(model: Model, prompts: SoftPrompts, prefix: str = "auto", logits: str = "all") -> Model:
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
    if prefix not in ("auto", "always", "never"):
        raise SoftPromptError(f"prefix must be 'auto', 'always' or 'never', got {prefix!r}")
    if logits not in ("all", "labels"):
        raise SoftPromptError(f"logits must be 'all' or 'labels', got {logits!r}")
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
    """Prompts attached to a model: the hooks, the routing, and which tasks had rows.

    Attributes:
        prompts: the attached prompts.
        present: names of the tasks with rows in a forward pass that recorded gradients, since last cleared.
        recent: likewise, for those that look at every backward pass.
        was_called: whether a forward pass went through since last set to False.
        prefixes: what is kept of the prompts' keys and values.
    """

    def __init__(self, model: PreTrainedModel, prompts: SoftPrompts, prefix: str, logits: str) -> None:
        self.model = model
        self.prompts = prompts
        self.logits = logits
        self.present: set[str] = set()
        self.recent: set[str] = set()
        self.was_called = False
        self._traits = ModelTraits.of(model)
        self._gradient_checkpointing = GradientCheckpointing(model)
        self._ambient: tuple[int, ...] | None = None
        self._repeats = False
        self._to_come = 0
        self._pass: Substitution | None = None
        self._policy = PrefixPolicy(self._traits, prompts, prefix)
        self.prefixes = Prefixes(self._traits, prompts, self._run_prompts)
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._modes = {name: module.training for name, module in model.named_modules()}
        model.requires_grad_(False)
        model.eval()
        embedding = model.get_input_embeddings()
        prompts.to(next(embedding.parameters()).device)
        model.add_module(SUBMODULE, prompts)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            embedding.register_forward_hook(self._after_embedding),
            model.get_output_embeddings().register_forward_pre_hook(self._before_head),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            model.register_state_dict_post_hook(_leave_prompts_out),
            model.register_load_state_dict_post_hook(_do_not_miss_prompts),
        ]
        model.__dict__["generate"] = self._generate

    def remove(self) -> None:
        """Take everything off the model again."""
        for handle in self._handles:
            handle.remove()
        del self.model.__dict__["generate"]
        del self.model._modules[SUBMODULE]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        for name, module in self.model.named_modules():
            module.training = self._modes.get(name, module.training)

    @contextmanager
    def routed(self, route: routing.Routing | None, repeats: bool = False, to_come: int = 0) -> Iterator[None]:
        """Route the forward passes inside that name no tasks themselves.

        Args:
            route: the tasks of the rows; None changes nothing.
            repeats: rows may stand several times in place, as beams do.
            to_come: columns of text that will follow.
        """
        before = self._ambient, self._repeats, self._to_come
        resolved = routing.resolve(self.prompts, route)
        if resolved is not None:
            self._ambient = resolved
        self._repeats, self._to_come = repeats, to_come
        try:
            yield
        finally:
            self._ambient, self._repeats, self._to_come = before

    def _generate(self, *args: Any, task_ids: Any = None, tasks: Any = None, **kwargs: Any) -> Any:
        text = input_tensor(args, kwargs)
        if text is not None and kwargs.get("attention_mask") is None:
            # Without a mask, `generate` guesses one from the pad token, which is often the end-of-text token.
            kwargs["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
        # A compiled pass would trace through the hooks.
        kwargs.setdefault("disable_compile", True)
        config = kwargs.get("generation_config") or self.model.generation_config
        check_generation(kwargs, config)
        route = routing.from_batch({"task_ids": task_ids, "tasks": tasks})
        to_come = 0 if text is None else new_columns(kwargs, config, text.shape[1])
        with self.routed(route, repeats=True, to_come=to_come), caches.masks_built_in_forward(self.model):
            if text is not None and self._ambient is not None:
                # Rows may be repeated inside, as beams are, but every row given has a task of its own.
                routing.tasks_of_rows(self.prompts, self._ambient, text.shape[0], repeats=False)
            # A second positional argument may be anything; what is not understood is left to the batch.
            is_padded_right = self._traits.padding_side == "right"
            if text is not None and len(args) < 2 and is_padded_right and row_by_row.can_run(text, kwargs):
                tasks_of_rows = routing.tasks_of_rows(self.prompts, self._ambient, text.shape[0], repeats=False)
                lengths = [0 if task < 0 else self.prompts.lengths[task] for task in tasks_of_rows]
                if row_by_row.is_ragged(kwargs["attention_mask"], torch.tensor(lengths)):
                    return row_by_row.generate(self._generate_row, text, tasks_of_rows, kwargs, config)
            return cast(Any, type(self.model)).generate(self.model, *args, **kwargs)

    def _generate_row(self, task: int, **options: Any) -> Any:
        with self.routed(torch.tensor([task]), repeats=True):
            return cast(Any, type(self.model)).generate(self.model, **options)

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        if model.training:
            model.eval()
        self.was_called = True
        self._gradient_checkpointing.end()
        if isinstance(self._pass, ForwardPass):  # an interrupted pass never came to its end
            caches.hide_prompt_columns(self._pass.cache)
        self._pass = None
        given = {name: kwargs.pop(name, None) for name in ("task_ids", "tasks")}
        explicit = routing.resolve(self.prompts, routing.from_batch(given))
        call = {**dict(zip(self._traits.arguments, args, strict=False)), **kwargs}
        check_inputs(model, call)
        text = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        cache = caches.find(call)
        layout = caches.remembered(cache)
        caches.reveal_prompt_columns(cache)
        try:
            if layout is None:
                self._pass = self._insert(call, cache, explicit, rows=text.shape[0])
            else:
                layout = layout.of_rows(text.shape[0], explicit)
                self._pass = ForwardPass.continuing(self._traits, call, cache, layout)
        except BaseException:
            caches.hide_prompt_columns(cache)
            raise
        if torch.is_grad_enabled() and self._gradient_checkpointing.is_on:
            if "use_cache" in self._traits.arguments:
                call["use_cache"] = False  # a layer that runs twice would fill it twice
            self._gradient_checkpointing.begin()
        return (), call

    def _insert(self, call: dict[str, Any], cache: Any, explicit: tuple[int, ...] | None, rows: int) -> ForwardPass:
        caches.check_can_continue(cache)
        tasks = routing.tasks_of_rows(
            self.prompts, explicit if explicit is not None else self._ambient, rows, self._repeats
        )
        active = self.prompts.distinct(tasks)
        if torch.is_grad_enabled():
            names = {self.prompts.tasks[task] for task in active}
            self.present |= names
            self.recent |= names
        recomputes = torch.is_grad_enabled() and self._gradient_checkpointing.is_on
        if self._policy.applies(call, cache, tasks, self._to_come, recomputes):
            prefix = self.prefixes.of_tasks(active)
            cache = new_cache(self._traits) if cache is None else cache
            most_columns = self._policy.most_columns(call)
            return ForwardPass.behind_prefix(
                self._traits, call, cache, prefix, active, tasks, self.logits, most_columns
            )
        return ForwardPass.inserting(self._traits, call, cache, self.prompts, tasks, self.logits)

    def _run_prompts(self, call: dict[str, Any], this: Substitution) -> Any:
        self._pass = this
        try:
            return self.model.forward(**call)
        finally:
            self._pass = None

    def _after_embedding(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if self._pass is None else self._pass.replace_embeddings(output)

    def _before_head(self, head: nn.Module, args: Any) -> Any:
        if self._pass is None or self._pass.scored is None or not args:
            return None
        return (self._pass.select_hidden(args[0]), *args[1:])

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        this, self._pass = self._pass, None
        self._gradient_checkpointing.end()
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
