"""The model card of a folder of prompts: a README.md that tells which tasks it holds and how to answer with them.

Names and templates may hold anything that Markdown takes for markup. Each stands in the card as it is.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.prompts.characters import has_control
from lightning_softprompt.prompts.index import Entry
from lightning_softprompt.prompts.templates import TaskTemplate, columns_of

CARD_NAME = "README.md"
MARKER = "<!-- Written by lightning-softprompt; the next save replaces this file, unless this line is removed. -->"
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?(?<![.-])", re.ASCII)
# Characters that show nothing, or change the order of what follows them: Markdown has no escape sequence for them.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def model_card(entries: Sequence[Entry], base: BaseModel | None, folder: str) -> str:
    """The text of the card.

    Args:
        entries: the tasks.
        base: the base model; None if it is not known.
        folder: how the card calls the folder: its name, or its id on the Hugging Face Hub.

    Example:
        >>> card = model_card([Entry("tone", 8, "Vocabulary(length=8)", False)], None, "prompts")
        >>> "| tone | 8 | none | free text |" in card, card.rstrip().endswith(MARKER)
        (True, True)
    """
    hub_id = base.name if base is not None and looks_like_hub_id(base.name) else None
    front = ["---", "library_name: lightning-softprompt", "tags:", "- prompt-tuning", "- soft-prompt"]
    if hub_id is not None:
        front.append(f"base_model: {json.dumps(hub_id)}")
    of_base = f"[{escaped(hub_id)}](https://huggingface.co/{hub_id})" if hub_id else "a base model"
    table = ["| task | virtual tokens | text | answer |", "|---|---:|---|---|", *map(_row, entries)]
    parts = [
        "\n".join([*front, "---"]),
        "# Soft prompts",
        f"Prompts for {of_base}, which stays as it is, trained with [lightning-softprompt].",
        "\n".join(table),
        *(_usage(entries[0], hub_id or "BASE", folder) if entries else ()),
        "[lightning-softprompt]: https://pypi.org/project/lightning-softprompt/",
        MARKER,
    ]
    return "\n\n".join(parts) + "\n"


def may_replace(path: Path) -> bool:
    """Whether there is no file at `path`, or one that `model_card` made. Another one is the user's."""
    if not path.is_symlink() and not path.exists():
        return True
    return path.is_file() and is_card(path.read_bytes())


def is_card(data: bytes) -> bool:
    """Whether `model_card` made this file: it ends with the marker."""
    return data.rstrip().endswith(MARKER.encode())


def looks_like_hub_id(name: str) -> bool:
    """Whether a name could be an id on the Hugging Face Hub, and is no folder or file here.

    Example:
        >>> looks_like_hub_id("HuggingFaceTB/SmolLM2-135M"), looks_like_hub_id("/models/smollm2")
        (True, False)
    """
    return is_hub_id(name) and not Path(name).exists()


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of an id on the Hugging Face Hub, with or without its owner."""
    return _HUB_ID.fullmatch(name) is not None


def _row(entry: Entry) -> str:
    template = entry.template
    text = "none" if template is None else request_text(template)
    labels = None if template is None else template.labels
    answer = "free text" if labels is None else ", ".join(map(quoted, labels))
    return f"| {escaped(entry.task)} | {entry.length} | {text} | {answer} |"


def request_text(template: TaskTemplate) -> str:
    """What a request of a task is, in a cell of a table: its text, and the chat around it."""
    around = " in a chat" if template.chat else ""
    said = f", behind {quoted(template.system)}" if template.system else ", in which the system says nothing"
    behind = "" if template.system is None else said
    return quoted(template.text) + around + behind


def _usage(entry: Entry, base: str, folder: str) -> list[str]:
    """How to answer a text of a task in Python, and a file of texts with the command."""
    columns = [*dict.fromkeys(columns_of(entry.template.text))] if entry.template is not None else []
    of_columns = ", ".join(f"{literal(name)}: {literal('…')}" for name in columns)
    row = literal("…") if len(columns) < 2 else f"{{{of_columns}}}"
    name = "PROMPTS" if has_control(folder) else folder
    python = (
        "from lightning_softprompt import MixedTaskGenerator\n\n"
        f"generator = MixedTaskGenerator.from_pretrained({literal(base)}, {literal(name)})\n"
        f"answers = generator.answer([{row}], tasks=[{literal(entry.task)}])"
    )
    command = (
        f"lightning-softprompt generate --base {shlex.quote(base)} --prompts {shlex.quote(name)} "
        "--input rows.jsonl --output answers.jsonl"
    )
    words = "Each row of `rows.jsonl` has a `task` and the columns that the text of the task names."
    if base == "BASE":
        words += " `BASE` is the hub id or the folder of the base model."
    return ["Answer in Python:", f"```python\n{python}\n```", f"```bash\n{command}\n```", words]


def quoted(text: str) -> str:
    """A text in quotation marks, `escaped`."""
    return escaped(json.dumps(text, ensure_ascii=False))


def literal(text: str) -> str:
    """A text as Python writes it, in one line without characters that are not seen."""
    return _visible(json.dumps(text, ensure_ascii=False))


def escaped(text: str) -> str:
    """A text with a backslash in front of each character that Markdown might take for markup, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$:@^=.])", r"\\\1", _visible(text))


def _visible(text: str) -> str:
    return "".join(_escape_sequence(each) if unicodedata.category(each) in _UNSEEN else each for each in text)


def _escape_sequence(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 2**16 else f"\\U{number:08x}"
