"""A base and its soft prompts as one ordinary model folder, which any engine serves.

Prompts become rows of the embedding behind the vocabulary, *virtual tokens*, and a request is the virtual tokens of a
task, then the text. The folder loads with `AutoModelForCausalLM` and `AutoTokenizer`, and nothing of this library is
needed to serve it. Its weights are a second checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.loading import load_causal_lm, load_tokenizer
from lightning_softprompt.base.support import check_model
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.interop.export_card import ExportedTask, export_card
from lightning_softprompt.interop.masked_head import mask_head, measure_gap, probe_rows
from lightning_softprompt.interop.task_chat import TaskText, chat_template
from lightning_softprompt.interop.virtual_rows import (
    VirtualRows,
    append_rows,
    check_can_be_extended,
    embedding_scale,
    packed_rows,
)
from lightning_softprompt.interop.virtual_tokenizer import VirtualTokenizer, is_exact, with_virtual_tokens
from lightning_softprompt.prompts.files import errors_name, whole_folder
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "virtual_tokens.json"
# Weights are written in files of at most this size, one after the other.
_SHARD = "2GB"


def export_model(base: str | Path, prompts: SoftPrompts | str | Path, folder: str | Path) -> float:
    """Write a base and its prompts as an ordinary model folder. Greedy answers are those of the attached prompts.

    The embedding gets a row for each virtual token, the head becomes one of its own, whose new rows never win, and the
    tokenizer gets the virtual tokens `<|soft0_0|>` …, an alias a task (`<|task:sentiment|>`) where it can have one, and
    a chat template that takes `task=`. `virtual_tokens.json` has the ids, the folder's `README.md` what a request is.

    A tokenizer that begins texts with a start token does so no more: prompt, start, text is the order, so the alias
    holds the start token.

    Args:
        base: hub id or path of the base model. It keeps its dtype, in which prompts are rounded.
        prompts: the prompts, or where they are saved: a folder, a checkpoint or a hub id.
        folder: the folder to write. An earlier export in it is replaced whole; if anything fails, it stays.

    Returns:
        The gap: how far the best real token stands above every virtual one on held-out texts, at the position where it
        is smallest, in units of logits. At least 30.

    Raises:
        SoftPromptError: prompts that cannot be loaded, are of another base or not finite; a base whose embedding, head
            or tokenizer cannot take virtual tokens, or is quantized; a gap below 30; or a folder that holds something
            else or cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> _ = torch.manual_seed(0)
        >>> config = GPT2Config(vocab_size=3, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0,
        ...                     eos_token_id=0)
        >>> words = Tokenizer(models.WordLevel({"<unk>": 0, "film": 1, "good": 2}, unk_token="<unk>"))
        >>> with TemporaryDirectory() as folder:
        ...     model = GPT2LMHeadModel(config)
        ...     _ = model.transformer.ln_f.bias.data.fill_(1)  # what the states of a trained model have in common
        ...     model.save_pretrained(f"{folder}/base")
        ...     _ = PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(f"{folder}/base")
        ...     prompts = SoftPrompts.for_model(model, {"tone": 2})
        ...     gap = export_model(f"{folder}/base", prompts, f"{folder}/served")
        ...     served = AutoModelForCausalLM.from_pretrained(f"{folder}/served")
        ...     gap > 30, served.config.vocab_size
        (True, 64)
    """
    if not isinstance(prompts, SoftPrompts):
        prompts = SoftPrompts.from_pretrained(prompts)
    with whole_folder(Path(folder), INDEX) as staged:
        tokenizer, model = load_tokenizer(base), load_causal_lm(base, dtype="auto")
        check_model(model)
        prompts.check_fits(model)
        check_can_be_extended(model)
        scale = embedding_scale(model)
        named = max(tokenizer.get_vocab().values(), default=-1) + 1
        rows = VirtualRows.behind(vocabulary_size(model), prompts, named)
        packed = packed_rows(prompts, scale)
        bare = probe_rows(model, tokenizer, rows, held_out=True)[:3]
        before = _logits(model, bare)
        append_rows(model, rows, packed)
        mask_head(model, tokenizer, rows)
        with errors_name(Path(folder)):
            _save(model, staged)
            virtual = _save_tokenizer(tokenizer, rows, prompts, staged)
        del model  # before the export is loaded, so that memory holds one of the two
        gap = _check(staged, tokenizer, rows, prompts, dict(zip(map(tuple, bare), before, strict=True)))
        with errors_name(Path(folder)):
            _describe(staged, str(base), rows, prompts, virtual, gap)
    return gap


def _save(model: PreTrainedModel, staged: Path) -> None:
    try:
        model.save_pretrained(staged, max_shard_size=_SHARD)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise SoftPromptError(
            f"transformers cannot save {type(model).__name__} ({' '.join(str(error).split())}); mend what it names in "
            "the base"
        ) from error


def _save_tokenizer(base: Any, rows: VirtualRows, prompts: SoftPrompts, staged: Path) -> VirtualTokenizer:
    """Write the tokenizer, with aliases if texts behind them stay what they are once it is loaded again."""
    for has_aliases in (True, False):
        virtual = with_virtual_tokens(base, rows, has_aliases)
        virtual.tokenizer.chat_template = _chat_template(base.chat_template, virtual, rows, prompts)
        virtual.tokenizer.save_pretrained(staged)
        path = staged / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        # A name that transformers 4 and 5 know, and that neither takes for a class which makes the tokenizer anew.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        loaded = replace(virtual, tokenizer=load_tokenizer(staged))
        if is_exact(loaded, base, rows):
            return loaded
    raise SoftPromptError(
        f"behind virtual tokens {type(base).__name__} makes other ids of a text than alone; serve these prompts with "
        "MixedTaskGenerator"
    )


def _chat_template(base: Any, virtual: VirtualTokenizer, rows: VirtualRows, prompts: SoftPrompts) -> Any:
    """The chat template of each name, or the one that there is."""
    if isinstance(base, dict):
        return {name: _chat_template(each, virtual, rows, prompts) for name, each in base.items()}
    tasks = {
        task: TaskText(*virtual.in_chat_template(rows, task), prompts.templates.get(task)) for task in prompts.tasks
    }
    return chat_template(base, tasks)


def _logits(model: PreTrainedModel, texts: Iterable[Sequence[int]]) -> list[Tensor]:
    """The logits of each text: float32 `[length, vocabulary]`."""
    with torch.no_grad():
        return [model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in texts]


def _check(
    staged: Path, tokenizer: Any, rows: VirtualRows, prompts: SoftPrompts, before: Mapping[tuple[int, ...], Tensor]
) -> float:
    """Load what was written, hold it against the base and the prompts, and return the gap.

    Args:
        staged: the folder.
        tokenizer: the base's tokenizer.
        rows: where the virtual tokens stand.
        prompts: the prompts.
        before: the base's logits of some texts.

    Raises:
        SoftPromptError: other logits than the base's, other embeddings than the prompts, or a gap below 30.
    """
    model = load_causal_lm(staged, dtype="auto")
    epsilon = torch.finfo(model.dtype).eps
    for one, other in zip(before.values(), _logits(model, before), strict=True):
        _check_equal(other[:, : one.shape[1]], one, max(1e-4, 8 * epsilon), "the logits of a text without a task")
    with torch.no_grad():
        for task, ids in rows.ids.items():
            found = model.get_input_embeddings()(torch.tensor(ids, device=model.device)).float().cpu()
            _check_equal(found, prompts[task].detach().float().cpu(), max(1e-5, 2 * epsilon), f"the prompt of {task!r}")
    return measure_gap(model, tokenizer, rows)


def _check_equal(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error <= tolerance:
        raise SoftPromptError(
            f"the export does not load as it was written: {what} differs by {error:.1g}, {tolerance:.1g} is allowed; "
            "this base cannot be exported with this version of transformers"
        )


def _describe(
    staged: Path, base: str, rows: VirtualRows, prompts: SoftPrompts, virtual: VirtualTokenizer, gap: float
) -> None:
    """Write the index and the README."""
    (staged / INDEX).write_text(rows.index(gap, virtual.start, aliases=virtual.aliases), encoding="utf-8")
    tasks = {
        task: ExportedTask([*ids, *virtual.start], virtual.prefix(rows, task), prompts.templates.get(task))
        for task, ids in rows.ids.items()
    }
    size = sum(path.stat().st_size for path in staged.glob("*.safetensors"))
    name = (prompts.base.name if prompts.base else "") or base
    card = export_card(Path(name).name if Path(name).is_absolute() else name, tasks, virtual.start_text, gap, size)
    (staged / "README.md").write_text(card, encoding="utf-8")
