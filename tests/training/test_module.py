"""`CausalLMModule` and `TaskDataModule` in a Trainer."""

from __future__ import annotations

import json
import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.tuner import Tuner
from torch.nn import functional
from transformers import AutoTokenizer

from lightning_softprompt import (
    CausalLMModule,
    SoftPromptCallback,
    SoftPromptError,
    Source,
    TaskDataModule,
    TaskTemplate,
    Tokens,
    pack_linear_layers,
)
from lightning_softprompt.base.tokens import encode_target, encode_text
from tests import tiny
from tests.modules import trainer

TEMPLATES = {
    "tone": TaskTemplate("{text} =>", "{label}", labels=["good", "bad", "bad film"]),
    "kind": TaskTemplate("{text} is", "{label}", labels=["film", "news"]),
    "free": TaskTemplate("so {text}", "{label}"),
}
PROMPTS = {"free": Tokens([40, 41]), "tone": Tokens([42, 43, 44, 45]), "kind": Tokens([46])}
ROWS = [
    ("tone", "it is so good", "good"),
    ("kind", "a film", "film"),
    ("free", "the news", "it is a film and the news"),
    ("tone", "the film and the news of it is bad", "bad film"),
    ("kind", "the product", "news"),
    ("free", "it", "product"),
    ("tone", "so so", "bad"),
]


@pytest.fixture
def data(tiny_base, tmp_path) -> TaskDataModule:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"task": t, "text": x, "label": y}) + "\n" for t, x, y in ROWS))
    return TaskDataModule(str(tiny_base), TEMPLATES, *[str(path)] * 4, batch_size=7)


def encoded(tokenizer, task: str, target: str) -> list[int]:
    """A target's ids: free text ends, and so do the labels of a task of which one begins another."""
    return encode_target(tokenizer, target) + ([] if task == "kind" else [tokenizer.eos_token_id])


def shares_of(tokenizer, task: str, row_text: str) -> dict[str, float]:
    """The share of each label over the trie of the task's labels, a pass of the bare float64 model a node."""
    bare, names = tiny.tiny_model("llama").double(), TEMPLATES[task].labels or []
    text = encode_text(tokenizer, TEMPLATES[task].render_text({"text": row_text}, ""))
    labels = [encoded(tokenizer, task, name) for name in names]
    shares = []
    for label in labels:
        share = 1.0
        for place, token in enumerate(label):
            children = sorted({other[place] for other in labels if other[:place] == label[:place]})
            logits = tiny.hard_row(bare, tiny.Row(0, list(PROMPTS[task].ids), text + label[:place]))[-1]
            share *= float(logits[children].softmax(0)[children.index(token)])
        shares.append(share)
    return dict(zip(names, shares, strict=True))


def likeliest(tokenizer, task: str, row_text: str) -> str:
    shares = shares_of(tokenizer, task, row_text)
    return max(shares, key=shares.__getitem__)


