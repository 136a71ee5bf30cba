"""How prompts start: from words, tokens, labels, noise and other prompts."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_softprompt import Labels, Normal, Prompt, SoftPromptError, SoftPrompts, Text, Tokens, Vocabulary
from tests import tiny
from tests.tokenizer import word_tokenizer


def rows(model, ids):
    return model.get_input_embeddings().weight[torch.tensor(ids)]


def test_shorthands_and_text(model) -> None:
    tokenizer = word_tokenizer(["is", "it", "good", "bad"])
    ids = tokenizer("is it good", add_special_tokens=False)["input_ids"]
    prompts = SoftPrompts.for_model(
        model, {"a": "is it good", "b": 5, "c": Text("is it", length=5), "d": Text("is it good", 2)}, tokenizer
    )
    assert prompts.tasks == ("a", "b", "c", "d") and prompts.lengths == (3, 5, 5, 2)
    assert torch.equal(prompts["a"], rows(model, ids))
    assert torch.equal(prompts["c"], rows(model, [ids[0], ids[1]] * 2 + [ids[0]]))
    assert torch.equal(prompts["d"], rows(model, ids[:2]))
    assert all(isinstance(prompts[t], torch.nn.Parameter) and prompts[t].dtype == torch.float32 for t in prompts)


def test_labels_are_the_mean_of_their_tokens_then_vocabulary(model) -> None:
    tokenizer = word_tokenizer(["very", "good", "bad"])
    good, bad = (tokenizer(w, add_special_tokens=False)["input_ids"] for w in ("very good", "bad"))
    prompts = SoftPrompts.for_model(model, {"a": Labels(["very good", "bad"], length=4)}, tokenizer)
    assert len(good) == 2 and len(prompts["a"]) == 4
    torch.testing.assert_close(prompts["a"][0], rows(model, good).mean(0))
    torch.testing.assert_close(prompts["a"][1], rows(model, bad)[0])
    for row in prompts["a"][2:]:
        assert bool((rows(model, range(tiny.VOCABULARY)) == row).all(1).any())
    with pytest.raises(SoftPromptError, match="2 words and length 1"):
        SoftPrompts.for_model(model, {"a": Labels(["good", "bad"], length=1)}, tokenizer)


def test_vocabulary_samples_frequent_ids_once_and_no_special_one(model) -> None:
    prompts = SoftPrompts.for_model(model, {"a": Vocabulary(10, most_frequent=10)})
    # Ids 0 and 1 begin and pad a text.
    expected = rows(model, range(2, 12))
    assert torch.equal(prompts["a"].sort(0).values, expected.sort(0).values)
    with pytest.raises(SoftPromptError, match="11 tokens cannot be sampled from 10"):
        SoftPrompts.for_model(model, {"a": Vocabulary(11, most_frequent=10)})


def test_normal_has_the_norm_of_the_embedding(model) -> None:
    prompts = SoftPrompts.for_model(model, {"a": Normal(400), "b": Normal(400, scale=0.5)})
    norm = rows(model, range(tiny.VOCABULARY)).detach().norm(dim=1).mean()
    assert float(prompts["a"].detach().norm(dim=1).mean() / norm) == pytest.approx(1, abs=0.05)
    assert float(prompts["b"].detach().norm(dim=1).mean() / norm) == pytest.approx(0.5, abs=0.03)


def test_prompt_starts_from_another_task_or_folder(model, tmp_path) -> None:
    SoftPrompts.for_model(model, {"old": Tokens([7, 8])}).save_pretrained(tmp_path)
    prompts = SoftPrompts.for_model(
        model, {"late": Prompt("early"), "early": Tokens([5, 6]), "moved": Prompt("old", tmp_path)}
    )
    assert prompts.tasks == ("late", "early", "moved")
    assert torch.equal(prompts["late"], prompts["early"]) and prompts["late"] is not prompts["early"]
    assert torch.equal(prompts["moved"], rows(model, [7, 8]))
    of_run = {"state_dict": {f"model.soft_prompts.{name}": value for name, value in prompts.state_dict().items()}}
    torch.save({**of_run, "soft_prompts": prompts.description().content()}, tmp_path / "last.ckpt")
    resumed = SoftPrompts.for_model(model, {"new": Prompt("moved", tmp_path / "last.ckpt")})
    assert torch.equal(resumed["new"], prompts["moved"])
    with pytest.raises(
        SoftPromptError, match="starts from the prompt of 'none', which is not in these prompts; there: 'b'"
    ):
        SoftPrompts.for_model(model, {"a": Prompt("none"), "b": 2})


def test_prompts_that_start_from_each_other_in_any_order(model) -> None:
    chain = {"first": Tokens([5, 6]), "second": Prompt("first"), "third": Prompt("second")}
    for listing in itertools.permutations(chain):
        prompts = SoftPrompts.for_model(model, {task: chain[task] for task in listing})
        assert prompts.tasks == listing and torch.equal(prompts["third"], rows(model, [5, 6]))
    with pytest.raises(SoftPromptError, match=r"'b' from 'a' from 'b'|'a' from 'b' from 'a'"):
        SoftPrompts.for_model(model, {"a": Prompt("b"), "b": Prompt("a"), "c": 3})


def test_starts_depend_on_the_seed_and_the_task_not_on_the_order(model) -> None:
    one = SoftPrompts.for_model(model, {"a": 4, "b": Normal(3)}, seed=1)
    two = SoftPrompts.for_model(model, {"b": Normal(3), "a": 4}, seed=1)
    other = SoftPrompts.for_model(model, {"a": 4, "b": Normal(3)}, seed=2)
    for task in one:
        assert torch.equal(one[task], two[task]) and not torch.equal(one[task], other[task])


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("words", "needs a tokenizer"),
        (0, "at least one virtual token, got length 0"),
        (True, "got bool"),
        (3.5, "got float"),
        (Tokens([]), "at least one virtual token"),
        (Tokens([tiny.VOCABULARY]), r"token ids must lie in \[0, 61\), found \[61\]"),
        (Tokens([1, 2.5, "3", True]), r"token ids must lie in \[0, 61\), found \[2.5, '3', True\]"),
        (Tokens(torch.tensor([[1, 2]])), r"token ids must lie in \[0, 61\), found \[\[1, 2\]\]"),
    ],
)
def test_wrong_starts(model, init, message: str) -> None:
    with pytest.raises(SoftPromptError, match=f"'a'.*{message}"):
        SoftPrompts.for_model(model, {"a": init})


def test_labels_are_described_by_their_words(tmp_path) -> None:
    assert Labels(["a", "b"], 4).describe() == "Labels(words=['a', 'b'], length=4)"
