"""The data module: batches of its tasks, rows that cannot be used, and errors that name file and line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

from lightning_softprompt import SoftPromptError, SoftPrompts, Source, TaskDataModule, TaskTemplate, attach
from tests import tiny
from tests.data.rows import ROWS, TASKS, ids, module, write


def test_a_mixed_batch(tokenizer, tmp_path) -> None:
    data = module(tokenizer, validation=write(tmp_path / "rows.jsonl", ROWS))
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert batch["tasks"] == ["tone", "kind", "free"]
    end = tokenizer.eos_token_id
    texts = [ids(tokenizer, w) for w in ("a b =", "so c =", "d e")]
    targets = [ids(tokenizer, "good"), ids(tokenizer, "news"), [*ids(tokenizer, "a b c"), end]]
    for row, (text, target) in enumerate(zip(texts, targets, strict=True)):
        pads = batch["input_ids"].shape[1] - len(text) - len(target)
        assert batch["input_ids"][row].tolist() == [tokenizer.pad_token_id] * pads + text + target
        assert batch["attention_mask"][row].tolist() == [0] * pads + [1] * (len(text) + len(target))
        assert batch["labels"][row].tolist() == [-100] * (pads + len(text)) + target
    assert data.label_ids("tone") == [ids(tokenizer, "good"), ids(tokenizer, "bad")]
    assert data.label_ids("free") is None


def test_prediction_batches_hold_no_targets(tokenizer, tmp_path) -> None:
    data = module(tokenizer, predict=write(tmp_path / "rows.jsonl", [{"task": "tone", "text": "a b"}]))
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert "labels" not in batch and batch["input_ids"].tolist() == [ids(tokenizer, "a b =")]
    data.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(SoftPromptError, match="1 rows to predict on 2 ranks; use at most 1 devices"):
        data.predict_dataloader()


def test_rows_without_targets_stand_beside_others_where_none_is_needed(tokenizer, tmp_path) -> None:
    rows = [ROWS[0], {"task": "tone", "text": "c"}, {**ROWS[2], "answer": ""}]
    path = write(tmp_path / "rows.jsonl", rows)
    data = module(tokenizer, validation=path, test=write(tmp_path / "bare.jsonl", rows[1:]), needs_targets=False)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    targets = [[label for label in row if label != -100] for row in batch["labels"].tolist()]
    assert targets == [ids(tokenizer, "good"), [], []]
    kept = [row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert kept[1:] == [ids(tokenizer, "c ="), ids(tokenizer, "d e")]
    data.setup("test")
    assert "labels" not in next(iter(data.test_dataloader()))
    with pytest.raises(SoftPromptError, match=r"line 2: the template .* needs the column 'tone'"):
        module(tokenizer, validation=path).setup("validate")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "empty; the test split needs at least one row"),
        ([*ROWS, {"task": "tune", "text": "a"}], "line 4: unknown task 'tune'; known tasks: 'tone', 'kind', 'free'"),
        (
            [*ROWS, {"task": ["tone"], "text": "a"}],
            "line 4: unknown task ['tone']; known tasks: 'tone', 'kind'",
        ),
        ([*ROWS, {"text": "a"}], "line 4: the column 'task' names no task"),
        (
            [ROWS[0], {**ROWS[0], "tone": "Good"}],
            "line 2: the target is ' Good', the task's labels are ' good', ' bad'",
        ),
        ([ROWS[0], {"task": "tone", "text": "a"}], "line 2: the template ' {tone}' needs the column 'tone', which is"),
        ([{"task": "free", "text": "a", "answer": " "}], "line 1: the target '{answer}' is empty"),
        ([{"task": "free", "text": "", "answer": "a"}], "line 1: the text '{text}' is empty"),
        ('{"task": "tone"\n', "line 1: expected one JSON object a line"),
        ("\n\n" + '{"task": "tone", "text": "a"}\n', "line 3: the template ' {tone}' needs the column 'tone'"),
        ("[1]\n", "line 1: expected one JSON object a line, found a JSON array"),
        ([ROWS[0], {"task": "tone", "text": " \n", "tone": "good"}], "line 2: the text '{text} =' is empty"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tokenizer, tmp_path, content, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content) if isinstance(content, str) else write(path, content)
    data = module(tokenizer, test=str(path))
    with pytest.raises(SoftPromptError) as caught:
        data.setup("test")
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_number_names_the_task_that_is_called_so(tokenizer, tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"task": 1, "text": "a"}, {"task": "1", "text": "b"}])
    data = TaskDataModule(tokenizer, {"1": TaskTemplate()}, predict=path)
    data.setup("predict")
    assert [example.task for example in data.examples["predict"]] == ["1", "1"]


def test_other_errors(tokenizer, tmp_path) -> None:
    with pytest.raises(SoftPromptError, match=r"gone\.jsonl does not exist \(the train split\)"):
        module(tokenizer, train=str(tmp_path / "gone.jsonl")).setup("fit")
    with pytest.raises(
        SoftPromptError, match=r"there is no test source; give .*, or data\.init_args\.test in a config"
    ):
        module(tokenizer).test_dataloader()
    for template, message in (
        (TaskTemplate("{text"), "unbalanced braces"),
        (TaskTemplate("{a:>9}"), "only hold"),
        (TaskTemplate(labels=["x"]), "at least two different"),
    ):
        with pytest.raises(SoftPromptError, match=message):
            TaskDataModule(tokenizer, {"a": template})
    with pytest.raises(SoftPromptError, match="path separators"):
        TaskDataModule(tokenizer, {"a/b": TaskTemplate()})


def test_batches_go_straight_into_a_model(tokenizer, tmp_path) -> None:
    model = tiny.tiny_model("llama")
    attach(model, SoftPrompts.for_model(model, dict.fromkeys(TASKS, 3)))
    data = module(tokenizer, train=write(tmp_path / "rows.jsonl", ROWS))
    data.setup("fit")
    out = model(**next(iter(data.train_dataloader())))
    assert torch.isfinite(out.loss)


def test_rows_that_cannot_be_used_are_left_out_counted_and_told(tokenizer, tmp_path, caplog) -> None:
    rows = [*ROWS, {"task": "tune", "text": "a"}, {"task": "free", "text": "a"}]
    path = write(tmp_path / "rows.jsonl", rows)
    data = module(tokenizer, train=path, predict=path, strict=False)
    data.setup("fit")
    assert [example.task for example in data.examples["train"]] == ["tone", "kind", "free"]
    assert [f"{path}, line {line}" in reason for line, reason in zip((4, 5), data.skipped["train"], strict=True)] == [
        True
    ] * 2
    assert (
        f"2 of 5 rows of the train split cannot be used; the first: {path}, line 4: unknown task 'tune'" in caplog.text
    )
    assert f"; {path}, line 5: " in caplog.text and "; with strict: true a run stops at the first" in caplog.text
    with pytest.raises(SoftPromptError, match="line 4: unknown task"):
        data.setup("predict")
    with pytest.raises(SoftPromptError, match="1 of 1 rows of the test split cannot be used; the first"):
        module(tokenizer, test=write(tmp_path / "bad.jsonl", rows[3:4]), strict=False).setup("test")


def test_a_label_does_not_lose_all_of_its_rows(tokenizer, tmp_path) -> None:
    tones = ["good", "bad", "bad"]
    path = write(tmp_path / "rows.jsonl", [{"task": "tone", "text": "a", "tone": tone} for tone in tones])
    tasks = {"tone": TaskTemplate("{text} =", " {tone}", labels=[" good", "bad"])}
    data = TaskDataModule(tokenizer, tasks, train=path, validation=path, strict=False)
    with pytest.raises(SoftPromptError) as caught:
        data.setup("fit")
    assert str(caught.value).startswith(
        "no row of the train split has the label 'bad' of the task 'tone', and rows of that task cannot be used: mend "
        f"them or the label, or take it out; the first: {path}, line 2: the target is ' bad'"
    )
    data.setup("validate")  # rows to judge by may lack a label
    with_one = [{"task": "tone", "text": "a", "tone": tone} for tone in ("good", "bad", "ugly")]
    left = module(tokenizer, train=write(tmp_path / "rows.jsonl", with_one), strict=False)
    left.setup("fit")
    assert len(left.examples["train"]) == 2
    # A label that never had a row loses none.
    of_one = [{"task": "tone", "text": text, "tone": "good"} for text in ("a", "b", " ")]
    left = module(
        tokenizer, train=write(tmp_path / "rows.jsonl", [*of_one, {"task": "tone", "text": "a"}]), strict=False
    )
    left.setup("fit")
    assert len(left.examples["train"]) == 2 and len(left.skipped["train"]) == 2


def test_a_label_loses_no_row_to_the_embedding_unsaid(tokenizer, tmp_path, run) -> None:
    with_words_beyond(tokenizer)
    rows = [{"task": "tone", "text": text, "tone": tone} for text, tone in (("a", "good"), ("more61", "bad"))]
    data = module(tokenizer, train=write(tmp_path / "rows.jsonl", rows), strict=False)
    data.setup("fit")
    data.trainer = run
    with pytest.raises(SoftPromptError, match="no row of the train split has the label ' bad' of the task 'tone'"):
        data.train_dataloader()


def test_a_streamed_file_and_one_that_is_not(tokenizer, tmp_path) -> None:
    for name, words in (("one", "a b"), ("two", "c d e")):
        rows = [{"task": "tone", "text": words, "tone": "good"}] * (6 if name == "one" else 3)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [Source(str(tmp_path / "one.jsonl"), streaming=True), str(tmp_path / "two.jsonl")]
    data = TaskDataModule(tokenizer, TASKS, train=sources, batch_size=9)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch["attention_mask"].sum(1).tolist()) == [4] * 6 + [5] * 3
    data.setup("fit")  # once more, as the batch-size scaler does
    assert len(data.train_dataloader()) == 1


@pytest.fixture
def run() -> SimpleNamespace:
    """What a data module sees of a run: a module that holds a model with prompts."""
    model = tiny.tiny_model("llama")
    held = torch.nn.ModuleDict({"model": attach(model, SoftPrompts.for_model(model, dict.fromkeys(TASKS, 3)))})
    return SimpleNamespace(lightning_module=held, state=SimpleNamespace(fn="fit"))


def with_words_beyond(tokenizer) -> int:
    """Add words up to one whose id, which is given back, the model's embedding does not know."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["model"]["vocab"] |= {f"more{number}": number for number in range(len(tokenizer), tiny.VOCABULARY + 1)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(told))
    assert tokenizer.convert_tokens_to_ids("more61") == tiny.VOCABULARY
    return tiny.VOCABULARY


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["text", "answer"])
def test_a_row_with_a_token_beyond_the_embedding_is_refused(tokenizer, tmp_path, run, streaming, column) -> None:
    beyond = with_words_beyond(tokenizer)
    rows = [*ROWS, {"task": "free", "text": "d e", "answer": "a", column: "b more61 c"}]
    source = Source(write(tmp_path / "rows.jsonl", rows), streaming=streaming)
    data = module(tokenizer, train=source)
    data.setup("fit")
    data.trainer = run
    where = "rows.jsonl, line 4" if streaming else "the train row '.*b.*more61.*c.*' of the task 'free'"
    with pytest.raises(SoftPromptError, match=f"{where}.* has token {beyond}, the model's embedding knows 0 to 60"):
        next(iter(data.train_dataloader()))
    lenient = module(tokenizer, train=source, validation=source, strict=False)
    lenient.setup("fit")
    lenient.trainer = run
    batch = next(iter(lenient.train_dataloader()))
    assert max(batch["input_ids"].flatten().tolist()) < beyond
    assert len(lenient.skipped["train"]) == 1 and f"has token {beyond}" in lenient.skipped["train"][0]
    (batch,) = lenient.val_dataloader()
    assert len(batch["tasks"]) == 3 and len(lenient.skipped["validation"]) == 1