def oracle(tiny_base) -> dict[str, dict[str, list[float]]]:
    """Loss and hits of every row, each in bare forward passes of its own."""
    bare, tokenizer = tiny.tiny_model("llama"), AutoTokenizer.from_pretrained(tiny_base)
    found: dict[str, dict[str, list[float]]] = {"loss": {}, "label_loss": {}, "accuracy": {}, "train": {}}

    def log_probability(prompt, text, target):
        ids = torch.tensor([prompt + text + target])
        with torch.no_grad():
            scores = -functional.cross_entropy(bare(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        return scores[-len(target) :].double()

    for task, row_text, label in ROWS:
        template, prompt = TEMPLATES[task], list(PROMPTS[task].ids)
        text = encode_text(tokenizer, template.render_text({"text": row_text}, ""))
        target = encoded(tokenizer, task, label)
        trained = log_probability(prompt, text, target)
        found["train"].setdefault(task, []).extend((-trained).tolist())
        if template.labels:
            found["loss"].setdefault(task, []).append(float(-trained.mean()))
            share = shares_of(tokenizer, task, row_text)[label]
            found["label_loss"].setdefault(task, []).append(-math.log(share))
            found["accuracy"].setdefault(task, []).append(float(likeliest(tokenizer, task, row_text) == label))
        else:
            found["loss"].setdefault(task, []).extend((-trained).tolist())
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_is_that_of_each_label_alone(stage: str, data, tiny_base, tmp_path) -> None:
    module = CausalLMModule(str(tiny_base))
    logged = getattr(trainer(tmp_path, SoftPromptCallback(PROMPTS)), stage)(module, data, verbose=False)[0]
    name = "val" if stage == "validate" else "test"
    expected = oracle(tiny_base)
    for task in TEMPLATES:
        assert logged[f"{name}/loss/{task}"] == pytest.approx(mean(expected["loss"][task]), rel=1e-4)
    for task in ("tone", "kind"):
        assert logged[f"{name}/accuracy/{task}"] == pytest.approx(mean(expected["accuracy"][task]))
        assert logged[f"{name}/label_loss/{task}"] == pytest.approx(mean(expected["label_loss"][task]), rel=1e-4)
    assert f"{name}/accuracy/free" not in logged and f"{name}/label_loss/free" not in logged
    assert logged[f"{name}/accuracy"] == pytest.approx(mean([mean(expected["accuracy"][t]) for t in ("tone", "kind")]))
    assert logged[f"{name}/loss"] == pytest.approx(mean([mean(expected["loss"][t]) for t in TEMPLATES]), rel=1e-4)


def test_accuracy_and_predictions_go_by_the_labels_alone(tiny_base, tmp_path) -> None:
    tokenizer, text = AutoTokenizer.from_pretrained(tiny_base), "a film and the news of it is so good"
    texts = [f"{first} {second}" for first in text.split() for second in text.split()]
    labels = [likeliest(tokenizer, "tone", each) for each in texts]
    path = tmp_path / "rows.jsonl"
    rows = [{"text": each, "label": label} for each, label in zip(texts, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(path), task="tone")
    data = TaskDataModule(str(tiny_base), {"tone": TEMPLATES["tone"]}, validation=source, predict=source)
    run = trainer(tmp_path, SoftPromptCallback({"tone": PROMPTS["tone"]}))
    (logged,) = run.validate(module := CausalLMModule(str(tiny_base)), data, verbose=False)
    assert logged["val/accuracy/tone"] == 1.0
    assert [answer for batch in run.predict(module, data) for answer in batch] == labels
    assert len(set(labels)) > 1


@pytest.mark.parametrize("objective", ["auto", "labels"])
def test_training_loss_and_learning(objective, data, tiny_base, tmp_path) -> None:
    module = CausalLMModule(str(tiny_base), objective=objective)
    run = trainer(tmp_path, SoftPromptCallback(PROMPTS), max_epochs=1)
    run.fit(module, data)
    layer = torch.nn.Linear(2, 2)
    pack_linear_layers(layer)  # which does something on an x86 processor alone
    kinds = {type(vars(each).get("forward")) for each in module.model.modules() if type(each) is torch.nn.Linear}
    assert kinds == {type(vars(layer).get("forward"))}
    found = oracle(tiny_base)
    expected = {
        f"label_loss/{task}" if objective == "labels" and task in found["label_loss"] else f"loss/{task}": losses
        for task, losses in (found["train"] | (found["label_loss"] if objective == "labels" else {})).items()
    }
    everything = [loss for losses in expected.values() for loss in losses]
    logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("train/")}
    assert logged == pytest.approx(
        {"train/loss": mean(everything), **{f"train/{name}": mean(losses) for name, losses in expected.items()}},
        rel=1e-4,
    )
    longer = trainer(tmp_path, SoftPromptCallback(PROMPTS), max_epochs=40, gradient_clip_val=1.0)
    longer.fit(CausalLMModule(str(tiny_base), lambda p: torch.optim.AdamW(p, lr=0.1), objective=objective), data)
    assert float(longer.callback_metrics["train/loss"]) < 0.5 * mean(everything)


def test_among_labels_some_task_needs_some(data, tiny_base, tmp_path) -> None:
    free = TaskDataModule(
        str(tiny_base), {"free": TEMPLATES["free"]}, Source(data.sources["train"][0].path, task="free")
    )
    run = trainer(tmp_path, SoftPromptCallback({"free": PROMPTS["free"]}), max_epochs=1)
    with pytest.raises(SoftPromptError, match="no task has any"):
        run.fit(CausalLMModule(str(tiny_base), objective="labels"), free)


def test_defaults_warm_up_and_decay_without_weight_decay(data, tiny_base, tmp_path) -> None:
    rates = []

    class Module(CausalLMModule):
        def on_train_batch_start(self, batch, batch_idx) -> None:
            rates.append(self.optimizers().param_groups[0]["lr"])

    module = Module(str(tiny_base))
    trainer(tmp_path, SoftPromptCallback(PROMPTS), max_epochs=20).fit(module, data)
    assert 0 < rates[0] < rates[1] < max(rates) == rates[2] == 0.02 and 0 < rates[-1] < 0.001
    assert module.optimizers().param_groups[0]["weight_decay"] == 0


def test_prediction_ranks_labels_and_generates_the_rest(data, tiny_base, tmp_path) -> None:
    module = CausalLMModule(str(tiny_base), max_new_tokens=5)
    answers = trainer(tmp_path, SoftPromptCallback(PROMPTS)).predict(module, data)[0]
    bare, tokenizer = tiny.tiny_model("llama"), AutoTokenizer.from_pretrained(tiny_base)
    for (task, text, _), answer in zip(ROWS, answers, strict=True):
        ids = encode_text(tokenizer, TEMPLATES[task].render_text({"text": text}, ""))
        if TEMPLATES[task].labels:
            assert answer == likeliest(tokenizer, task, text)
        else:
            row = tiny.Row(0, list(PROMPTS[task].ids), ids)
            (expected,) = tiny.hard_greedy(bare, row, 5, do_sample=False, eos_token_id=tokenizer.eos_token_id)
            assert answer == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_prediction_gives_labels_without_surrounding_space(tiny_base, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "it is"}\n')
    template = TaskTemplate("{text} =>", " {label}", labels=[" good", " bad"])
    data = TaskDataModule(str(tiny_base), {"tone": template}, predict=Source(str(path), task="tone"))
    callback = SoftPromptCallback({"tone": PROMPTS["tone"]})
    ((answer,),) = trainer(tmp_path, callback).predict(CausalLMModule(str(tiny_base)), data)
    assert answer in ("good", "bad")


def test_a_row_that_cannot_be_predicted_stops_no_other_one(tiny_base, tmp_path, caplog) -> None:
    rows = [("tone", "it is"), ("free", "a film " * 62), ("free", "the news"), ("tone", "a film " * 62)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"task": task, "text": text}) + "\n" for task, text in rows))
    data = TaskDataModule(str(tiny_base), TEMPLATES, predict=str(path))
    module = CausalLMModule(str(tiny_base), max_new_tokens=5)
    (answers,) = trainer(tmp_path, SoftPromptCallback(PROMPTS)).predict(module, data)
    assert [answer is None for answer in answers] == [False, True, False, True]
    assert "2 of 4 requests have no answer. request 1: 2 tokens of prompt, 125 of text and" in caplog.text
    assert "request 3: 4 tokens of prompt, 125 of text and 3 of the longest label" in caplog.text


