"""`PromptDistillation` in a Trainer, against float64 on one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from transformers import AutoTokenizer

from lightning_softprompt import (
    CollapseGuard,
    MixedTaskGenerator,
    PromptDistillation,
    PromptGradientClipping,
    PromptGradientNorm,
    SoftPromptCallback,
    SoftPrompts,
    Tokens,
)
from lightning_softprompt.attachment.prefix import Prefixes
from lightning_softprompt.base.tokens import encode_target, encode_text
from tests import tiny
from tests.modules import trainer
from tests.training import distilled
from tests.training.distilled import ROWS, STARTS, TEACHERS, TEMPLATES, data_of, module_of, starts


class Gradients(Callback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        prompts = pl_module.model.soft_prompts
        self.found = self.found or {task: prompts[task].grad.clone() for task in STARTS}


def oracle(tiny_base) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor], dict[str, list[list[int]]]]:
    """The divergences of each row, the students as they start, and the answers, from the bare model in float64."""
    bare, tokenizer = tiny.tiny_model("llama").double(), AutoTokenizer.from_pretrained(tiny_base)
    embed = bare.get_input_embeddings()
    students = {task: embed(torch.tensor(ids)).detach().requires_grad_() for task, ids in STARTS.items()}
    values: dict[str, list[torch.Tensor]] = {task: [] for task in STARTS}
    answers: dict[str, list[list[int]]] = {task: [] for task in STARTS}
    for row in ROWS:
        task = row["task"]
        hard = encode_target(tokenizer, TEACHERS[task])
        text = encode_text(tokenizer, TEMPLATES[task].render_text(row, ""))
        if "label" in row:
            answer = encode_target(tokenizer, f" {row['label']}")
            answer += [tokenizer.eos_token_id] if task == "free" else []
        elif task == "tone":
            labels = [encode_target(tokenizer, label)[0] for label in TEMPLATES["tone"].labels or []]
            likely = tiny.hard_row(bare, tiny.Row(0, hard, text))[-1]
            answer = [max(labels, key=lambda token: float(likely[token]))]
        else:
            answer = tiny.hard_greedy(bare, tiny.Row(0, hard, text), 5, eos_token_id=tokenizer.eos_token_id)[0]
        answers[task].append(answer)
        teacher = embed(torch.tensor(hard)).detach()
        values[task].append(distilled.by_hand(bare, teacher, students[task], text, text, answer))
    return values, students, answers


def test_loss_and_gradient_are_those_of_each_row_alone(tiny_base, tmp_path) -> None:
    values, students, _ = oracle(tiny_base)
    by_position = torch.cat([each for task in values for each in values[task]])
    by_position.mean().backward()
    gradients, callback = Gradients(), SoftPromptCallback(starts())
    run = trainer(tmp_path, callback, gradients, max_epochs=1, limit_val_batches=0)
    run.fit(module_of(tiny_base), data_of(tiny_base, distilled.write(tmp_path / "rows.jsonl")))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(float(by_position.mean().detach()), rel=1e-5)
    for task in STARTS:
        expected = float(torch.cat(values[task]).mean().detach())
        assert float(run.callback_metrics[f"train/loss/{task}"]) == pytest.approx(expected, rel=1e-5)
        assert tiny.relative_error(gradients.found[task].double(), students[task].grad) < 1e-5


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_evaluation_is_over_the_whole_distribution(stage, top_k, tiny_base, tmp_path) -> None:
    values, _, _ = oracle(tiny_base)
    path = distilled.write(tmp_path / "rows.jsonl")
    run = trainer(tmp_path, callback := SoftPromptCallback(starts()))
    module, data = module_of(tiny_base, top_k=top_k), data_of(tiny_base, path, test=path)
    (logged,) = getattr(run, stage)(module, data, verbose=False)
    name = "val" if stage == "validate" else "test"
    means = {task: float(torch.cat(values[task]).mean().detach()) for task in values}
    for task, mean in means.items():
        assert logged[f"{name}/divergence/{task}"] == pytest.approx(mean, rel=1e-5)
    assert logged[f"{name}/divergence"] == pytest.approx(sum(means.values()) / 2, rel=1e-5)
    assert f"{name}/loss" not in logged and callback.prompts.tasks == ("tone", "free")


@pytest.mark.parametrize("task", ["tone", "free"])  # answers of one token, and of several
def test_equal_first_tokens_are_counted(task, tiny_base, tmp_path) -> None:
    bare, tokenizer = tiny.tiny_model("llama").double(), AutoTokenizer.from_pretrained(tiny_base)
    words = ["good", "film", "news", "text", "is"]
    texts = [f"{first} {second}" for first in ("a", "it", "the", "so") for second in words]
    teacher = encode_target(tokenizer, TEACHERS[task])
    student, equal = teacher[4:], []
    for text in texts:
        ids = encode_text(tokenizer, TEMPLATES[task].render_text({"text": text}, ""))
        both = (int(tiny.hard_row(bare, tiny.Row(0, hard, ids))[-1].argmax()) for hard in (teacher, student))
        equal.append(next(both) == next(both))
    assert 0 < sum(equal) < len(equal)
    path = distilled.write(tmp_path / "rows.jsonl", [{"task": task, "text": text} for text in texts])
    run = trainer(tmp_path, SoftPromptCallback({task: Tokens(student)}))
    module = module_of(tiny_base, teachers={task: TEACHERS[task]})
    (logged,) = run.validate(module, data_of(tiny_base, path, tasks={task: TEMPLATES[task]}), verbose=False)
    assert logged[f"val/equal_first/{task}"] == pytest.approx(sum(equal) / len(equal))


def test_students_come_near_their_teachers_in_one_mixed_run(tiny_base, tmp_path) -> None:
    path = distilled.write(tmp_path / "rows.jsonl")
    data, callback = data_of(tiny_base, path), SoftPromptCallback(starts())
    guards = [PromptGradientNorm(), PromptGradientClipping(), CollapseGuard()]
    run = trainer(tmp_path, callback, *guards, max_epochs=80)
    module = module_of(tiny_base, optimizer=lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0))
    (before,) = run.validate(module, data, verbose=False)
    run.fit(module, data)
    (after,) = run.validate(module, data, verbose=False)
    for task in STARTS:
        assert after[f"val/divergence/{task}"] < 0.3 * before[f"val/divergence/{task}"]
    assert guards[2].events == []
    assert {name.rpartition("/")[2] for name in run.callback_metrics if name.startswith("grad_norm/")} <= {
        "tone", "free", "total"
    }  # fmt: skip


def test_the_teacher_stays_as_it_is_and_is_saved_nowhere(tiny_base, tmp_path) -> None:
    seen: list[Any] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
            prompts = pl_module.model.soft_prompts
            seen.append({name: prompts[name].clone() for name in prompts.teachers})
            prompts.save_pretrained(tmp_path / "during")

    data = data_of(tiny_base, distilled.write(tmp_path / "rows.jsonl"))
    saving = ModelCheckpoint(tmp_path, filename="run", save_weights_only=False)
    callbacks = [callback := SoftPromptCallback(starts()), Watch(), saving]
    run = trainer(tmp_path, *callbacks, max_epochs=3, enable_checkpointing=True)
    run.fit(module_of(tiny_base), data)
    tokenizer, embed = AutoTokenizer.from_pretrained(tiny_base), tiny.tiny_model("llama").get_input_embeddings()
    assert len(seen) == 3
    for task, text in TEACHERS.items():
        hard = embed(torch.tensor(encode_target(tokenizer, text)))
        assert all(torch.equal(prompts[f"{task} (teacher)"], hard) for prompts in seen)
    callback.prompts.save_pretrained(tmp_path / "after")
    checkpoint = torch.load(saving.best_model_path, weights_only=True)
    assert not any("teacher" in key for key in checkpoint["state_dict"])
    kept = (tmp_path / "during", tmp_path / "after", saving.best_model_path)
    for saved in map(SoftPrompts.from_pretrained, kept):
        assert saved.tasks == ("tone", "free") and saved.lengths == (3, 5) and dict(saved.templates) == TEMPLATES
    generator = MixedTaskGenerator.from_pretrained(tiny_base, tmp_path / "after")
    assert generator.answer(["it is so good"], ["tone"])[0] in ("good", "bad")
    assert callback.prompts.tasks == ("tone", "free") and callback.prompts.teachers == ()


def test_a_teacher_goes_through_the_model_once_a_run(tiny_base, tmp_path, monkeypatch) -> None:
    columns: list[int] = []
    computed = Prefixes._computed

    def noting(self: Prefixes, packed: torch.Tensor, offsets: torch.Tensor) -> Any:
        columns.extend(length for length in offsets.diff().tolist() if length > 5)
        return computed(self, packed, offsets)

    monkeypatch.setattr(Prefixes, "_computed", noting)
    data = data_of(tiny_base, distilled.write(tmp_path / "rows.jsonl"))
    trainer(tmp_path, SoftPromptCallback(starts()), max_epochs=3).fit(module_of(tiny_base), data)
    assert sorted(columns) == sorted(len(encode_target(data.tokenizer, text)) for text in TEACHERS.values())


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_run_that_resumes_ends_as_one_that_went_on(top_k, tiny_base, tmp_path) -> None:
    path = distilled.write(tmp_path / "rows.jsonl")

    def fit(epochs: int, resumed: str | None = None, *callbacks) -> SoftPrompts:
        callback = SoftPromptCallback(starts())
        options = {"max_epochs": epochs, "enable_checkpointing": bool(callbacks)}
        run = trainer(tmp_path, callback, *callbacks, CollapseGuard(), **options)
        module = module_of(tiny_base, top_k=top_k, lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
        run.fit(module, data_of(tiny_base, path, batch_size=2), ckpt_path=resumed)
        return callback.prompts

    whole = fit(3)
    fit(1, None, ModelCheckpoint(tmp_path, filename="one"))
    resumed = fit(3, str(tmp_path / "one.ckpt"))
    for task in STARTS:
        if top_k is None:
            assert torch.equal(resumed[task], whole[task])
        else:  # what is stored was said of the rows in batches of another epoch, and is rounded otherwise
            assert tiny.relative_error(resumed[task].detach(), whole[task].detach()) < 1e-3


def test_averaged_weights_are_those_of_the_students(tiny_base, tmp_path) -> None:
    data = data_of(tiny_base, distilled.write(tmp_path / "rows.jsonl"), batch_size=2)
    steps: list[dict[str, torch.Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
            steps.append({task: pl_module.model.soft_prompts[task].detach().clone() for task in STARTS})

    callback = SoftPromptCallback(starts())
    trainer(tmp_path, callback, Watch(), WeightAveraging(), limit_val_batches=0).fit(module_of(tiny_base), data)
    for task in STARTS:
        mean = torch.stack([step[task] for step in steps]).mean(0)
        assert tiny.relative_error(callback.prompts[task].detach(), mean) < 1e-5


def test_what_is_stored_teaches_the_same_and_is_asked_once(tiny_base, tmp_path) -> None:
    path = distilled.write(tmp_path / "rows.jsonl")

    def fit(top_k: int | None) -> tuple[float, list[list[str]]]:
        asked: list[list[str]] = []

        class Module(PromptDistillation):
            def on_train_start(self) -> None:
                taught = self.lessons().taught
                self.lessons().taught = lambda rows: asked.append([row.task for row in rows]) or taught(rows)

        module = Module(str(tiny_base), TEACHERS, max_new_tokens=5, top_k=top_k)
        run = trainer(tmp_path, SoftPromptCallback(starts()), max_epochs=3, limit_val_batches=0)
        run.fit(module, data_of(tiny_base, path))
        return float(run.callback_metrics["train/loss"]), asked

    whole, asked = fit(None)
    nearly, once = fit(tiny.VOCABULARY - 1)
    assert nearly == pytest.approx(whole, rel=1e-4)
    assert [len(rows) for rows in asked] == [6, 6, 6] and [len(rows) for rows in once] == [6]
    assert fit(2)[0] < whole


def test_a_module_is_loaded_from_a_checkpoint_with_its_students(tiny_base, tmp_path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="run")
    run = trainer(tmp_path, callback := SoftPromptCallback(starts()), saving, enable_checkpointing=True)
    run.fit(module_of(tiny_base), data_of(tiny_base, distilled.write(tmp_path / "rows.jsonl")))
    options = {"base": str(tiny_base), "teachers": TEACHERS, "map_location": "cpu"}
    loaded = PromptDistillation.load_from_checkpoint(tmp_path / "run.ckpt", **options)
    assert loaded.model.soft_prompts.tasks == ("tone", "free")
    assert torch.equal(loaded.model.soft_prompts["tone"], callback.prompts["tone"])


def test_predictions_are_the_students(tiny_base, tmp_path) -> None:
    path = distilled.write(tmp_path / "rows.jsonl")
    callback = SoftPromptCallback(starts())
    run = trainer(tmp_path, callback)
    module, data = module_of(tiny_base), data_of(tiny_base, path, predict=path)
    (found,) = run.predict(module, data)
    texts = [row["text"] for row in ROWS]
    generator = MixedTaskGenerator(module.model, data.tokenizer)
    generator.prompts.templates.update(TEMPLATES)
    assert found == list(generator.answer(texts, [row["task"] for row in ROWS], max_new_tokens=5))
