"""What the tests of the real server need: folders of prompts, an export, and the answers of the bare model.

`make test-vllm` runs it with the library's own environment, so that the answers come from another version of
transformers, by another way: the bare model, row by row, on hard tokens or on the prompt's rows as embeddings.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_softprompt import SoftPrompts, TaskTemplate, Tokens

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "examples"))

from smollm2_and_vader import prepare_model  # noqa: E402

NEW = 32
LENGTHS = {"hard-a": 32, "hard-b": 64, "soft-a": 32, "soft-b": 32, "soft.c": 32, "größe": 32, "short": 7, "long": 100}
TEMPLATES = {
    "review": TaskTemplate("Review: {text}\nSentiment:", " {label}", labels=[" positive", " negative"]),
    "talk": TaskTemplate("Is this good? {text}", "{label}", chat=True, system="Answer in one word."),
    "pair": TaskTemplate("{first} {second}", " {label}"),
}
WORDS = (["The film", "This phone", "Our trip to the sea", "The new law on rents"], ["was", "looked", "seemed", "is"])
ENDS = ["better than anyone had hoped", "dull, and far too long", "fine, I think", "not worth its price"]


def texts(count: int) -> list[str]:
    """Texts of several lengths, each another one."""
    made = [f"{one} {two} {end}" for end in ENDS for two in WORDS[1] for one in WORDS[0]]
    return [(made[index] + ". " + made[-index - 1]) if index % 3 else made[index] for index in range(count)]


def bank(model: Any, seed: int, tasks: dict[str, int]) -> SoftPrompts:
    """Prompts of the model's own tokens; those whose names do not begin with `hard` are moved off them."""
    draw = torch.Generator().manual_seed(seed)
    starts = {name: Tokens(torch.randint(100, 40_000, (n,), generator=draw).tolist()) for name, n in tasks.items()}
    prompts = SoftPrompts.for_model(model, starts)
    with torch.no_grad():
        for name in tasks:
            if not name.startswith("hard"):
                prompts[name].add_(torch.randn(prompts[name].shape, generator=draw) * 0.5 * prompts[name].std())
    prompts.hard_ids = {name: start.ids for name, start in starts.items() if name.startswith("hard")}
    return prompts


@torch.no_grad()
def answer(model: Any, rows: Tensor | list[int] | None, ids: list[int]) -> dict[str, Any]:
    """Greedy tokens of the bare model on one row, and the log-probability of the first: rows as ids, or embeddings."""
    if isinstance(rows, Tensor):
        given = {"inputs_embeds": torch.cat([rows, model.get_input_embeddings()(torch.tensor(ids))])[None]}
    else:
        given = {"input_ids": torch.tensor([[*(rows or []), *ids]])}
    width = next(iter(given.values())).shape[1]
    given["attention_mask"] = torch.ones(1, width, dtype=torch.int64)
    out = model.generate(**given, max_new_tokens=NEW, do_sample=False, output_scores=True, return_dict_in_generate=True)
    new = out.sequences[0, -NEW:].tolist()
    return {"new": new, "logprob": float(out.scores[0][0].log_softmax(0)[new[0]])}


def rows_of(model: Any, tokenizer: Any, prompts: SoftPrompts, tasks: list[str | None]) -> list[dict[str, Any]]:
    """One request for each of `tasks` (None: the base) with what the bare model answers."""
    made = []
    for task, text in zip(tasks, texts(len(tasks)), strict=True):
        ids = tokenizer(text)["input_ids"]
        rows = None if task is None else prompts.hard_ids.get(task, prompts[task].detach())
        made.append({"task": task, "text": text, "ids": ids, **answer(model, rows, ids)})
    return made


def templated(model: Any, tokenizer: Any, prompts: SoftPrompts) -> list[dict[str, Any]]:
    """A text for each task with a template of one column, the chat written with transformers alone."""
    text = texts(2)[1]
    review = tokenizer(f"Review: {text}\nSentiment:")["input_ids"]
    turns = [("system", "Answer in one word."), ("user", f"Is this good? {text}")]
    chat = [{"role": role, "content": content} for role, content in turns]
    talk = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    made = {"review": review, "talk": talk}
    return [
        {"task": task, "text": text, "messages": chat, "ids": ids, **answer(model, prompts[task].detach(), ids)}
        for task, ids in made.items()
    ]


def main(folder: Path) -> None:
    """Write everything into `folder`, in place of what is there."""
    torch.set_num_threads(2)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (ROOT / ".cache").mkdir(exist_ok=True)
    base = prepare_model(ROOT / ".cache")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    model.generation_config.eos_token_id = None  # as many tokens of each row
    first = bank(model, 0, LENGTHS | dict.fromkeys(TEMPLATES, 32))
    first.templates.update(TEMPLATES)
    second = bank(model, 1, {"hard-a": 32, "soft-a": 64, "new": 32})
    first.save_pretrained(folder / "first")
    second.save_pretrained(folder / "second")
    other = first.base
    first.base = type(other)("another", other.hidden_size, other.ids, tuple(reversed(other.fingerprint)))
    first.save_pretrained(folder / "other-base")
    first.base = other
    expected = {
        "base": str(base),
        "first": rows_of(model, tokenizer, first, [*LENGTHS] * 4),
        "second": rows_of(model, tokenizer, second, [*second.tasks] * 2),
        "bare": rows_of(model, tokenizer, first, [None] * 4),
        "templated": templated(model, tokenizer, first),
        "tasks": {"first": list(first.tasks), "second": list(second.tasks)},
        "lengths": dict(zip(first.tasks, first.lengths, strict=True)),
    }
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