def test_a_pad_token_beyond_the_embedding_changes_nothing(data, tiny_base, tmp_path) -> None:
    found = []
    data.tokenizer.add_tokens([f"more{number}" for number in range(len(data.tokenizer), tiny.VOCABULARY + 1)])
    for pad, id in (("<pad>", 1), ("more61", tiny.VOCABULARY)):
        data.tokenizer.pad_token = pad
        assert data.tokenizer.pad_token_id == id
        run = trainer(tmp_path, SoftPromptCallback(PROMPTS))
        run.fit(CausalLMModule(str(tiny_base)), data)
        metrics = {name: float(value) for name, value in run.callback_metrics.items()}
        module = CausalLMModule(str(tiny_base), max_new_tokens=5)
        found.append((metrics, trainer(tmp_path, SoftPromptCallback(PROMPTS)).predict(module, data)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5) and found[1][1] == found[0][1]


def test_the_module_needs_the_callback_and_the_data(data, tiny_base, tmp_path) -> None:
    with pytest.raises(SoftPromptError, match="add SoftPromptCallback"):
        trainer(tmp_path).fit(CausalLMModule(str(tiny_base)), data)
    with pytest.raises(SoftPromptError, match="batches of a TaskDataModule, this run has NoneType"):
        trainer(tmp_path, SoftPromptCallback(PROMPTS)).fit(CausalLMModule(str(tiny_base)), data.train_dataloader)
    assert issubclass(CausalLMModule, LightningModule)


def test_a_checkpoint_gives_a_module_that_answers_without_a_trainer(data, tiny_base, tmp_path) -> None:
    module = CausalLMModule(str(tiny_base))
    run = trainer(tmp_path, SoftPromptCallback(PROMPTS), max_epochs=2)
    run.fit(module, data)
    run.validate(module, data, verbose=False)  # so that the module holds metrics when it is saved
    run.save_checkpoint(tmp_path / "run.ckpt")
    expected = trainer(tmp_path, SoftPromptCallback(module.model.soft_prompts)).predict(module, data)
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "run.ckpt", base=str(tiny_base))
    prompts = loaded.model.soft_prompts
    assert prompts.tasks == tuple(PROMPTS) and prompts.templates == TEMPLATES
    ids = torch.tensor([[5, 6, 7]])
    for task in PROMPTS:
        assert torch.equal(prompts[task], module.model.soft_prompts[task])
        with torch.no_grad():
            logits = [each.model(ids, tasks=[task]).logits for each in (loaded, module)]
        torch.testing.assert_close(*logits)
    assert trainer(tmp_path).predict(loaded, data) == expected
    again = SoftPromptCallback(PROMPTS)
    trainer(tmp_path, again).validate(loaded, data, ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert again.prompts is loaded.model.soft_prompts is not prompts
    assert all(torch.equal(again.prompts[task], prompts[task]) for task in PROMPTS)


def test_a_trainer_without_the_callback_gets_no_prompts_by_a_checkpoint(data, tiny_base, tmp_path) -> None:
    run = trainer(tmp_path, SoftPromptCallback(PROMPTS))
    run.fit(CausalLMModule(str(tiny_base)), data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(RuntimeError, match="soft_prompts"):
        trainer(tmp_path).fit(CausalLMModule(str(tiny_base)), data, ckpt_path=tmp_path / "run.ckpt")


@pytest.mark.parametrize("objective", ["tokens", "labels"])
def test_lr_find_tries_rates_and_sets_one(data, tiny_base, tmp_path, objective) -> None:
    data.batch_size = 2
    module = CausalLMModule(str(tiny_base), objective=objective)
    finder = Tuner(trainer(tmp_path, SoftPromptCallback(PROMPTS), max_epochs=20)).lr_find(
        module, datamodule=data, num_training=20, min_lr=1e-3, max_lr=10.0, early_stop_threshold=None
    )
    assert finder is not None and finder.results["lr"][0] < 0.01 < 1 < finder.results["lr"][-1]
    assert len(set(finder.results["loss"])) == 20 and module.lr == finder.suggestion()
    module.lr = 0.125
    rates: list[float] = []
    seen = LambdaCallback(on_before_optimizer_step=lambda _, __, adam: rates.append(adam.param_groups[0]["lr"]))
    trainer(tmp_path, SoftPromptCallback(PROMPTS), seen).fit(module, data)
    assert max(rates) == 0.125 and len(rates) == 4  # of the warm-up and the decay


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"warmup_fraction": -0.1}, {"warmup_fraction": 1.5}])
def test_numbers_out_of_their_range_are_refused(options) -> None:
    with pytest.raises(SoftPromptError, match=next(iter(options))):
        CausalLMModule("base", **options)
