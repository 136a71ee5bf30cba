"""What the tests of the real server need: folders of prompts, an export, and the answers of the bare model.

`make test-vllm` runs it with the library's own environment, so that the answers come from another library, by another
way: the bare model in transformers, row by row, on hard tokens or on the prompt's rows as embeddings.

    python integrations/vllm/tests/prepare.py FOLDER [ROWS] [NEW]

writes into FOLDER, with ROWS requests for each task and NEW tokens for each request.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_softprompt import SoftPrompts, TaskTemplate, Tokens
from lightning_softprompt.interop.virtual_tokens import export_model

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "examples"))

from smollm2_and_vader import prepare_model  # noqa: E402

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


class BareModel:
    """The bare model, as the oracle. Every row is asked for alone."""

    def __init__(self, base: Path, new: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model.generation_config.eos_token_id = None  # as many tokens of each row
        self.new = new

    @torch.no_grad()
    def answer(self, rows: Tensor | list[int], ids: list[int]) -> dict[str, Any]:
        """Greedy tokens behind `rows` (a prompt as ids, or as embeddings `[length, hidden]`) and a text's `ids`.

        `logprob` is the log-probability of the first of them.
        """
        if isinstance(rows, Tensor):
            embeds = torch.cat([rows, self.model.get_input_embeddings()(torch.tensor(ids))])
            given: dict[str, Any] = {"inputs_embeds": embeds[None]}
        else:
            given = {"input_ids": torch.tensor([[*rows, *ids]])}
        mask = torch.ones(1, len(rows) + len(ids), dtype=torch.int64)
        options = {"max_new_tokens": self.new, "do_sample": False, "output_scores": True}
        out = self.model.generate(**given, attention_mask=mask, return_dict_in_generate=True, **options)
        new = out.sequences[0, -self.new :].tolist()
        return {"new": new, "logprob": float(out.scores[0][0].log_softmax(0)[new[0]])}

    def rows(self, prompts: SoftPrompts, tasks: list[str | None]) -> list[dict[str, Any]]:
        """A request for each of `tasks` (None: the base), each with another text, and its answer."""
        made = []
        for task, text in zip(tasks, texts(len(tasks)), strict=True):
            ids = self.tokenizer(text)["input_ids"]
            rows = [] if task is None else prompts.hard_ids.get(task, prompts[task].detach())
            made.append({"task": task, "text": text, "ids": ids, **self.answer(rows, ids)})
        return made

    def templated(self, prompts: SoftPrompts) -> list[dict[str, Any]]:
        """A request for each task with a template of one column, which is written here without the library."""
        text = texts(2)[1]
        turns = [("system", "Answer in one word."), ("user", f"Is this good? {text}")]
        messages = [{"role": role, "content": content} for role, content in turns]
        given = {
            "review": self.tokenizer(f"Review: {text}\nSentiment:")["input_ids"],
            "talk": self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        }
        return [
            {"task": task, "text": text, "messages": messages, **self.answer(prompts[task].detach(), ids)}
            for task, ids in given.items()
        ]


def main(folder: Path, rows: int = 2, new: int = 16) -> None:
    """Write everything into `folder`, in place of what is there."""
    torch.set_num_threads(1)  # beside other work two take ten times as long as one
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = prepare_model(ROOT / ".cache")
    bare = BareModel(base, new)
    first = bank(bare.model, 0, LENGTHS | dict.fromkeys(TEMPLATES, 32))
    first.templates.update(TEMPLATES)
    second = bank(bare.model, 1, {"hard-a": 32, "soft-a": 64, "new": 32})
    first.save_pretrained(folder / "first")
    second.save_pretrained(folder / "second")
    expected = {
        "base": str(base),
        "new": new,
        "tasks": {"first": list(first.tasks), "second": list(second.tasks)},
        "lengths": dict(zip(first.tasks, first.lengths, strict=True)),
        "first": bare.rows(first, [*LENGTHS] * rows),
        "second": bare.rows(second, [*second.tasks]),
        "bare": bare.rows(first, [None] * 2 * rows),
        "templated": bare.templated(first),
    }
    text = expected["first"][2]  # of soft-a, which both banks have
    expected["both"] = text | {"other": bare.answer(second["soft-a"].detach(), text["ids"])["new"]}
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    known = first.base
    first.base = replace(known, name="another", fingerprint=tuple(reversed(known.fingerprint)))
    first.save_pretrained(folder / "other-base")
    export_model(base, folder / "first", folder / "export")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
