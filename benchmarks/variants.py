"""Whether another loss, start, parameterisation or rate makes better prompts in the same time, over seeds.

    python benchmarks/variants.py --data FOLDER [--quick] [--seeds N] [--variants NAME ...] [--json PATH]

SmolLM2-135M in bfloat16 with prompts in float32, three tasks in one mixed run, rows, rates and held-out rows as in
objectives.py, whose run of "tokens" with normalized gradients is `plain` here. FOLDER holds what objectives.py reads.
A variant that does more in a step, or something before the first, has fewer steps, so that all take as long.

- plain: the loss of the target's tokens over the vocabulary.
- mixed 0.3, mixed 1: the loss of the label among the labels, and 0.3 or 1 times that of its tokens.
- average: a prompt is the average of its steps, of which each weighs 0.9 times the next one.
- residual: a prompt is its start, what is learned, and what a small network shared by its tokens makes of that
  (arXiv 2305.03937).
- superposition: a prompt is its start and a learned sum of 128 embeddings of the vocabulary for each token
  (arXiv 2406.05279).
- best start: of four starts, the one with the least loss on 24 rows, all of them read in one mixed pass.
- ensemble: three prompts a task, from three starts, whose probabilities are averaged (arXiv 2104.08691, section 6).
- rate 0.005, 0.01, 0.05: in place of 0.02. 5 tokens, 50 tokens: of a prompt, in place of the instruction's 17 or 25.
- best rate: of three rates, the one with the least loss on 24 rows after 6 steps, all of them in one mixed run.

Right: the likeliest label is the row's. Written: so is the likeliest token of the whole vocabulary.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import objectives
import peers
import torch
from measure import digits, option_parser, parsed, progress, report
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from lightning_softprompt import PromptGradientClipping, SoftPrompts, Text, Tokens, attach, detach
from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.base.tokens import encode_text
from lightning_softprompt.data.encoding import Example, collate
from lightning_softprompt.training.objectives import label_loss, token_losses

STEPS, ROWS, RATE = 50, objectives.ROWS_A_TASK, 0.02
RANKING_ROWS = 24  # of a task, that starts and rates are compared on: about as long as four steps where there are four
CUE = "\nAnswer:"  # of the template
RATES = (0.007, 0.02, 0.05)
STARTS = (
    "Decide which of these the text is: {labels}.\nText: ",
    "Is the text below {labels}?\nText: ",
    "Classify the text. The answer is one of {labels}.\nText: ",
    "Read the text and answer with one word: {labels}.\nText: ",
)


class Bank:
    """Prompts of one attached model, each of which belongs to a task, and the rows that the seed draws for them."""

    def __init__(self, model: Any, tokenizer: Any, tasks: dict[str, objectives.Task], seed: int) -> None:
        self.model, self.tokenizer, self.tasks, self.seed = model, tokenizer, tasks, seed
        self.draw = random.Random(seed)
        self.orders: dict[str, list[Example]] = {name: [] for name in tasks}

    def starts(self, count: int) -> dict[str, Text]:
        """The first `count` starts of each task, under the names of `copies`."""
        found = {}
        for name, task in self.tasks.items():
            labels = ", ".join(label.strip() for label in task.encoding.template.labels or ())
            found |= {f"{name}.{number}": Text(STARTS[number].format(labels=labels)) for number in range(count)}
        return found

    def prompts(self, starts: Mapping[str, Text | Tokens]) -> SoftPrompts:
        """New prompts, in place of those that were attached."""
        if attachment_of(self.model) is not None:
            detach(self.model)
        prompts = SoftPrompts.for_model(self.model, starts, self.tokenizer, seed=self.seed)
        attach(self.model, prompts)
        return prompts

    def rows(self, task: str, count: int) -> list[Example]:
        if len(self.orders[task]) < count:
            self.orders[task] = self.draw.sample(self.tasks[task].train, len(self.tasks[task].train))
        return [self.orders[task].pop() for _ in range(count)]

    def losses(self, rows: dict[str, list[Example]], share: float | None) -> tuple[Tensor, Tensor, list[str]]:
        """The loss of each row, over how many targets it is summed, and the prompt of the row."""
        batch = collate([row for of_prompt in rows.values() for row in of_prompt], self.tokenizer.pad_token_id)
        names = [name for name, of_prompt in rows.items() for _ in of_prompt]
        labels = batch.pop("labels")
        keep = int((labels != -100).any(0).sum()) + 1
        labels = labels[:, -keep:].to(self.model.device)
        inputs = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        logits = self.model(**inputs, tasks=names, logits_to_keep=keep).logits
        losses, counts = token_losses(logits, labels)
        if share is None:
            return losses, counts, names
        known = {name: self.tasks[task_of(name)].encoding.label_ids or [] for name in rows}
        among = label_loss(logits, labels, names, known, reduction="none")
        return among + share * losses, torch.ones_like(counts), names

    @torch.no_grad()
    def ranked(self, names: Iterable[str]) -> dict[str, float]:
        """The mean loss of each prompt on rows that all prompts of its task share."""
        shared = {task: self.rows(task, RANKING_ROWS) for task in self.tasks}
        losses, _, of = self.losses({name: shared[task_of(name)] for name in names}, None)
        found: dict[str, float] = dict.fromkeys(names, 0.0)
        for loss, name in zip(losses.tolist(), of, strict=True):
            found[name] += loss / RANKING_ROWS
        return found

    @torch.no_grad()
    def judge(self, names: Iterable[str]) -> dict[str, float]:
        """Percent right and percent written of each task, by the mean probability of its prompts' answers."""
        found: dict[str, float] = {}
        written = []
        for task, what in self.tasks.items():
            of_task = [name for name in names if task_of(name) == task]
            labels = [label.strip() for label in what.encoding.template.labels or ()]
            first = torch.tensor([ids[0] for ids in what.encoding.label_ids or []], device=self.model.device)
            ids = first.tolist()
            assert len(set(ids)) == len(ids), "two labels begin alike"
            texts = sorted(what.held_out, key=lambda pair: len(pair[0]))
            right = whole = 0
            for begin in range(0, len(texts), 40):
                part = texts[begin : begin + 40]
                total: Any = 0
                for name in of_task:
                    prepared = [text + CUE for text, _ in part]
                    inputs = self.tokenizer(prepared, return_tensors="pt", padding=True, padding_side="left")
                    inputs = inputs.to(self.model.device)
                    out = self.model(**inputs, tasks=[name] * len(part), logits_to_keep=1)
                    total = total + out.logits[:, -1].float().softmax(-1)
                chosen, token = total[:, first].argmax(1).tolist(), total.argmax(1).tolist()
                for number, (_, label) in enumerate(part):
                    right += labels[chosen[number]] == label
                    whole += token[number] == ids[labels.index(label)]
            found[task] = 100 * right / len(texts)
            written.append(100 * whole / len(texts))
        return found | {"mean": statistics.mean(found.values()), "written": statistics.mean(written)}


