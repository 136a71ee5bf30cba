"""What the benchmarks of whole models run: the base, this library on it, PEFT on it, over the same weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_softprompt import SoftPrompts, Tokens, attach

ROOT = Path(__file__).parents[1]
Ids = list[list[int]]  # of each task's hard prompt, where its soft prompt starts


def load_base(device: str) -> tuple[PreTrainedModel, Any]:
    """A frozen float32 model, its tokenizer: SmolLM2-135M; on a GPU a random Llama of a billion weights, and None."""
    if device == "cuda":
        config = LlamaConfig(
            vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            return never_ending(LlamaForCausalLM(config)), None
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2_and_vader import prepare_model

    (ROOT / ".cache").mkdir(exist_ok=True)
    folder = prepare_model(ROOT / ".cache")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return never_ending(model), AutoTokenizer.from_pretrained(folder)


def never_ending(model: PreTrainedModel) -> PreTrainedModel:
    """The model, frozen, without an end-of-text token: every run makes as many tokens."""
    for config in (model.config, model.generation_config):
        config.pad_token_id = config.pad_token_id if config.pad_token_id is not None else 0
        config.eos_token_id = None
    return model.eval().requires_grad_(False)


def to_time(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model that is timed; results are compared in float32. On a GPU, in bfloat16, buffers left as they are."""
    if device == "cpu":
        return model
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model over the very same parameters: hooks on one do not show on the other."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def ours(base: PreTrainedModel, prompts: Ids, prefix: str, logits: str = "all", **options: Any) -> PreTrainedModel:
    model = twin(base)
    starts = {f"task{task}": Tokens(ids) for task, ids in enumerate(prompts)}
    return attach(model, SoftPrompts.for_model(model, starts), prefix=prefix, logits=logits, **options)


def peft(base: PreTrainedModel, prompts: Ids) -> PeftModel:
    """PEFT's prompt tuning with an adapter for each task."""
    settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(prompts[0]))
    model = get_peft_model(twin(base), settings, "task0")
    for task, ids in enumerate(prompts):
        if task:
            settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(ids))
            model.add_adapter(f"task{task}", settings)
        peft_prompt(model, task).data.copy_(embedded(base, ids))
    model.set_adapter("task0")
    return model.eval()


def peft_prompt(model: PeftModel, task: int) -> torch.nn.Parameter:
    return model.prompt_encoder[f"task{task}"].embedding.weight


def embedded(model: PreTrainedModel, ids: list[int]) -> Tensor:
    table = model.get_input_embeddings().weight
    return table[torch.tensor(ids, device=table.device)].detach()


def rows_of_tasks(task_ids: Tensor) -> dict[int, Tensor]:
    """The rows of each task that has some."""
    return {task: (task_ids == task).nonzero()[:, 0] for task in task_ids.unique().tolist()}
