"""The rows of a step in parts, each of which goes forward and backward before the next one begins.

A step then holds the activations of one part. The parts meet in what carries a prompt to its rows: its keys and values,
or, in the sequence, the prompt itself. The gradients that the parts leave there are added up, and the backward pass
through the prompts comes once, when the caller asks for it. Lightning's `accumulate_grad_batches` holds as little, and
runs the prompts anew for each part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers.loss.loss_utils import ForCausalLMLoss

from lightning_softprompt.attachment.call import Call
from lightning_softprompt.attachment.frozen_head import computes_in_float16
from lightning_softprompt.attachment.laid_out_pass import LaidOutPass
from lightning_softprompt.attachment.parts import EarlierParts
from lightning_softprompt.attachment.prefix import Prefix
from lightning_softprompt.attachment.routing import TaskRows
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

LayOut = Callable[[Call, TaskRows, Prefix | Tensor], LaidOutPass]


class MicroBatches:
    """Run the rows of a step in parts of at most `size` rows.

    Args:
        size: rows of a part.
        traits: of the base.
        prompts: attached to it.
        lay_out: makes a pass over rows, behind a prefix or with packed prompts in the sequence.
        run: runs such a pass, and returns what the caller gets.
    """

    def __init__(
        self,
        size: int,
        traits: ModelTraits,
        prompts: SoftPrompts,
        lay_out: LayOut,
        run: Callable[[LaidOutPass], Any],
    ) -> None:
        self._size = size
        self._traits = traits
        self._prompts = prompts
        self._lay_out = lay_out
        self._run = run

    def divide(self, call: Call, rows: TaskRows) -> bool:
        """Whether the rows of a call are divided: those of a step of training, if they are more than one part.

        Raises:
            SoftPromptError: a step whose parts do not add up to the whole.
        """
        trains = self._prompts.want_gradients(rows.active)
        if not trains or call.labels is None or len(rows.tasks) <= self._size:
            return False
        self._check(call)
        return True

    def last_of(self, call: Call, rows: TaskRows, prompts: Prefix | Tensor) -> LaidOutPass:
        """Run all parts but the last, forward and backward; the last one is returned, and gives the loss of all."""
        origins = [prompts] if isinstance(prompts, Tensor) else [*prompts.states, prompts.logits]
        leaves = [each.detach().requires_grad_() for each in origins]
        meeting = leaves[0] if isinstance(prompts, Tensor) else replace(prompts, states=leaves[:-1], logits=leaves[-1])
        earlier = EarlierParts(leaves, origins, call.arguments.get("num_items_in_batch"))
        *parts, rest = self._parts(len(rows.tasks))
        for part in parts:
            this = self._part(call, rows, part, meeting)
            loss = self._run(this)[0]  # of a tuple, too
            assert this.scoring is not None
            earlier.add(loss, this.scoring.scored_count)
        last = self._part(call, rows, rest, prompts)
        assert last.scoring is not None
        last.scoring.earlier = earlier
        return last

    def _parts(self, count: int) -> list[slice]:
        """As few parts as may be, of like size."""
        parts = -(-count // self._size)
        return [slice(count * each // parts, count * (each + 1) // parts) for each in range(parts)]

    def _part(self, call: Call, rows: TaskRows, which: slice, prompts: Prefix | Tensor) -> LaidOutPass:
        others: dict[str, Any] = {"num_items_in_batch": 1}  # so that the loss is a sum
        if "use_cache" in self._traits.arguments:
            others["use_cache"] = False  # nobody gets it
        return self._lay_out(call.of_rows(which, **others), rows.part(which), prompts)

    def _check(self, call: Call) -> None:
        model = self._traits.model
        name = type(model).__name__
        asked = {"use_cache": False}  # whatever the configuration says
        asked |= {each: getattr(model.config, each, False) for each in ("output_hidden_states", "output_attentions")}
        wanted = [each for each, default in asked.items() if call.arguments.get(each, default)]
        wanted += ["a cache"] * (call.cache is not None)
        if wanted:
            raise SoftPromptError(
                f"with micro_batch_size a step gives its loss alone, and was given {' and '.join(wanted)}; leave that "
                "out, or micro_batch_size"
            )
        if model.loss_function is not ForCausalLMLoss or not self._traits.has_usual_loss(call.arguments):
            raise SoftPromptError(
                f"micro_batch_size needs a loss that is a sum over tokens, and that of {name} is another one here; "
                "leave micro_batch_size out"
            )
        if computes_in_float16(next(model.get_input_embeddings().parameters())):
            raise SoftPromptError(
                "with micro_batch_size gradients are made before the loss is scaled, and float16 would lose the small "
                "ones; train in bfloat16 or float32"
            )
        own = set(map(id, self._prompts.parameters()))
        trained = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in own]
        if trained:
            raise SoftPromptError(
                f"with micro_batch_size prompts alone train, and {trained[0]} of the base trains, too; freeze it, or "
                "leave micro_batch_size out"
            )
        if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()):
            raise SoftPromptError(
                "micro_batch_size does not work where FSDP shards the base; use Lightning's accumulate_grad_batches"
            )