def task_of(name: str) -> str:
    return name.split(".")[0]


class Plain:
    """What is trained are the prompts themselves."""

    def __init__(self, prompts: dict[str, nn.Parameter], model: Any) -> None:
        self.prompts = prompts

    def groups(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        return [{"params": [prompt], "lr": rates[name]} for name, prompt in self.prompts.items()]

    def write(self) -> None:
        """Write what is trained into the prompts."""

    def pass_on(self) -> None:
        """Pass the prompts' gradients on to what is trained."""


class Made(Plain):
    """Prompts that are made of what is trained."""

    def __init__(self, prompts: dict[str, nn.Parameter], model: Any) -> None:
        super().__init__(prompts, model)
        self.starts = {name: prompt.detach().clone() for name, prompt in prompts.items()}
        self.values: dict[str, Tensor] = {}

    def make(self, name: str) -> Tensor:
        raise NotImplementedError

    def write(self) -> None:
        self.values = {name: self.make(name) for name in self.prompts}
        for name, prompt in self.prompts.items():
            prompt.data.copy_(self.values[name].detach())

    def pass_on(self) -> None:
        for name, prompt in self.prompts.items():
            assert prompt.grad is not None
            self.values[name].backward(prompt.grad)


class Residual(Made):
    def __init__(self, prompts: dict[str, nn.Parameter], model: Any) -> None:
        super().__init__(prompts, model)
        self.learned = {name: nn.Parameter(start.clone()) for name, start in self.starts.items()}
        self.networks = {name: self.network(start.shape[1]).to(start.device) for name, start in self.starts.items()}

    @staticmethod
    def network(hidden: int, inner: int = 128) -> nn.Module:
        network = nn.Sequential(nn.Linear(hidden, inner), nn.ReLU(), nn.Linear(inner, hidden), nn.LayerNorm(hidden))
        nn.init.zeros_(network[-1].weight)  # begins at the start, as all others do
        return network

    def groups(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        prompts = [{"params": [learned], "lr": rates[name]} for name, learned in self.learned.items()]
        return prompts + [{"params": network.parameters(), "lr": 1e-3} for network in self.networks.values()]

    def make(self, name: str) -> Tensor:
        return self.learned[name] + self.networks[name](self.learned[name])


class Superposition(Made):
    def __init__(self, prompts: dict[str, nn.Parameter], model: Any) -> None:
        super().__init__(prompts, model)
        table = model.get_input_embeddings().weight.detach()
        self.embeddings = table[torch.randperm(len(table))[:128]].float()
        zeros = {name: self.embeddings.new_zeros(len(start), 128) for name, start in self.starts.items()}
        self.weights = {name: nn.Parameter(each) for name, each in zeros.items()}

    def groups(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        return [{"params": [weight], "lr": rates[name]} for name, weight in self.weights.items()]

    def make(self, name: str) -> Tensor:
        return self.starts[name] + self.weights[name] @ self.embeddings


def train(
    bank: Bank,
    prompts: SoftPrompts,
    steps: int,
    share: float | None = None,
    kind: type[Plain] = Plain,
    rates: dict[str, float] | None = None,
    end: int | None = None,
    decay: float = 0.0,
) -> None:
    """Train all prompts in one mixed run; `end` is the last step of the rates' schedule, `decay` that of an average."""
    parameters = {name: prompts[name] for name in prompts}
    averages = {name: prompt.detach().clone() for name, prompt in parameters.items()}
    made = kind(parameters, bank.model)
    optimizer = AdamW(made.groups(rates or dict.fromkeys(parameters, RATE)), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, (end or steps) // 8), end or steps)
    clipping = PromptGradientClipping(method="normalized")
    for _ in range(steps):
        made.write()
        rows = {name: bank.rows(task_of(name), ROWS) for name in parameters}
        losses, counts, _ = bank.losses(rows, share)
        for parameter in parameters.values():
            parameter.grad = None
        optimizer.zero_grad()
        (losses.sum() / counts.sum()).backward()
        clipping.clip(parameters)
        made.pass_on()
        optimizer.step()
        schedule.step()
        for name, average in averages.items():
            average.lerp_(parameters[name].detach(), 1 - decay)
    made.write()
    if decay:
        for name, average in averages.items():
            parameters[name].data.copy_(average)


def plain(bank: Bank, steps: int, **options: Any) -> list[str]:
    prompts = bank.prompts(bank.starts(1))
    train(bank, prompts, steps, **options)
    return list(prompts)


def of_rate(bank: Bank, steps: int, rate: float) -> list[str]:
    prompts = bank.prompts(bank.starts(1))
    train(bank, prompts, steps, rates=dict.fromkeys(prompts, rate))
    return list(prompts)


def of_length(bank: Bank, steps: int, length: int) -> list[str]:
    """Prompts that start from the first tokens of the instruction, which is repeated where it has fewer."""
    ids = {name: encode_text(bank.tokenizer, start.text) for name, start in bank.starts(1).items()}
    prompts = bank.prompts({name: Tokens((each * length)[:length]) for name, each in ids.items()})
    train(bank, prompts, steps)
    return list(prompts)


def best_start(bank: Bank, steps: int) -> list[str]:
    starts = bank.starts(len(STARTS))
    losses = bank.ranked(list(bank.prompts(starts)))
    chosen = {name: starts[name] for name in least(losses)}
    prompts = bank.prompts(chosen)
    train(bank, prompts, max(1, steps - 6))
    return list(prompts)


def least(losses: dict[str, float]) -> list[str]:
    """The prompt of each task that has the least loss."""
    tasks = dict.fromkeys(task_of(name) for name in losses)
    return [min((name for name in losses if task_of(name) == task), key=losses.__getitem__) for task in tasks]


def ensemble(bank: Bank, steps: int) -> list[str]:
    prompts = bank.prompts(bank.starts(3))
    train(bank, prompts, max(1, round(steps / 3)))
    return list(prompts)


def best_rate(bank: Bank, steps: int) -> list[str]:
    first = bank.starts(1)
    starts = {f"{task_of(name)}.{number}": start for name, start in first.items() for number in range(len(RATES))}
    prompts = bank.prompts(starts)
    rates = {name: RATES[int(name.split(".")[1])] for name in starts}
    train(bank, prompts, min(6, steps), rates=rates, end=steps)
    chosen = least(bank.ranked(list(prompts)))
    progress.print({name: rates[name] for name in chosen})
    prompts = bank.prompts({name: starts[name] for name in chosen})
    train(bank, prompts, max(1, steps - 21), rates=rates)
    return list(prompts)


VARIANTS: dict[str, Callable[[Bank, int], list[str]]] = {
    "plain": plain,
    "mixed 0.3": lambda bank, steps: plain(bank, steps, share=0.3),
    "mixed 1": lambda bank, steps: plain(bank, steps, share=1.0),
    "average": lambda bank, steps: plain(bank, steps, decay=0.9),
    "residual": lambda bank, steps: plain(bank, steps, kind=Residual),
    "superposition": lambda bank, steps: plain(bank, steps, kind=Superposition),
    "best start": best_start,
    "ensemble": ensemble,
    "best rate": best_rate,
    "rate 0.005": lambda bank, steps: of_rate(bank, steps, 0.005),
    "rate 0.01": lambda bank, steps: of_rate(bank, steps, 0.01),
    "rate 0.05": lambda bank, steps: of_rate(bank, steps, 0.05),
    "5 tokens": lambda bank, steps: of_length(bank, steps, 5),
    "50 tokens": lambda bank, steps: of_length(bank, steps, 50),
}


def main() -> None:
    parser = option_parser(__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--data", type=Path, required=True, help="a folder with the rows of the tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), help="a run of each kind for each of them")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="all, if none is named")
    options = parsed(parser)
    _, tokenizer = peers.load_base("cpu")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    folder = peers.ROOT / ".cache" / "smollm2-135m"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(options.device)
    tasks = objectives.tasks_of_a_folder(tokenizer, options.data)
    rows = []
    for seed in options.seeds[:1] if options.quick else options.seeds:
        for name in options.variants:
            torch.manual_seed(seed)
            bank = Bank(model, tokenizer, tasks, seed)
            start = time.process_time()
            trained = VARIANTS[name](bank, 2 if options.quick else STEPS)
            seconds = time.process_time() - start
            rows.append({"variant": name, "seed": seed, **bank.judge(trained), "CPU s": seconds})
            progress.print(json.dumps(rows[-1]))
    summary = []
    for name in options.variants:
        of_kind = [row for row in rows if row["variant"] == name]
        means = {key: digits(statistics.mean(row[key] for row in of_kind)) for key in (*tasks, "mean")}
        worst = digits(min(row["mean"] for row in of_kind))
        rest = {key: digits(statistics.mean(row[key] for row in of_kind)) for key in ("written", "CPU s")}
        summary.append({"variant": name, **means, "worst seed": worst, **rest})
    listed = [
        {name: digits(value) if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]
    report("Variants of a run", {"Over seeds, % right": summary, "Each run": listed}, options)


if __name__ == "__main__":
    main()
