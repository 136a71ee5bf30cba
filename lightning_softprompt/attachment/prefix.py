"""A prompt as attention keys and values: computed once for a task, shared by all of its rows.

In a causal LM nothing stands before the prompt, so its keys and values depend on the prompt alone, never on the row. A
batch of B rows pays P tokens for each distinct task, not B * P: in training once a step, with gradients; in inference
once, as they are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from softprompt_kernels import prompt_concat
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache

from lightning_softprompt.attachment import caches
from lightning_softprompt.attachment.base_state import BaseState
from lightning_softprompt.attachment.layout import Layout
from lightning_softprompt.attachment.lock import Lock
from lightning_softprompt.attachment.routing import TaskRows
from lightning_softprompt.attachment.substitution import Substitution
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.prompts.soft_prompts import SoftPrompts
from lightning_softprompt.transfer import to_device

MOST_BYTES = 2**30
_MOST_STACKS = 4


@dataclass(frozen=True)
class Prefix:
    """Keys and values of several tasks' prompts, padded on the left to the longest.

    Attributes:
        states: keys and values of each layer in turn, `[tasks, heads, longest, size]`, in the base's dtype, each on the
            device of its layer.
        logits: `[tasks, vocabulary]`, what follows each prompt.
        lengths: virtual tokens of each task.
    """

    states: list[Tensor]
    logits: Tensor
    lengths: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The memory that it takes, in bytes."""
        return sum(tensor.nbytes for tensor in (self.logits, *self.states))

    def fill(self, cache: Cache, rows: TaskRows) -> None:
        """Put the keys and values of each row's task into an empty cache, and zeros where a row has none.

        The mask hides zeros, but it would not hide another task's numbers where these are not finite.
        """
        states, some_have_none = self.states, -1 in rows.places
        places = {device: rows.on(device).places for device in dict.fromkeys(state.device for state in states)}
        if some_have_none:
            states = [functional.pad(state, (0, 0, 0, 0, 0, 0, 0, 1)) for state in states]
            places = {device: torch.where(each < 0, len(self.lengths), each) for device, each in places.items()}
        for layer in range(0, len(states), 2):
            keys, values = (_of_rows(state, places[state.device]) for state in states[layer : layer + 2])
            cache.update(keys, values, layer // 2)

    def layout(self, rows: TaskRows, device: torch.device) -> Layout:
        """The layout, on the device of the texts, of rows that have their prompts in the cache, and no text yet."""
        places, lengths, _ = rows.on(device)
        longest = max(self.lengths)
        columns = torch.arange(longest, device=device)
        mask = (columns >= longest - lengths[:, None]).long()
        nothing = torch.zeros_like(lengths)
        shift = torch.full_like(lengths, longest)
        return Layout(rows.active, places, lengths, nothing, shift, mask, 0, is_left=True, seen=0)


class Prefixes:
    """The prefixes of an attached model's tasks. Those computed without gradients are kept, and all threads share them.

    What is kept is dropped when its prompt's values, or the base, are no longer what they were, and, beyond
    `most_bytes`, when it was not used for longest. Those of the last few batches' tasks are kept stacked, too.

    Args:
        traits: of the base.
        prompts: attached to it.
        run: calls the base with arguments by name, in one pass with a substitution.

    Attributes:
        most_bytes: of kept keys and values.
    """

    def __init__(
        self, traits: ModelTraits, prompts: SoftPrompts, run: Callable[[dict[str, Any], Substitution], Any]
    ) -> None:
        self.most_bytes = MOST_BYTES
        self._traits = traits
        self._prompts = prompts
        self._run = run
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._stacks: OrderedDict[tuple[str, ...], Prefix] = OrderedDict()
        self._base: BaseState | None = None
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is kept, as a copy belongs to another base."""
        return {**self.__dict__, "_kept": OrderedDict(), "_stacks": OrderedDict(), "_base": None}

    def clear(self) -> None:
        """Forget what is kept. Call it after a change of the base that `base_state` cannot see."""
        with self._lock:
            self._kept.clear()
            self._stacks.clear()

    def of_tasks(self, tasks: Sequence[str]) -> Prefix:
        """The prefix of distinct tasks: computed with gradients where a prompt trains, else taken from what is kept.

        Args:
            tasks: their names, in the order of the prefix.
        """
        if self._prompts.want_gradients(tasks):
            return self._computed(*self._prompts.packed(tasks))
        with self._lock:  # no other thread sees what is half made
            return self._from_kept(tasks)

    def _computed(self, packed: Tensor, offsets: Tensor) -> Prefix:
        weight = next(self._traits.model.get_input_embeddings().parameters())
        count = len(offsets) - 1
        lengths = tuple(offsets.diff().tolist())
        (offsets,) = to_device(weight.device, offsets.tolist())
        out = prompt_concat(
            weight.new_zeros(count, 0, self._prompts.hidden_size),
            None,
            packed.to(weight.device),
            offsets,
            torch.arange(count, device=weight.device),
            padding_side="left",
            max_prompt_length=max(lengths),
        )
        this = Substitution(out.inputs_embeds)
        rows = torch.arange(count, device=weight.device)
        this.scored = rows, torch.full_like(rows, max(lengths) - 1)
        call = {
            "input_ids": torch.full_like(out.position_ids, self._traits.placeholder),
            "attention_mask": out.attention_mask,
            "position_ids": out.position_ids + self._traits.position_offset,
            self._traits.cache_argument: DynamicCache(),
            "use_cache": True,
            "return_dict": True,
        }
        output = self._run({name: value for name, value in call.items() if name in self._traits.arguments}, this)
        states = [state for layer in caches.find(output).layers for state in (layer.keys, layer.values)]
        return Prefix(states, this.select_logits(output.logits)[0], lengths)

    def _from_kept(self, names: Sequence[str]) -> Prefix:
        base = BaseState.of(self._traits.model)
        if base != self._base:
            self.clear()
            self._base = base
        stale = self._stale(names)
        missing = [name for name in names if name in stale]
        if missing:
            with torch.no_grad():
                packed, offsets = self._prompts.packed(missing)
                computed = self._computed(packed, offsets)
                # Keep the values that were packed: by now another thread may have trained the prompt.
                values = packed.split(offsets.diff().tolist())
                for place, (name, value) in enumerate(zip(missing, values, strict=True)):
                    self._kept[name] = _Kept.of(value, computed, place)
            for stack in [stack for stack in self._stacks if not stale.isdisjoint(stack)]:
                del self._stacks[stack]
        for name in names:
            self._kept.move_to_end(name)
        found = self._stack(tuple(names))
        self._forget(len(names))
        return found

    def _stack(self, names: tuple[str, ...]) -> Prefix:
        """The kept prefixes of these tasks in one. Rows of the same tasks come again and again, as batches do."""
        found = self._stacks.pop(names, None) or _together([self._kept[name] for name in names])
        self._stacks[names] = found
        if len(self._stacks) > _MOST_STACKS:
            self._stacks.popitem(last=False)
        return found

    def _stale(self, names: Sequence[str]) -> set[str]:
        """The tasks whose prefixes have to be computed. The device is asked once, however many tasks there are."""
        same = {}
        for name in names:
            kept, prompt = self._kept.get(name), self._prompts[name].detach()
            if kept is not None and (kept.prompt.shape, kept.prompt.device) == (prompt.shape, prompt.device):
                same[name] = (kept.prompt == prompt).all()
        fresh = dict(zip(same, torch.stack(list(same.values())).tolist(), strict=True)) if same else {}
        return {name for name in names if not fresh.get(name, False)}

    def _forget(self, in_use: int) -> None:
        """Drop what was unused for longest until the others have room, stacks first. Prefixes in use stay."""
        total = sum(kept.bytes for kept in self._kept.values()) + sum(stack.bytes for stack in self._stacks.values())
        while total > self.most_bytes and self._stacks:
            total -= self._stacks.popitem(last=False)[1].bytes
        while total > self.most_bytes and len(self._kept) > in_use:
            total -= self._kept.popitem(last=False)[1].bytes


@dataclass(frozen=True)
class _Kept:
    """One task's prefix, and the prompt it was computed from.

    Attributes:
        prompt: as it was, `[length, hidden]`.
        states: those of equal shape on one device in one tensor `[count, heads, length, size]`.
        indices: which states these are.
        logits: `[vocabulary]`.
    """

    prompt: Tensor
    states: list[Tensor]
    indices: list[list[int]]
    logits: Tensor

    @classmethod
    def of(cls, prompt: Tensor, computed: Prefix, place: int) -> _Kept:
        """The prefix of one of several tasks that were computed together, without its pads."""
        length = len(prompt)
        groups: dict[tuple[int, int, torch.device], list[int]] = {}
        for index, state in enumerate(computed.states):
            groups.setdefault((state.shape[1], state.shape[3], state.device), []).append(index)
        indices = list(groups.values())
        states = [torch.stack([computed.states[i][place, :, -length:] for i in group]) for group in indices]
        return cls(prompt.detach().clone(), states, indices, computed.logits[place].clone())

    @property
    def bytes(self) -> int:
        """The memory that it takes, in bytes."""
        return sum(tensor.nbytes for tensor in (self.prompt, self.logits, *self.states))


def _together(kept: Sequence[_Kept]) -> Prefix:
    lengths = tuple(len(each.prompt) for each in kept)
    longest = max(lengths)
    states: dict[int, Tensor] = {}
    for number, group in enumerate(kept[0].indices):
        padded = [functional.pad(each.states[number], (0, 0, longest - len(each.prompt), 0)) for each in kept]
        states |= zip(group, torch.stack(padded, dim=1).unbind(0), strict=True)
    return Prefix([states[index] for index in sorted(states)], torch.stack([each.logits for each in kept]), lengths)


def _of_rows(state: Tensor, places: Tensor) -> Tensor:
    if len(state) == 1:
        return state.expand(len(places), -1, -1, -1)
    return state.index_select(0, places)
