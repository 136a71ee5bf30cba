"""Tasks with templates, their rows, and what the bare model says of them in float64, row by row, on hard tokens."""

from __future__ import annotations

from typing import Any

import torch

from lightning_softprompt import MixedTaskGenerator, SoftPrompts, TaskTemplate, Tokens, attach
from tests import tiny
from tests.tokenizer import word_tokenizer

END = 2
HARD = {**tiny.HARD, "raw": [40, 41, 42]}
CHAT = "{% for turn in messages %}{{ turn.content }} {{ 'w55' if turn.role == 'system' else 'w56' }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}w57{% endif %}"
TEMPLATES = {
    "long": TaskTemplate("w5 {text} w6", " {label}", labels=[" w10", " w10 w11", " w12 w13", " w12 w14 w15"]),
    "short": TaskTemplate("{first} w7 {second}", "{label}"),
    "one": TaskTemplate("{text}", "{label}", labels=["w20 w22", "w21"], chat=True, system="w9"),
}
LABELS = {"long": [[10, END], [10, 11, END], [12, 13, END], [12, 14, 15, END]], "one": [[20, 22], [21]]}
# Each row with its task, and the token ids that its text must become.
ROWS: list[tuple[Any, str | None, list[int]]] = [
    ("w30 w31", "long", [5, 30, 31, 6]),
    ({"first": "w30", "second": "w33 w34", "other": 3}, "short", [30, 7, 33, 34]),
    ({"text": "w35"}, "one", [9, 55, 35, 56, 57]),
    ("w36 w37 w38", "raw", [36, 37, 38]),
    ("w39", None, [39]),
    ({"text": "w43 w44 w45 w46"}, "long", [5, 43, 44, 45, 46, 6]),
    ({"first": "w47", "second": "w48"}, "short", [47, 7, 48]),
    ("w49 w50", "one", [9, 55, 49, 50, 56, 57]),
    ("w58", "long", [5, 58, 6]),
]


def words() -> Any:
    """A tokenizer whose word w5 has the id 5, with a chat template; stop strings need one that knows "abcdef"."""
    tokenizer = word_tokenizer(["abcdef", *(f"w{index}" for index in range(5, tiny.VOCABULARY))])
    tokenizer.chat_template = CHAT
    return tokenizer


def generator(kind: str = "llama") -> MixedTaskGenerator:
    """One that answers `TEMPLATES`; the task "raw" has none."""
    model = tiny.tiny_model(kind)
    prompts = SoftPrompts.for_model(model, {task: Tokens(ids) for task, ids in HARD.items()})
    prompts.templates.update(TEMPLATES)
    return MixedTaskGenerator(attach(model, prompts), words())


def split(rows: list[Any] = ROWS) -> dict[str, Any]:
    return {"rows": [row for row, *_ in rows], "tasks": [task for _, task, *_ in rows]}


def probabilities(kind: str, task: str, text: list[int]) -> dict[str, float]:
    """The probability of each label over the trie of the task's labels, a pass of the bare float64 model a node."""
    bare = tiny.tiny_model(kind).double()
    labels = LABELS[task]
    found = []
    for label in labels:
        product = 1.0
        for place, token in enumerate(label):
            children = sorted({other[place] for other in labels if other[:place] == label[:place]})
            logits = tiny.hard_row(bare, tiny.Row(0, HARD[task], text + label[:place]))[-1]
            product *= float(logits[children].softmax(0)[children.index(token)])
        found.append(product)
    assert abs(sum(found) - 1) < 1e-9
    return dict(zip(TEMPLATES[task].labels or [], found, strict=True))


def written(kind: str, task: str | None, text: list[int], new: int, ends: list[int]) -> tuple[list[int], str]:
    """The new tokens of the bare model without the one that ended them, and why they ended."""
    row = tiny.Row(0, HARD[task] if task else [], text)
    (ids,) = tiny.hard_greedy(tiny.tiny_model(kind), row, new, do_sample=False, eos_token_id=ends, pad_token_id=1)
    return (ids[:-1], "stop") if ids[-1] in ends else (ids, "length")


def expected(kind: str = "llama", new: int = 6, ends: tuple[int, ...] = (END,)) -> list[tuple[str, list[int], str]]:
    """For each of `ROWS` the text, the token ids and the finish reason of its answer."""
    tokenizer, answers = words(), []
    for _, task, text in ROWS:
        if task in LABELS:
            shares = probabilities(kind, str(task), text)
            label = max(shares, key=shares.__getitem__)
            answers.append((label.strip(), [int(word[1:]) for word in label.split()], "label"))
        else:
            ids, reason = written(kind, task, text, new, [*ends])
            answers.append((tokenizer.decode(ids, skip_special_tokens=True).strip(), ids, reason))
    return answers


def forward_passes(model: torch.nn.Module) -> list[torch.Size]:
    """The shapes of the inputs of all passes from now on."""
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda m, a, k: shapes.append(k["input_ids"].shape), with_kwargs=True)
    return shapes
