"""What `attach` leaves on a model: the hooks, and what they need to know. Nothing of a call is kept here."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from lightning_softprompt.attachment import caches, masks, routing
from lightning_softprompt.attachment.bare_pass import BarePass
from lightning_softprompt.attachment.call import Call, named, row_count
from lightning_softprompt.attachment.forward_pass import ForwardPass
from lightning_softprompt.attachment.frozen_base import FrozenBase
from lightning_softprompt.attachment.frozen_head import FrozenHead
from lightning_softprompt.attachment.generation import generate, no_continuous_batching
from lightning_softprompt.attachment.gradient_checkpointing import GradientCheckpointing
from lightning_softprompt.attachment.grouped_attention import GroupedAttention
from lightning_softprompt.attachment.laid_out_pass import LaidOutPass
from lightning_softprompt.attachment.lock import Lock
from lightning_softprompt.attachment.loss import LogitsChoice
from lightning_softprompt.attachment.micro_batches import MicroBatches
from lightning_softprompt.attachment.prefix import Prefix, Prefixes
from lightning_softprompt.attachment.prefix_choice import PrefixChoice, PrefixPolicy
from lightning_softprompt.attachment.presence import Presence
from lightning_softprompt.attachment.routing import Route, TaskRows, Tasks, rows_of
from lightning_softprompt.attachment.running import PASSES, route_of, set_route
from lightning_softprompt.attachment.substitution import Substitution
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUBMODULE = "soft_prompts"


class Attachment:
    """Prompts attached to a model: the hooks, and what they need to know. Nothing of a call is kept here.

    Args:
        model: the causal LM.
        prompts: made for it.
        prefix: as `attach` has it.
        logits: as `attach` has it.
        micro_batch_size: as `attach` has it.

    Attributes:
        model: the causal LM.
        prompts: the attached prompts.
        traits: of the model.
        presence: which tasks had rows in passes that recorded gradients.
        prefixes: what is kept of the prompts' keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: SoftPrompts,
        prefix: PrefixChoice,
        logits: LogitsChoice,
        micro_batch_size: int | None,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.logits = logits
        self.presence = Presence()
        self.traits = ModelTraits.of(model)
        self._policy = PrefixPolicy(self.traits, prompts, prefix)  # may refuse, and so comes before all changes
        self._gradient_checkpointing = GradientCheckpointing(model, self._recomputes)
        self.prefixes = Prefixes(self.traits, prompts, self._run_alone)
        self._head = FrozenHead(self.traits, self._run_alone)
        self._micro_batches = None
        if micro_batch_size is not None:
            self._micro_batches = MicroBatches(micro_batch_size, self.traits, prompts, self._lay_out, self._run_part)
        self._base = FrozenBase(model)
        self._grouped_attention = GroupedAttention(model)
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
            "create_masks_for_generate": self._create_masks,
            "init_continuous_batching": no_continuous_batching,
        }
        self._before = {name: model.__dict__[name] for name in self._replaced if name in model.__dict__}
        model.__dict__.update(self._replaced)

    def remove(self) -> None:
        """Take everything off the model again."""
        for handle in (*self._handles, *self._handles_of_ends):
            handle.remove()
        for name, ours in self._replaced.items():
            if self.model.__dict__.get(name) == ours:  # else somebody has put another one there since
                del self.model.__dict__[name]
                self.model.__dict__.update({name: self._before[name]} if name in self._before else {})
        PASSES.end(self)  # one that was interrupted in this thread
        self._gradient_checkpointing.remove()
        self._grouped_attention.remove()
        del self.model._modules[SUBMODULE]
        self._base.restore()

    @contextmanager
    def routed(self, given: routing.Routing | None, repeats: bool = False, columns_to_come: int = 0) -> Iterator[Route]:
        """Give tasks to the passes of the `with` block that name none themselves, in this thread or asyncio task.

        Args:
            given: the tasks of the rows; None keeps the tasks of an enclosing `routed`.
            repeats: whether the model may see each row several times in succession, as beam search does.
            columns_to_come: columns of text that will follow.
        """
        around = route_of(self)
        tasks, source = routing.resolve(self.prompts, given, around), routing.source_of(given)
        if tasks is None and around is not None:
            tasks, source = around.tasks, around.source
        route = Route(tasks, repeats, columns_to_come, source)
        set_route(self, route)
        try:
            yield route
        finally:
            set_route(self, around)

    def _hook_ends(self) -> None:
        """Put the hooks on the embedding and the head, and do so again where these were replaced or wrapped."""
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
        """Stands in for the model's `generate`."""
        return generate(self, *args, **kwargs)

    def _stay_in_eval_mode(self, mode: bool = True) -> PreTrainedModel:
        """Stands in for the model's `train`, which another thread may call while a pass runs."""
        own: Any = type(self.model)
        return own.train(self.model, False)

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        if model is not self.model:
            raise SoftPromptError(
                "this is a shallow copy of a model with prompts attached, and has none of its own; call the model, or "
                "copy it with copy.deepcopy"
            )
        self._hook_ends()
        interrupted = PASSES.end(self)
        if isinstance(interrupted, ForwardPass):  # never came to its end
            caches.hide_prompt_columns(interrupted.cache)
        given = {name: kwargs.pop(name, None) for name in ("task_ids", "tasks")}
        explicit = routing.resolve(self.prompts, routing.from_batch(given), route_of(self))
        arguments = {**named(self.traits.arguments, args, kwargs), **kwargs}
        cache = caches.find(arguments)
        caches.reveal_prompt_columns(cache)
        try:
            this = self._pass(arguments, explicit)
        except BaseException:
            caches.hide_prompt_columns(cache)
            raise
        self._prepare(this)
        PASSES.begin(this, self)
        return (), this.arguments

    def _prepare(self, this: ForwardPass) -> None:
        this.recomputes = self._gradient_checkpointing.is_on
        if this.recomputes and "use_cache" in self.traits.arguments:
            this.arguments["use_cache"] = False  # a layer that runs twice would fill it twice
        this.holds_back = this.scored is not None and self._head.is_plain()

    def _pass(self, arguments: dict[str, Any], explicit: Tasks | None) -> ForwardPass:
        cache = caches.find(arguments)
        layout = caches.remembered(cache)
        if layout is not None:
            call = Call.of(self.traits, arguments)
            layout = layout.of_rows(len(call.text), explicit)
            return LaidOutPass.continuing(self.traits, call, cache, layout, self.logits)
        if caches.has_no_prompts(cache):
            caches.check_tasks(cache, explicit)
            return BarePass(self.traits, arguments, self.prompts, self.logits)
        route = route_of(self) or Route()
        route = route if explicit is None else replace(route, tasks=explicit)
        count = row_count(arguments)
        rows = TaskRows.of(self.prompts, route.tasks or ()) if count is None else rows_of(self.prompts, route, count)
        self.presence.count(rows.active if torch.is_grad_enabled() else ())
        if not rows.active and not self._has_to_move(arguments, route):
            return BarePass(self.traits, arguments, self.prompts, self.logits)
        return self._insert(Call.of(self.traits, arguments), rows, route)

    def _has_to_move(self, arguments: dict[str, Any], route: Route) -> bool:
        """Whether rows stand behind pads that the model would read, so that they have to begin at the first column.

        While the model generates they stay where they are, as new tokens come behind the last column.
        """
        mask = arguments.get("attention_mask")
        if self.traits.padding_side == "left" or route.repeats or not isinstance(mask, Tensor) or mask.ndim != 2:
            return False
        return not caches.length(caches.find(arguments)) and bool((mask[:, 0] == 0).any())

    def _insert(self, call: Call, rows: TaskRows, route: Route) -> LaidOutPass:
        caches.check_can_continue(call.cache, self.model)
        if isinstance(call.cache, StaticCache):
            to_come = map(len, self.prompts.parameters())
            caches.make_room(call.cache, self.model, max(rows.lengths, default=0), max(to_come, default=0))
        applies = self._policy.applies(call, rows, route.columns_to_come, self._gradient_checkpointing.is_on)
        prompts = self.prefixes.of_tasks(rows.active) if applies else self.prompts.packed(rows.active)[0]
        if self._micro_batches is not None and self._micro_batches.divide(call, rows):
            return self._micro_batches.last_of(call, rows, prompts)
        return self._lay_out(call, rows, prompts)

    def _lay_out(self, call: Call, rows: TaskRows, prompts: Prefix | Tensor) -> LaidOutPass:
        if isinstance(prompts, Tensor):
            return LaidOutPass.inserting(self.traits, call, prompts, rows, self.logits)
        cache = DynamicCache(config=self.model.config) if call.cache is None else call.cache
        return LaidOutPass.behind_prefix(self.traits, call, cache, prompts, rows, self.logits)

    def _run_part(self, this: LaidOutPass) -> Any:
        self._prepare(this)
        return this.finish(self._run_alone(this.arguments, this))

    def _create_masks(self, **arguments: Any) -> Any:
        """Stands in for the model's `create_masks_for_generate`, which makes the mask of a static cache before a pass.

        The model's own method knows the text's columns alone. A pass with prompts makes a mask of all columns.
        """
        route = route_of(self)
        if route is None or route.has_prompts:
            masks.expect(caches.find(arguments))
            return arguments["attention_mask"]
        return masks.own(self.model, **arguments)

    def _run_alone(self, arguments: dict[str, Any], this: Substitution) -> Any:
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
        if this is None or this.owner is not self or not args:
            return None
        return (this.select_hidden(args[0]), *args[1:])

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        this = PASSES.end(self)
        if this is None and output is not None:
            raise SoftPromptError("the model was called inside of a pass of its own, as by a hook; call it outside")
        if not isinstance(this, ForwardPass):  # none that began
            return output
        if output is None:  # the pass raised
            caches.hide_prompt_columns(this.cache)
            return None
        return this.finish(output)


def _leave_prompts_out(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    # The state of the model alone is the base's. In the state of a module that holds the model, prompts are included.
    if prefix == "":
        for name in [name for name in state_dict if name.startswith(SUBMODULE + ".")]:
            del state_dict[name]


def _do_not_miss_prompts(model: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if not name.startswith(SUBMODULE + ".")]
