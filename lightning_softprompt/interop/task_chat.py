"""A chat template with `task=`: the task's prompt, then its text as it was trained, or the chat.

It is Jinja, as tokenizers and GGUF files hold it, and so every engine puts a request into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.prompts.templates import TaskTemplate, columns_of, fields_of

_NO_CHAT = '{{- raise_exception("the base has no chat template: name a task") -}}'
# Nothing of what the base's template ends with is removed, as no block begins behind its spaces.
_END = '{{ "" }}{% endif %}'


@dataclass(frozen=True)
class TaskText:
    """What a chat template writes for a task.

    Attributes:
        prefix: what stands in front of a text: the virtual tokens, and the start token where there is one.
        prompt: the virtual tokens alone, which stand in front of a chat.
        template: how the task was trained; None for a task without a template.
    """

    prefix: str
    prompt: str
    template: TaskTemplate | None

    def as_json(self, has_chat: bool) -> dict[str, Any]:
        """What the template reads; `has_chat` tells whether the base has a chat template."""
        template = self.template
        is_chat = has_chat if template is None else template.chat
        return {
            "prompt": self.prompt if is_chat else self.prefix,
            "chat": is_chat,
            "parts": ["", ""] if template is None else _parts(template.text),
            "system": None if template is None else template.system,
        }


def chat_template(base: str | None, tasks: Mapping[str, TaskText]) -> str:
    """The chat template of an export.

    Without a `task` it does what `base` does. With one it writes the prompt, and behind it the last message as the text
    of the task's template; of a task that was trained in chats, or has no template, the whole chat by `base`. A text
    template of several columns, an unknown task, and a chat without `base` raise an error in the engine.

    Args:
        base: the base's own chat template; None if it has none.
        tasks: the tasks.
    """
    known = json.dumps({task: text.as_json(base is not None) for task, text in tasks.items()}, ensure_ascii=False)
    return (
        "\n".join(
            [
                f"{{%- set soft_tasks = {known} -%}}",
                "{%- set soft = none -%}",
                "{%- if task is defined and task -%}",
                '{%- if task not in soft_tasks -%}{{- raise_exception("there is no task " + task) -}}{%- endif -%}',
                "{%- set soft = soft_tasks[task] -%}",
                '{%- if not soft["parts"] -%}',
                '{{- raise_exception("the text of this task has several columns: write it out, behind its prefix") -}}',
                "{%- endif -%}",
                '{{- soft["prompt"] -}}',
                '{%- set soft_text = soft["parts"] | join(messages[-1]["content"]) -%}',
                "{%- endif -%}",
                '{%- if soft and not soft["chat"] -%}',
                "{{- soft_text -}}",
                "{%- else -%}",
                "{%- if soft -%}",
                '{%- set messages = messages[:-1] + [{"role": messages[-1]["role"], "content": soft_text}] -%}',
                '{%- if soft["system"] is string and messages[0]["role"] != "system" -%}',
                '{%- set messages = [{"role": "system", "content": soft["system"]}] + messages -%}',
                "{%- endif -%}",
                # The newline behind this is removed, and nothing of what the base's template begins with.
                "{%- endif %}",
                _NO_CHAT if base is None else base.removesuffix("\n"),
            ]
        )
        + _END
    )


def _parts(text: str) -> list[str] | None:
    """The text of a template around its column, to be joined by it; None for a text of several columns."""
    if len(set(columns_of(text))) > 1:
        return None
    parts = [""]
    for words, name in fields_of(text):
        parts[-1] += words
        if name is not None:
            parts.append("")
    return parts
