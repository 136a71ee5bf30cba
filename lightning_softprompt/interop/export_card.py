"""The README.md of an exported model: which tasks it holds, what a request is for each engine, and what it costs.

Names and templates may hold anything that Markdown takes for markup. Each stands in the card as it is.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_softprompt.prompts.model_card import escaped, literal, quoted, request_text
from lightning_softprompt.prompts.templates import TaskTemplate


@dataclass(frozen=True)
class ExportedTask:
    """A task as the card shows it.

    Attributes:
        ids: its prefix as ids: the virtual tokens, and the start token if there is one.
        prefix: its prefix as text.
        template: how it was trained; None for a task without a template.
    """

    ids: list[int]
    prefix: str
    template: TaskTemplate | None


def export_card(base: str, tasks: Mapping[str, ExportedTask], start_text: str, gap: float, size: int) -> str:
    """The text of the card.

    Args:
        base: the name of the base.
        tasks: the tasks.
        start_text: the start token, which the base's tokenizer adds and the export's does not; empty if there is none.
        gap: what `export_model` measured.
        size: the size of the weights, in bytes.
    """
    # A task whose request is its prefix and a text shows most.
    plain = (task for task, each in tasks.items() if each.template is not None and not each.template.chat)
    task = next(plain, next(iter(tasks)))
    shown = tasks[task]
    parts = [
        f"# {escaped(base)} with soft prompts",
        "An ordinary causal LM. Its soft prompts are *virtual tokens* behind the vocabulary: a request is the tokens "
        "of a task, then the text. The model never writes one: on held-out texts its best token stood "
        f"{gap:.0f} above every virtual one, in units of logits. Texts without virtual tokens have the base's logits.",
        "\n".join(
            ["| task | tokens in front | written | text |", "|---|---:|---|---|", *map(_row, tasks, tasks.values())]
        ),
        "`virtual_tokens.json` has the ids of each task, which may always stand in front of the ids of a text.",
        "An engine writes its answers freely, to a task with labels, too. `lightning-softprompt serve` ranks the "
        "labels, and tells their probabilities.",
        *_start(start_text),
        "## transformers",
        _python(task, shown),
        "## vLLM",
        _vllm(task, shown),
        "## llama.cpp",
        _llama_cpp(shown),
        "## What it costs",
        f"A second checkpoint: {size / 2**20:,.0f} MiB of weights, all of the base and a head of its own, to be "
        "written again whenever a prompt changes. Each request pays for its task's tokens, unless the engine keeps "
        "prefixes. Whoever may write a virtual token or an alias into a text chooses the task: take them out of what "
        "strangers send. `MixedTaskGenerator` of lightning-softprompt needs none of this.",
    ]
    return "\n\n".join(parts) + "\n"


def _row(task: str, each: ExportedTask) -> str:
    text = quoted("…") if each.template is None else request_text(each.template)
    return f"| {escaped(task)} | {len(each.ids)} | {escaped(_short(each.prefix))} | {text} |"


def _start(start_text: str) -> list[str]:
    if not start_text:
        return []
    return [
        f"The base's tokenizer begins every text with {literal(start_text)}. That has to stand behind the virtual "
        "tokens, so this tokenizer does not add it: prefixes and chats hold it, and a text without a task begins with "
        "it written out."
    ]


def _python(task: str, shown: ExportedTask) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
        "",
        "def answer(inputs):",
        "    ids = model.generate(**inputs, max_new_tokens=8)[0]",
        '    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
        "",
        f'print(answer(tokenizer({literal(_request(shown))}, return_tensors="pt")))',
        'chat = [{"role": "user", "content": "…"}]',
        f'options = {{"task": {literal(task)}, "add_generation_prompt": True, "return_dict": True}}',
        'print(answer(tokenizer.apply_chat_template(chat, return_tensors="pt", **options)))',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _vllm(task: str, shown: ExportedTask) -> str:
    body = {"model": "FOLDER", "prompt": _request(shown), "max_tokens": 8}
    chat = {"messages": [{"role": "user", "content": "…"}], "chat_template_kwargs": {"task": task}}
    lines = [
        "vllm serve FOLDER --enable-prefix-caching",
        f"curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d {_json(body)}",
        "curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d {_json({'model': 'FOLDER', **chat})}",
    ]
    return "```bash\n" + "\n".join(lines) + "\n```"


def _llama_cpp(shown: ExportedTask) -> str:
    lines = [
        "lightning-softprompt export-gguf --gguf BASE.gguf --prompts PROMPTS --output tasks.gguf",
        "llama-server -m tasks.gguf --jinja",
        f"curl localhost:8080/completion -d {_json({'prompt': [*shown.ids, _text(shown)], 'n_predict': 8})}",
    ]
    return (
        "It has tokenizers of its own, and no aliases: ids stand in front of the text, as `tasks.gguf.json` lists "
        "them. Chats take `chat_template_kwargs` as above.\n\n```bash\n" + "\n".join(lines) + "\n```"
    )


def _request(shown: ExportedTask) -> str:
    return _short(shown.prefix) + _text(shown)


def _text(shown: ExportedTask) -> str:
    return "…" if shown.template is None else shown.template.text


def _short(prefix: str) -> str:
    """A prefix that was written out fills no page."""
    return prefix if len(prefix) <= 120 else f"{prefix[:50]}…{prefix[-50:]}"


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return shlex.quote("".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text))
