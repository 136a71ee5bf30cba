"""What is seen of prompts: the tokens nearest to them, and figures."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lightning_softprompt import SoftPromptError, SoftPrompts
from lightning_softprompt.prompts.inspection import draw, nearest_tokens
from lightning_softprompt.prompts.statistics import prompt_statistics
from tests import tiny
from tests.tokenizer import word_tokenizer


def test_the_nearest_tokens_are_those_of_the_whole_vocabulary(monkeypatch) -> None:
    model = tiny.tiny_model()
    prompts = SoftPrompts.for_model(model, {"a": 3, "b": 5})
    words = word_tokenizer([f"w{number}" for number in range(80)])
    monkeypatch.setattr("lightning_softprompt.prompts.inspection._CHUNK", 7)
    whole = nearest_tokens(prompts, model, words, 4)
    table = functional.normalize(model.get_input_embeddings().weight.detach(), dim=1)
    for task in prompts:
        cosines, ids = (functional.normalize(prompts[task].detach(), dim=1) @ table.T).topk(4, dim=1)
        near = [each for of_token in whole[task] for each in of_token]
        assert [len(of_token) for of_token in whole[task]] == [4] * len(prompts[task])
        assert [each.token for each in near] == words.batch_decode(ids.flatten()[:, None].tolist())
        assert [each.cosine for each in near] == pytest.approx(cosines.flatten().tolist(), abs=1e-6)


def test_one_task_is_compared_with_none() -> None:
    prompts = SoftPrompts(4)
    assert prompt_statistics(prompts) == []
    prompts.add("alone", torch.ones(1, 4))
    assert prompt_statistics(prompts)[0].closest_task is None and prompt_statistics(prompts)[0].token_similarity == 0


def test_a_figure_shows_the_norms_and_how_alike_the_tasks_are() -> None:
    prompts = SoftPrompts(2)
    prompts.add("along", torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
    prompts.add("across", torch.tensor([[-4.0, 3.0]]))
    figure = draw(prompts)
    norms, likeness, _ = figure.axes  # and the colours' scale
    assert {line.get_label(): list(line.get_ydata()) for line in norms.lines} == {
        "along": pytest.approx([5.0, 10.0]),
        "across": pytest.approx([5.0]),
    }
    (image,) = likeness.images
    assert image.get_array().tolist() == [pytest.approx([1, 0], abs=1e-6), pytest.approx([0, 1], abs=1e-6)]
    assert [label.get_text() for label in likeness.get_yticklabels()] == ["along", "across"]
    assert sorted(text.get_text().lstrip("-") for text in likeness.texts) == ["0.00", "0.00", "1.00", "1.00"]
    # Tokens have no order in which a line could lead from one to the next; each task's stand above its name.
    assert {line.get_linestyle() for line in norms.lines} == {"None"}
    assert [label.get_text() for label in norms.get_xticklabels()] == ["along", "across"]
    assert [{round(place) for place in line.get_xdata()} for line in norms.lines] == [{0}, {1}]


def test_more_tokens_than_the_vocabulary_has_are_refused() -> None:
    model = tiny.tiny_model()
    prompts = SoftPrompts.for_model(model, {"a": 3})
    for count in (0, tiny.VOCABULARY + 1):
        with pytest.raises(SoftPromptError, match=rf"must lie in \[1, {tiny.VOCABULARY}\], got {count}"):
            nearest_tokens(prompts, model, None, count)
    with pytest.raises(SoftPromptError, match="made for another base model"):
        nearest_tokens(prompts, tiny.tiny_model(seed=1), None, 2)