def test_rows_to_predict_are_left_to_those_who_answer_them(tokenizer, tmp_path, run) -> None:
    beyond = with_words_beyond(tokenizer)
    data = module(tokenizer, predict=write(tmp_path / "rows.jsonl", [{"task": "tone", "text": "more61"}]))
    data.setup("predict")
    data.trainer = run
    (batch,) = data.predict_dataloader()
    assert beyond in batch["input_ids"]


def test_a_label_with_a_token_beyond_the_embedding_is_refused(tokenizer, tmp_path, run) -> None:
    with_words_beyond(tokenizer)
    tasks = {**TASKS, "tone": TaskTemplate("{text} =", " {tone}", labels=[" good", " bad", " more61"])}
    data = TaskDataModule(tokenizer, tasks, train=write(tmp_path / "rows.jsonl", ROWS))
    data.setup("fit")
    data.trainer = run
    with pytest.raises(SoftPromptError, match="the label ' more61' of the task 'tone' has token 61, the model's"):
        data.train_dataloader()


def test_pads_are_tokens_that_the_model_knows(tokenizer, tmp_path, run) -> None:
    with_words_beyond(tokenizer)
    tokenizer.pad_token = "more61"
    data = module(tokenizer, train=write(tmp_path / "rows.jsonl", ROWS))
    data.setup("fit")
    data.trainer = run
    (batch,) = data.train_dataloader()
    assert (batch["attention_mask"] == 0).any() and batch["input_ids"].max() < tiny.VOCABULARY


def test_labels_of_which_one_begins_another_end_in_training_too(tokenizer, tmp_path) -> None:
    tasks = {"tone": TaskTemplate("{text} =", " {tone}", labels=[" good", " good film"])}
    rows = [{"task": "tone", "text": "a", "tone": tone} for tone in ("good", "good film")]
    data = TaskDataModule(tokenizer, tasks, train=write(tmp_path / "rows.jsonl", rows))
    data.setup("fit")
    end = tokenizer.eos_token_id
    expected = [[*ids(tokenizer, "good"), end], [*ids(tokenizer, "good film"), end]]
    assert [example.target_ids for example in data.examples["train"]] == expected == data.label_ids("tone")
    for labels in ([" good  film", " good film"], [" unheard", " unseen"]):
        with pytest.raises(SoftPromptError, match="task 'tone': the tokenizer makes the same tokens of the labels"):
            TaskDataModule(tokenizer, {"tone": TaskTemplate("{text} =", " {tone}", labels=labels)})


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
def test_a_size_below_one_is_refused(tokenizer, name: str) -> None:
    with pytest.raises(SoftPromptError, match=f"{name} must be at least 1, got 0"):
        TaskDataModule(tokenizer, TASKS, **{name: 0})
