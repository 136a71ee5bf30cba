"""The columns that `predict`, `generate` and `classify` add to a row: its answer, or why it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.answers import Answer, Answers, TextAnswers

if TYPE_CHECKING:
    from lightning_softprompt.prompts.templates import TaskTemplate


def text_columns(answers: Answers[str], where: Sequence[str]) -> list[dict[str, Any]]:
    """`output`, and the `probabilities` of the labels where the task has some; or `error`.

    Args:
        answers: of the rows.
        where: the name of each row in errors.
    """

    def columns(index: int) -> dict[str, Any]:
        probabilities = answers.probabilities[index] if isinstance(answers, TextAnswers) else None
        added = {} if probabilities is None else {"probabilities": _named(probabilities)}
        return {"output": answers[index], **added}

    return _of_rows(answers, where, columns)


def label_columns(answers: Answers[Answer], where: Sequence[str]) -> list[dict[str, Any]]:
    """`label` and `probabilities`, or `error`; arguments as in `text_columns`."""

    def columns(index: int) -> dict[str, Any]:
        answer = answers[index]
        assert answer is not None
        return {"label": answer.label.strip(), "probabilities": _named(answer.probabilities)}

    return _of_rows(answers, where, columns)


def gold_column(template: TaskTemplate, row: Mapping[str, Any]) -> dict[str, str]:
    """`gold`, what the row says that the answer should be, without surrounding space; nothing where it says nothing."""
    try:
        return {"gold": template.render_target(row, "the row").strip()}
    except SoftPromptError:
        return {}


def _of_rows(
    answers: Answers[Any], where: Sequence[str], columns: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    return [
        {"error": f"{name}: {answers.failures[index]}"} if answers[index] is None else columns(index)
        for index, name in enumerate(where)
    ]


def _named(probabilities: Mapping[str, float]) -> dict[str, float]:
    return {label.strip(): probability for label, probability in probabilities.items()}
