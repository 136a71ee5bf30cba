"""Ways to teach a model tasks, which methods.py runs beside one another: soft prompts, and what others do."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from measure import digits, peak_memory
from objectives import ROWS_A_TASK, Row, Task
from peft import LoraConfig, PeftConfig, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_softprompt import PromptGradientClipping, SoftPrompts, attach
from lightning_softprompt.base.tokens import encode_text
from lightning_softprompt.data.encoding import Example, collate
from lightning_softprompt.training.objectives import row_losses, tasks_among_labels

OURS, TUNING, LORA, FULL = TRAINED = ("soft prompts", "prompt tuning", "LoRA", "full tuning")
HARD, EXAMPLES = UNTRAINED = ("hard prompt", "hard prompt, examples")
Batch = dict[str, Any]


@dataclass
class Setting:
    """What all methods share."""

    base: PreTrainedModel
    tokenizer: Any
    tasks: dict[str, Task]
    folder: Path

    @property
    def device(self) -> torch.device:
        return self.base.device

    def instruction(self, task: str) -> list[int]:
        return encode_text(self.tokenizer, self.tasks[task].start.text)


class Learner:
    """A method on one task, or on several in one run: its model, and what of it is trained."""

    def __init__(self, setting: Setting, method: str, names: list[str], rate: float, seed: int = 0) -> None:
        self.setting, self.method, self.names, self.rate = setting, method, names, rate
        self.hard = [] if method in (OURS, TUNING) else setting.instruction(names[0])
        self.virtual = len(setting.instruction(names[0])) if method == TUNING else 0
        torch.manual_seed(seed)
        if method == FULL:
            self.model: Any = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32)
            self.model = self.model.eval().to(setting.device)
        elif method == OURS:
            starts = {name: setting.tasks[name].start for name in names}
            prompts = SoftPrompts.for_model(setting.base, starts, setting.tokenizer, seed=seed)
            prompts.templates.update({name: setting.tasks[name].encoding.template for name in names})
            self.model = attach(peers.twin(setting.base), prompts)
        else:
            self.model = get_peft_model(peers.twin(setting.base), self.settings(names[0])).eval()
        named = ((name, prompts[name]) for name in names) if method == OURS else self.model.named_parameters()
        self.parameters: dict[str, nn.Parameter] = {name: each for name, each in named if each.requires_grad}
        assert all(each.dtype == torch.float32 for each in self.parameters.values())

    def settings(self, name: str) -> PeftConfig:
        """PEFT's, of a task."""
        if self.method == LORA:
            projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
            return LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules=projections)
        return PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=len(self.setting.instruction(name)),
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=self.setting.tasks[name].start.text,
            tokenizer_name_or_path=str(self.setting.folder),
        )

    def batches(self, seed: int, steps: int) -> list[Batch]:
        """The rows of each step: those of a task, and their order, are the seed's alone."""
        columns = []
        for name in self.names:
            draw, train = random.Random(f"{seed} {name}"), self.setting.tasks[name].train
            order: list[Example] = []
            while len(order) < steps * ROWS_A_TASK:
                order += draw.sample(train, len(train))
            rows = [Example(name, self.hard + row.text_ids, row.target_ids) for row in order]
            columns.append(chunks(rows, ROWS_A_TASK)[:steps])
        return [self.batch(list(itertools.chain(*of_step))) for of_step in zip(*columns, strict=True)]

    def batch(self, rows: list[Example]) -> Batch:
        """What the model is given, with `labels` and `names`; its logits are those of the columns of `labels`."""
        batch = collate(rows, self.setting.tokenizer.pad_token_id)
        mask = batch["attention_mask"]
        if self.virtual:
            shifts = (mask == 0).sum(1).tolist()
            for name in ("input_ids", "attention_mask", "labels"):
                batch[name] = torch.stack([row.roll(-shift) for row, shift in zip(batch[name], shifts, strict=True)])
        elif self.method != OURS:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        scored = (batch["labels"] != -100).any(0)
        columns = (scored | scored.roll(-1)).nonzero()[:, 0]  # and the column before, which predicts it
        batch["logits_to_keep"] = columns + self.virtual if self.virtual else len(columns)
        batch["labels"] = batch["labels"][:, columns]
        batch["names"] = batch["tasks"] if self.method == OURS else batch.pop("tasks")
        return moved(batch, self.setting.device)

    def steps(self, objective: Any, batches: list[Batch]) -> Generator[None]:
        """Train; each step is one of the iterator."""
        templates = {name: self.setting.tasks[name].encoding.template for name in self.names}
        among = tasks_among_labels(objective, templates)
        label_ids = {name: self.setting.tasks[name].encoding.label_ids or [] for name in among}
        optimizer = AdamW(self.parameters.values(), lr=self.rate, weight_decay=0.0, fused=True)
        schedule = LambdaLR(optimizer, functools.partial(share_of_the_rate, steps=len(batches)))
        clipping = PromptGradientClipping(method="normalized")
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "names")}
            with torch.autocast(self.setting.device.type, torch.bfloat16, enabled=self.method == FULL):
                logits = self.model(**inputs).logits
            losses, counts = row_losses(logits, batch["labels"], batch["names"], label_ids)
            (losses.sum() / counts.sum()).backward()
            if self.method == OURS:
                clipping.clip(self.parameters)
            else:
                clip_grad_norm_(self.parameters.values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield

    def judged(self) -> dict[str, float]:
        """The accuracy of each task."""
        model = self.setting.base
        if self.method == FULL:
            model = self.in_bfloat16()
        elif self.method == LORA:
            model = self.model.get_base_model()
        found = {}
        for name in self.names:
            front = self.parameters[name] if self.method == OURS else next(iter(self.parameters.values()))
            if self.hard:
                front = embedded(model, self.hard)
            found[name] = accuracy(self.setting, model, front, name)
        return found

    def in_bfloat16(self) -> PreTrainedModel:
        model = copy.deepcopy(self.setting.base)
        model.load_state_dict(self.model.state_dict())
        return model


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch whose tensors are on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def embedded(model: PreTrainedModel, ids: list[int]) -> Tensor:
    found: Tensor = model.get_input_embeddings()(torch.tensor(ids, device=model.device))
    return found


def share_of_the_rate(step: int, steps: int) -> float:
    """Warm-up, then cosine decay; no step has a rate of zero, so that none is lost to a method with few."""
    warmup = max(1, steps // 8)
    return (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@torch.no_grad()
def accuracy(setting: Setting, model: PreTrainedModel, front: Tensor, name: str, size: int = 24) -> float:
    """How many of a task's held-out rows get their label, in percent, behind the embeddings `[length, hidden]`."""
    task, pad = setting.tasks[name], setting.tokenizer.pad_token_id
    label_ids = [ids[0] for ids in task.encoding.label_ids or []]
    rows = [(task.encoding.text_ids({"text": text}, name), f" {label}") for text, label in task.held_out]
    rows.sort(key=lambda row: len(row[0]))
    kept = model(inputs_embeds=front[None].to(model.dtype), use_cache=True, logits_to_keep=1).past_key_values
    right = 0
    for some in chunks(rows, size):
        last = torch.tensor([len(ids) - 1 for ids, _ in some], device=model.device)
        width = max(len(ids) for ids, _ in some)
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in some], device=model.device)
        mask = torch.arange(-len(front), width, device=model.device) <= last[:, None]
        cache = copy.deepcopy(kept)
        cache.batch_repeat_interleave(len(some))
        columns, places = last.unique(return_inverse=True)
        logits = model(input_ids=ids, attention_mask=mask.long(), past_key_values=cache, logits_to_keep=columns).logits
        best = logits[torch.arange(len(some), device=model.device), places][:, label_ids].argmax(1).tolist()
        labels = task.encoding.template.labels or []
        right += sum(labels[place] == label for place, (_, label) in zip(best, some, strict=True))
    return 100 * right / len(rows)


def chunks(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def untrained(setting: Setting, method: str, seed: int) -> Row:
    """The accuracy of each task with a hard prompt."""
    found = {}
    for name, task in setting.tasks.items():
        ids = setting.instruction(name)
        if method == EXAMPLES:
            draw, end = random.Random(f"{seed} {name}"), encode_text(setting.tokenizer, "\nText: ")
            of_labels = [
                [row for row in task.train if row.target_ids == each] for each in task.encoding.label_ids or []
            ]
            chosen = [row for rows in of_labels for row in draw.sample(rows, 2)]
            for row in draw.sample(chosen, len(chosen)):
                ids = ids + row.text_ids + row.target_ids + end
        found[name] = accuracy(setting, setting.base, embedded(setting.base, ids), name)
    return {"steps": 0, "seconds": 0.0, "accuracy": found}


def trained(setting: Setting, method: str, objective: str, seed: int, steps: int, rate: float) -> Row:
    """The accuracy of each task, and the seconds of all steps."""
    seconds, right = 0.0, dict[str, float]()
    for names in [list(setting.tasks)] if method == OURS else [[name] for name in setting.tasks]:
        learner = Learner(setting, method, names, rate, seed)
        batches = learner.batches(seed, steps)
        seconds += seconds_of(lambda: list(learner.steps(objective, batches)), setting.device)  # noqa: B023
        right |= learner.judged()
    return {"steps": steps, "seconds": digits(seconds), "rate": rate, "accuracy": right}


def properties(setting: Setting, method: str, rate: float) -> Row:
    """What a method takes, whatever it learns: parameters, memory, what is saved, and going to another task."""
    if method == EXAMPLES:
        return {"parameters": 0}
    if method == HARD:
        texts = [task.start.text for task in setting.tasks.values()]
        return {"parameters": 0, "saved_bytes": round(sum(len(text.encode()) for text in texts) / len(texts))}
    names = list(setting.tasks)
    learner = Learner(setting, method, names if method == OURS else names[:1], rate)
    held = {id(each): each.nbytes for each in [*learner.model.parameters(), *learner.parameters.values()]}
    step = learner.steps("tokens", learner.batches(0, 2))
    memory = sum(held.values()) + peak_memory(functools.partial(next, step), setting.device.type)
    step.close()
    count = sum(each.numel() for each in learner.parameters.values()) / len(learner.names)
    with tempfile.TemporaryDirectory() as folder:
        switch = switching(learner, Path(folder))
        saved = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / len(learner.names)
    return {
        "parameters": round(count),
        "memory_MB": round(memory / 1e6),
        "saved_bytes": round(saved),
        "switch_ms": switch,
    }


def switching(learner: Learner, folder: Path, repeats: int = 25) -> float:
    """Save what was learned; and the milliseconds of going from one task to another, the median of some."""
    first, second = list(learner.setting.tasks)[:2]
    model, calls = learner.model, list[Callable[[], Any]]()
    if learner.method == OURS:
        model.soft_prompts.save_pretrained(folder)
        text = learner.setting.tasks[first].train[0].text_ids
        same = moved(collate([Example(first, text, [])] * (ROWS_A_TASK + 1), 0), model.device)
        other = same | {"tasks": [*same["tasks"][1:], second]}
        calls = [torch.no_grad()(functools.partial(model, **each, logits_to_keep=1)) for each in (other, same)]
    elif learner.method == FULL:
        model = learner.in_bfloat16()
        model.save_pretrained(folder)
        # Tied weights are in the file once.
        calls.append(lambda: model.load_state_dict(load_file(folder / "model.safetensors"), strict=False))
    else:
        model.save_pretrained(folder)
        model.add_adapter("other", learner.settings(second))
        turns = itertools.cycle(["other", "default"])
        calls.append(lambda: model.set_adapter(next(turns)))
    times = [[seconds_of(call, learner.setting.device) for call in calls] for _ in range(repeats + 1)][1:]
    return digits(1e3 * statistics.median(switch - sum(without) for switch, *without in times))


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """On the CPU those that this process has computed; on a GPU those until it is done."""
    if device.type == "cpu":
        begin = time.process_time()
        call()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
