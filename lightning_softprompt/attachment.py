"""`attach` and `detach`: soft prompts in front of the rows of a Hugging Face causal LM, in place. Plain PyTorch.

An attached model speaks of the text alone: ids, masks, positions, labels, logits and cache lengths have the text's
columns, and so everything built on a model works on it unchanged. Three hooks do it. Before a forward pass the rows
are laid out by `prompt_concat`, and the model is handed ids of that width, with placeholders where prompts stand;
after its input embedding the laid-out embeddings take the place of those ids' own; after the pass, outputs are
brought back to the text's columns. Placeholder ids serve models whose generation refuses `inputs_embeds`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from softprompt_kernels import PromptConcat, prompt_concat
from torch import Tensor, nn

from lightning_softprompt import caches, routing
from lightning_softprompt.compatibility import check_model, check_prompts, position_offset
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.init import special_ids, vocabulary_size
from lightning_softprompt.inputs import check_inputs, input_tensor
from lightning_softprompt.layout import Layout
from lightning_softprompt.prompts import SoftPrompts

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
        prefix: "auto" or "never". Prompts stand in the sequence; "always" is not available yet.
        logits: "all", or "labels": with labels given, logits are computed where a label is alone, and the output
            carries the loss and no logits.

    Returns:
        `model`.

    Raises:
        SoftPromptError: a model that cannot take soft prompts, or prompts of another base model.

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
    if prefix not in ("auto", "never"):
        more = ": the prefix route is not available yet; use 'auto'" if prefix == "always" else ""
        raise SoftPromptError(f"prefix must be 'auto' or 'never', got {prefix!r}{more}")
    if logits not in ("all", "labels"):
        raise SoftPromptError(f"logits must be 'all' or 'labels', got {logits!r}")
    check_prompts(model, prompts)
    setattr(model, _ATTRIBUTE, Attachment(model, prompts, logits))
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


@dataclass
class _Call:
    """One forward pass under way."""

    cache: Any
    layout: Layout
    inserts: bool = False
    embeds: Tensor | None = None
    keeps_logits: bool = False
    selected: Any = None
    targets: Tensor | None = None
    loss_arguments: dict[str, Any] | None = None
    drops_logits: bool = False
    as_tuple: bool = False


class Attachment:
    """Prompts attached to a model: the hooks, and which tasks had rows.

    Attributes:
        prompts: the attached prompts.
        present: names of the tasks with rows in a forward pass that recorded gradients, since last cleared.
    """

    def __init__(self, model: PreTrainedModel, prompts: SoftPrompts, logits: str) -> None:
        self.model = model
        self.prompts = prompts
        self.logits = logits
        self.present: set[str] = set()
        self._signature = inspect.signature(model.forward)
        self._offset = position_offset(model)
        # Models that take no positions count columns or read pads; their rows begin at the first column.
        self._side = "left" if "position_ids" in self._signature.parameters else "right"
        excluded = special_ids(model)
        self._placeholder = next((i for i in range(vocabulary_size(model)) if i not in excluded), 0)
        self._ambient: tuple[int, ...] | None = None
        self._repeats = False
        self._call: _Call | None = None
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
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            model.register_state_dict_post_hook(_leave_prompts_out),
            model.register_load_state_dict_post_hook(_do_not_miss_prompts),
        ]
        model.generate = self._generate

    def remove(self) -> None:
        """Take everything off the model again."""
        for handle in self._handles:
            handle.remove()
        del self.model.generate
        del self.model._modules[SUBMODULE]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        for name, module in self.model.named_modules():
            module.training = self._modes.get(name, module.training)

    @contextmanager
    def routed(self, route: routing.Routing | None, repeats: bool = False) -> Iterator[None]:
        """Route the forward passes inside that name no tasks themselves.

        Args:
            route: the tasks of the rows; None changes nothing.
            repeats: rows may stand several times in place, as beams do.
        """
        before = self._ambient, self._repeats
        resolved = routing.resolve(self.prompts, route)
        if resolved is not None:
            self._ambient = resolved
        self._repeats = repeats
        try:
            yield
        finally:
            self._ambient, self._repeats = before

    # ---------------------------------------------------------------- generation

    def _generate(self, *args: Any, task_ids: Any = None, tasks: Any = None, **kwargs: Any) -> Any:
        route = task_ids if task_ids is not None else tasks
        text = input_tensor(args, kwargs)
        if text is not None and kwargs.get("attention_mask") is None:
            # Without a mask, `generate` guesses one from the pad token, which is often the end-of-text token.
            kwargs["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
        # The mask of a static cache is built from the text's columns before the forward pass; the pass itself
        # builds it from the laid-out ones. A compiled pass would trace through the hooks.
        kwargs.setdefault("disable_compile", True)
        build_masks = self.model.__dict__.get("create_masks_for_generate")
        self.model.create_masks_for_generate = _given_mask
        try:
            with self.routed(route, repeats=True):
                return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            del self.model.create_masks_for_generate
            if build_masks is not None:
                self.model.create_masks_for_generate = build_masks

    # ---------------------------------------------------------------- the forward pass

    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        if model.training:
            model.eval()
        given = {name: kwargs.pop(name, None) for name in ("task_ids", "tasks")}
        call = self._bind(args, kwargs)
        route = given["task_ids"] if given["task_ids"] is not None else given["tasks"]
        check_inputs(model, call)
        cache = caches.find(call)
        caches.show_all(cache)
        explicit = routing.resolve(self.prompts, route)
        layout = caches.remembered(cache)
        as_tuple = call.get("return_dict") is False or (
            call.get("return_dict") is None and not getattr(model.config, "return_dict", True)
        )
        try:
            if layout is None:
                self._call = self._insert(call, cache, explicit)
            else:
                self._call = self._continue(call, cache, layout, explicit)
        except BaseException:
            caches.show_text(cache)
            raise
        if as_tuple:
            call["return_dict"] = True
            self._call.as_tuple = True
        return (), call

    def _bind(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        if not args:
            return dict(kwargs)
        names = list(self._signature.parameters)
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _tasks_of_rows(self, explicit: tuple[int, ...] | None, rows: int) -> tuple[int, ...]:
        found = explicit if explicit is not None else self._ambient
        if found is None:
            if len(self.prompts) != 1:
                raise SoftPromptError(
                    f"there are {len(self.prompts)} tasks and nothing says which row is which; {routing.HOW_TO_ROUTE}"
                )
            return (0,) * rows
        if len(found) == rows:
            return found
        if self._repeats and len(found) and rows % len(found) == 0:
            return tuple(task for task in found for _ in range(rows // len(found)))
        raise SoftPromptError(f"{len(found)} tasks were given for {rows} rows; {routing.HOW_TO_ROUTE}")

    def _insert(self, call: dict[str, Any], cache: Any, explicit: tuple[int, ...] | None) -> _Call:
        """Lay the rows out with their prompts."""
        if caches.is_filled(cache):
            raise SoftPromptError(
                "the cache was not filled through this attachment, so its rows have no prompts; start with an empty one"
            )
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        text = embeds if ids is None else self.model.get_input_embeddings()(ids)
        rows, length = text.shape[:2]
        tasks = self._tasks_of_rows(explicit, rows)
        mask = call.get("attention_mask")
        if mask is None:
            mask = torch.ones(rows, length, dtype=torch.int64, device=text.device)
        out, layout = self._lay_out(text, mask.to(text.device), call.get("labels"), tasks)
        caches.make_room(cache, self.model, layout.extra)
        if ids is None:
            call["inputs_embeds"] = out.inputs_embeds
        else:
            call["input_ids"] = layout.place(ids, self._placeholder)
        self._set_mask(call, out.attention_mask)
        self._set_positions(call, layout, out.position_ids)
        record = _Call(cache, layout, inserts=True, embeds=None if ids is None else out.inputs_embeds)
        if out.labels is not None:
            call["labels"] = out.labels
            self._score_labels_alone(call, record, out.labels)
        self._select_logits(call, record)
        return record

    def _lay_out(
        self, text: Tensor, mask: Tensor, labels: Tensor | None, tasks: tuple[int, ...]
    ) -> tuple[PromptConcat, Layout]:
        active = sorted({task for task in tasks if task >= 0})
        lengths = self.prompts.lengths
        longest = max((lengths[task] for task in active), default=0)
        prompts, offsets = self.prompts.packed(active)
        place = {task: index for index, task in enumerate(active)}
        out = prompt_concat(
            text,
            None,
            prompts.to(text.device),
            offsets.to(text.device),
            torch.tensor([place.get(task, -1) for task in tasks], device=text.device),
            mask,
            labels,
            padding_side=self._side,
            max_prompt_length=longest,
        )
        if torch.is_grad_enabled():
            self.present.update(self.prompts.tasks[task] for task in active)
        prompt_lengths = torch.tensor([lengths[task] if task >= 0 else 0 for task in tasks], device=text.device)
        first = ((mask != 0).cumsum(1) == 0).sum(1)
        is_left = self._side == "left"
        shift = torch.full_like(first, longest) if is_left else prompt_lengths - first
        layout = Layout(tasks, prompt_lengths, first, shift, out.attention_mask, text.shape[1], is_left)
        return out, layout

    def _continue(self, call: dict[str, Any], cache: Any, layout: Layout, explicit: tuple[int, ...] | None) -> _Call:
        """Add new columns of text behind a cache whose prompts stand in it already."""
        values = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        rows, new = values.shape[:2]
        if not layout.task_ids or rows % len(layout.task_ids):
            raise SoftPromptError(f"the cache holds {len(layout.task_ids)} rows, the input {rows}; pass the same rows")
        layout = layout.repeated(rows)
        if explicit is not None and explicit != layout.task_ids:
            raise SoftPromptError(
                f"the cache was filled for tasks {list(layout.task_ids)}, the call names {list(explicit)}; "
                "pass the same tasks or none, or start with an empty cache"
            )
        if self._side == "right" and layout.has_inner_pads:
            raise SoftPromptError(
                f"{type(self.model).__name__} takes no position_ids, so rows of different lengths cannot be continued "
                "in one batch; run rows of equal prompt and text length together, or one by one"
            )
        mask = call.get("attention_mask")
        cached = caches.length(cache)
        columns = mask.shape[1] if mask is not None else (0 if cached is None else cached - layout.extra) + new
        if mask is not None and cached is not None and columns != cached - layout.extra + new:
            raise SoftPromptError(
                f"attention_mask has {columns} columns; the cache holds {cached - layout.extra} columns of text and "
                f"{new} are new: pass the mask of the whole text, {cached - layout.extra + new} columns"
            )
        laid_out = layout.continued_mask(mask, columns)
        self._set_mask(call, laid_out)
        positions = ((laid_out != 0).cumsum(1) - 1).clamp(min=0)[:, -new:]
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"] + layout.prompt_lengths[:, None]
        elif "position_ids" in self._signature.parameters:
            call["position_ids"] = positions + self._offset
        return _Call(cache, layout)

    def _set_mask(self, call: dict[str, Any], mask: Tensor) -> None:
        if "attention_mask" in self._signature.parameters:
            call["attention_mask"] = mask

    def _set_positions(self, call: dict[str, Any], layout: Layout, positions: Tensor) -> None:
        given = call.get("position_ids")
        if given is not None:
            shifted = given.expand(len(layout.task_ids), -1) + layout.prompt_lengths[:, None]
            call["position_ids"] = layout.place(shifted, positions + self._offset)
        elif "position_ids" in self._signature.parameters:
            call["position_ids"] = positions + self._offset

    def _score_labels_alone(self, call: dict[str, Any], record: _Call, labels: Tensor) -> None:
        """With `logits="labels"`: have logits computed at the columns that predict a label alone."""
        if self.logits != "labels":
            return
        record.drops_logits = True
        config = self.model.config
        adds_to_loss = call.get("output_router_logits", getattr(config, "output_router_logits", False))
        usual_loss = getattr(self.model, "loss_type", None) == "ForCausalLM"
        if not usual_loss or adds_to_loss or "logits_to_keep" not in self._signature.parameters:
            return
        columns = (labels[:, 1:] != -100).any(0).nonzero()[:, 0]
        record.targets = labels[:, columns + 1]
        record.loss_arguments = {"num_items_in_batch": call.get("num_items_in_batch")}
        record.keeps_logits = True
        call["logits_to_keep"] = columns
        del call["labels"]

    def _select_logits(self, call: dict[str, Any], record: _Call) -> None:
        """Translate `logits_to_keep` to the laid-out columns, or keep it for the outputs."""
        keep = call.get("logits_to_keep")
        if record.keeps_logits or keep is None or (isinstance(keep, int) and keep == 0):
            return
        if record.layout.is_left and "logits_to_keep" in self._signature.parameters:
            record.keeps_logits = True
            if isinstance(keep, Tensor):
                call["logits_to_keep"] = keep + record.layout.extra
        else:
            record.selected = call.pop("logits_to_keep")

    def _after_embedding(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor:
        call = self._call
        if call is None or call.embeds is None or output.shape[:-1].numel() != call.embeds.shape[:-1].numel():
            return output
        embeds, call.embeds = call.embeds, None
        return embeds.view_as(output)

    def _after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call, self._call = self._call, None
        if call is None:
            return output
        if output is None:  # the pass raised
            caches.show_text(call.cache)
            return None
        if call.embeds is not None:
            raise SoftPromptError(
                f"{type(model).__name__} does not look its ids up in get_input_embeddings(), so a soft prompt cannot "
                "stand in front of its rows"
            )
        caches.remember(caches.find(output) or call.cache, call.layout)
        if call.inserts:
            self._extract_outputs(call, output)
        return output.to_tuple() if call.as_tuple else output

    def _extract_outputs(self, call: _Call, output: Any) -> None:
        layout = call.layout
        if call.targets is not None:
            logits = output.logits
            output.loss = self.model.loss_function(
                logits=logits,
                labels=None,
                vocab_size=logits.shape[-1],
                shift_labels=call.targets,
                **(call.loss_arguments or {}),
            )
        if call.drops_logits:
            output.logits = None
        elif not call.keeps_logits:
            logits = layout.extract(output.logits, 1)
            if call.selected is not None:
                logits = logits[:, -call.selected :] if isinstance(call.selected, int) else logits[:, call.selected]
            output.logits = logits
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(layout.extract(states, 1) for states in output.hidden_states)
        if output.get("attentions") is not None:
            # Queries of the text; their weights on the prompt's keys stay visible.
            output.attentions = tuple(w if w is None else layout.extract(w, 2) for w in output.attentions)


def _given_mask(**kwargs: Any) -> Any:
    return kwargs["attention_mask"]


def _leave_prompts_out(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    # Asked for by itself, the model's state is the base's; inside a LightningModule, the prompts belong to that.
    if prefix == "":
        for name in [name for name in state_dict if name.startswith(SUBMODULE + ".")]:
            del state_dict[name]


def _do_not_miss_prompts(model: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if not name.startswith(SUBMODULE + ".")]
