"""A base's tokenizer with virtual tokens: their names, one alias a task, and the start token behind them.

A soft prompt stands in front of a text with its start token, if the tokenizer adds one: prompt, start, text. A
tokenizer can add a start token in front of everything alone, so the one that is written adds none. What stands in
front of a task's text, the start token included, is its *prefix*, and its alias is the prefix in one word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lightning_softprompt.base.tokens import encode_text
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.interop.virtual_rows import VirtualRows

# What stands behind a task's prefix must become the ids that it becomes alone.
_PROBES = ("a film", " leading  space", "\nnew line", "Größe 情感 👍", "1,024", "x = f(y)\n\treturn x", "<|task:|>")
_ESCAPES = str.maketrans({"%": "%25", "<": "%3C", ">": "%3E", "|": "%7C"})


def alias_of(task: str) -> str:
    """The word that stands for a task's prefix.

    No alias begins another one, and none holds another one, whatever the tasks are called.

    Example:
        >>> alias_of("sentiment"), alias_of("a|>b")
        ('<|task:sentiment|>', '<|task:a%7C%3Eb|>')
    """
    return f"<|task:{task.translate(_ESCAPES)}|>"


@dataclass(frozen=True)
class VirtualTokenizer:
    """A tokenizer that knows the virtual tokens.

    Attributes:
        tokenizer: it adds no start token by itself.
        start: the ids that the base's tokenizer puts in front of a text; mostly none, or one.
        start_text: these ids, written out.
        aliases: by task; empty for a tokenizer that cannot have any.
        chat_aliases: for the virtual tokens alone, by task; empty where they may as well be written out.
    """

    tokenizer: Any
    start: list[int]
    start_text: str
    aliases: dict[str, str]
    chat_aliases: dict[str, str]

    def prefix(self, rows: VirtualRows, task: str) -> str:
        """What stands in front of a task's text: its alias, else its virtual tokens and the start token."""
        return self.aliases.get(task) or "".join(rows.names(task)) + self.start_text

    def in_chat_template(self, rows: VirtualRows, task: str) -> tuple[str, str]:
        """A task's prefix, and its virtual tokens alone, as they stand in a chat template.

        They are written out where that is exact, so that engines with tokenizers of their own read them, too.
        """
        written = "".join(rows.names(task))
        if task in self.chat_aliases:
            return self.aliases[task], self.chat_aliases[task]
        return written + self.start_text, written


def with_virtual_tokens(base: Any, rows: VirtualRows, has_aliases: bool = True) -> VirtualTokenizer:
    """Append virtual tokens to a copy of the tokenizer `base`.

    Args:
        base: the base's tokenizer; it is not changed.
        rows: where the virtual tokens stand.
        has_aliases: whether tasks get aliases.

    Raises:
        SoftPromptError: a tokenizer that is not one of the `tokenizers` library, or that knows virtual tokens already.
    """
    if getattr(base, "backend_tokenizer", None) is None:
        raise SoftPromptError(
            f"{type(base).__name__} is no tokenizer of the `tokenizers` library, which an export needs; save it as "
            "one, or serve these prompts with MixedTaskGenerator"
        )
    state = json.loads(base.backend_tokenizer.to_str())
    start = start_ids(base)
    written = "".join(base.convert_ids_to_tokens(start))
    _add_tokens(state, base, rows, normalized=has_aliases)
    state["post_processor"] = _without_templates(state["post_processor"])
    aliases = {task: alias_of(task) for task in rows.ids} if has_aliases else {}
    chat_aliases: dict[str, str] = {}
    if has_aliases:
        if _puts_space_first(state["pre_tokenizer"]):
            chat_aliases = {task: alias.replace("<|task:", "<|chat:") for task, alias in aliases.items()}
        for token in state["added_tokens"]:  # those of an alias are found once it has been replaced
            token["normalized"] |= token["id"] in start
        prefixes = {alias: "".join(rows.names(task)) + written for task, alias in aliases.items()}
        prefixes |= {alias: "".join(rows.names(task)) for task, alias in chat_aliases.items()}
        state["normalizer"] = _with_replacements(state["normalizer"], state["pre_tokenizer"], prefixes, written)
    return VirtualTokenizer(_of_state(state, base), start, written, aliases, chat_aliases)


def is_exact(virtual: VirtualTokenizer, base: Any, rows: VirtualRows) -> bool:
    """Whether each task's prefix and the text behind it, and texts alone, become the ids that they are to become."""
    tokenizer = virtual.tokenizer
    if not all(tokenizer.convert_tokens_to_ids(rows.names(task)) == ids for task, ids in rows.ids.items()):
        return False
    between = f"a film{virtual.start_text}a film"
    for text in (*_PROBES, between, *filter(None, [base.eos_token])):
        if tokenizer(text)["input_ids"] != base(text, add_special_tokens=False)["input_ids"]:
            return False
    return all(
        tokenizer(virtual.prefix(rows, task) + text)["input_ids"] == [*ids, *encode_text(base, text)]
        for task, ids in rows.ids.items()
        for text in _PROBES
    )


def start_ids(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts in front of a text.

    Raises:
        SoftPromptError: a tokenizer that does more than to put ids around a text.
    """
    alone, whole = tokenizer("film", add_special_tokens=False)["input_ids"], tokenizer("film")["input_ids"]
    for place in range(len(whole) - len(alone) + 1):
        if alone and whole[place : place + len(alone)] == alone:
            return list(whole[:place])
    raise SoftPromptError(
        f"{type(tokenizer).__name__} makes {whole} of 'film' and {alone} without special tokens, so nobody can tell "
        "its start token; serve these prompts with MixedTaskGenerator"
    )


def _add_tokens(state: dict[str, Any], base: Any, rows: VirtualRows, normalized: bool) -> None:
    """Add the virtual tokens, behind one token for each id that the embedding has and the tokenizer has not."""
    known = base.get_vocab()
    behind = max(known.values(), default=-1) + 1
    names = [(id, f"<|soft_unused_{id}|>") for id in range(behind, rows.first)]
    for task, ids in rows.ids.items():
        names += zip(ids, rows.names(task), strict=True)
    taken = next((name for _, name in names if name in known), None)
    if taken is not None:
        raise SoftPromptError(f"the base knows {taken} already: it is an export itself; give the base that it was of")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": True}
    state["added_tokens"] += [{"id": id, "content": name, **flags} for id, name in names]


def _without_templates(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor without what puts ids around a text."""
    if processor is None or processor["type"] in ("TemplateProcessing", "BertProcessing", "RobertaProcessing"):
        return None
    if processor["type"] == "Sequence":
        kept = [found for each in processor["processors"] if (found := _without_templates(each)) is not None]
        return {**processor, "processors": kept} if kept else None
    return processor


def _with_replacements(
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    prefixes: dict[str, str],
    start_text: str,
) -> dict[str, Any]:
    """A normalizer that then replaces each alias by its prefix.

    A pre-tokenizer that puts a space in front of the first word of a text alone, as that of Llama 2, would leave it out
    behind a prefix, so it is written there; not where a space or the start token follows.
    """
    from tokenizers import Tokenizer, models

    normalize: Any = str
    if normalizer is not None:
        empty = json.loads(Tokenizer(models.BPE()).to_str())
        normalize = Tokenizer.from_str(json.dumps({**empty, "normalizer": normalizer})).normalizer.normalize_str
    replacements = []
    for alias, prefix in prefixes.items():
        found = normalize(alias)
        if _puts_space_first(pre_tokenizer):
            not_start = f"(?!{_literally(start_text)})" if start_text else ""
            spaced = {"Regex": f"{_literally(found)}{not_start}(?=[^ ])"}
            replacements.append({"type": "Replace", "pattern": spaced, "content": prefix + " "})
        replacements.append({"type": "Replace", "pattern": {"String": found}, "content": prefix})
    return {"type": "Sequence", "normalizers": [*([normalizer] if normalizer else []), *replacements]}


def _literally(text: str) -> str:
    """A regular expression that finds a text alone."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def _puts_space_first(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    return pre_tokenizer.get("prepend_scheme") == "first" or any(
        map(_puts_space_first, pre_tokenizer.get("pretokenizers", ()))
    )


def _of_state(state: dict[str, Any], base: Any) -> Any:
    """A tokenizer with the named tokens of `base`; its own class would make anew what is changed here."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    kept = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")
    options = {name: getattr(base, name) for name in kept if hasattr(base, name)}
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **base.special_tokens_map, **options)
