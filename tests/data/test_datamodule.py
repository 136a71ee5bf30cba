"""The data module: sources, templates, truncation, batches, and errors that name file and line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas
import pytest
import torch

from lightning_softprompt import SoftPromptError, Source, TaskDataModule, TaskTemplate
from tests.tokenizer import word_tokenizer

WORDS = ["a", "b", "c", "d", "e", "good", "bad", "film", "news", "=", "so"]
TASKS = {
    "tone": TaskTemplate("{text} =", " {tone}", labels=[" good", " bad"]),
    "kind": TaskTemplate("so {text} =", " {kind}", labels=[" film", " news"]),
    "free": TaskTemplate("{text}", "{answer}"),
}
ROWS = [
    {"task": "tone", "text": "a b", "tone": "good"},
    {"task": "kind", "text": "c", "kind": "news"},
    {"task": "free", "text": "d e", "answer": "a b c"},
]


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def module(tokenizer, **options) -> TaskDataModule:
    return TaskDataModule(tokenizer, TASKS, **{"batch_size": 8, **options})


def ids(tokenizer, words: str) -> list[int]:
    return tokenizer(words)["input_ids"]


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


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_formats_and_constant_tasks(tokenizer, tmp_path, suffix: str) -> None:
    frame = pandas.DataFrame([{"text": "a b", "tone": "good"}, {"text": "c", "tone": "bad"}])
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    data = module(tokenizer, test=[Source(str(path), task="tone"), write(tmp_path / "more.jsonl", ROWS)])
    data.setup("test")
    assert [e.task for e in data.examples["test"]] == ["tone", "tone", "tone", "kind", "free"]
    given = module(tokenizer, test=(tmp_path / "more.jsonl",))
    given.setup("test")
    assert [e.task for e in given.examples["test"]] == ["tone", "kind", "free"]
    assert data.examples["test"][1].text_ids == ids(tokenizer, "c =")


def test_a_hub_id_goes_through_datasets(tokenizer, monkeypatch) -> None:
    import datasets

    seen = []

    def load(path, config, split):
        seen.append((path, config, split))
        return datasets.Dataset.from_list([{"text": "a", "tone": "good"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source("some/set", task="tone", config="small")
    data = module(tokenizer, train=source, validation=Source("some/set", task="tone", split="dev"))
    data.setup("fit")
    assert seen == [("some/set", "small", "train"), ("some/set", None, "dev")]
    monkeypatch.undo()
    with pytest.raises(SoftPromptError, match="'no-such-set' could not be loaded as the test split"):
        failing = module(tokenizer, test="no-such-set")
        failing.setup("test")


def test_truncation_takes_from_the_column_and_never_from_the_target(tokenizer, tmp_path) -> None:
    rows = [{"task": "kind", "text": "a b c d e a b c d e", "kind": "film"}]
    data = module(tokenizer, test=write(tmp_path / "rows.jsonl", rows), max_length=7)
    data.setup("test")
    (example,) = data.examples["test"]
    assert example.text_ids == ids(tokenizer, "so a b c d =")
    assert example.target_ids == ids(tokenizer, "film")
    cramped = module(tokenizer, test=str(tmp_path / "rows.jsonl"), max_length=2)
    with pytest.raises(SoftPromptError, match="line 1: max_length=2 has no room for the template and a target of 1"):
        cramped.setup("test")


def test_prediction_batches_hold_no_targets(tokenizer, tmp_path) -> None:
    data = module(tokenizer, predict=write(tmp_path / "rows.jsonl", [{"task": "tone", "text": "a b"}]))
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert "labels" not in batch and batch["input_ids"].tolist() == [ids(tokenizer, "a b =")]
    data.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(SoftPromptError, match="1 rows to predict on 2 ranks; use at most 1 devices"):
        data.predict_dataloader()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "empty; the test split needs at least one row"),
        ([*ROWS, {"task": "tune", "text": "a"}], "line 4: unknown task 'tune'; known tasks: 'tone', 'kind', 'free'"),
        ([*ROWS, {"text": "a"}], "line 4: the column 'task' names no task"),
        (
            [ROWS[0], {**ROWS[0], "tone": "Good"}],
            "line 2: the target is ' Good', the task's labels are ' good', ' bad'",
        ),
        ([ROWS[0], {"task": "tone", "text": "a"}], "line 2: the template ' {tone}' needs the column 'tone', which is"),
        ([{"task": "free", "text": "a", "answer": " "}], "line 1: the target '{answer}' is empty"),
        ([{"task": "free", "text": "", "answer": "a"}], "line 1: the text '{text}' is empty"),
        ('{"task": "tone"\n', "line 1: expected one JSON object a line"),
        ('{"task": "tone"}\n\n{"task": "tone"}\n', "line 2: expected one JSON object a line, found an empty line"),
        ("[1]\n", "line 1: expected a JSON object, found list"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tokenizer, tmp_path, content, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content) if isinstance(content, str) else write(path, content)
    data = module(tokenizer, test=str(path))
    with pytest.raises(SoftPromptError) as caught:
        data.setup("test")
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_other_errors(tokenizer, tmp_path) -> None:
    with pytest.raises(SoftPromptError, match=r"gone\.jsonl does not exist \(the train split\)"):
        module(tokenizer, train=str(tmp_path / "gone.jsonl")).setup("fit")
    with pytest.raises(SoftPromptError, match="there is no test source"):
        module(tokenizer).test_dataloader()
    for template, message in (
        (TaskTemplate("{text"), "unbalanced braces"),
        (TaskTemplate("{a.b}"), "only hold"),
        (TaskTemplate(labels=["x"]), "at least two different"),
    ):
        with pytest.raises(SoftPromptError, match=message):
            TaskDataModule(tokenizer, {"a": template})
    with pytest.raises(SoftPromptError, match="path separators"):
        TaskDataModule(tokenizer, {"a/b": TaskTemplate()})


def test_csv_lines_count_the_header(tokenizer, tmp_path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,tone\na,good\nb,worse\n")
    with pytest.raises(SoftPromptError, match=r"rows\.csv, line 3: the target is ' worse'"):
        module(tokenizer, test=Source(str(path), task="tone")).setup("test")


def test_batches_go_straight_into_a_model(tokenizer, tmp_path) -> None:
    from lightning_softprompt import SoftPrompts, attach
    from tests import tiny

    model = tiny.tiny_model("llama")
    attach(model, SoftPrompts.for_model(model, dict.fromkeys(TASKS, 3)))
    data = module(tokenizer, train=write(tmp_path / "rows.jsonl", ROWS))
    data.setup("fit")
    out = model(**next(iter(data.train_dataloader())))
    assert torch.isfinite(out.loss)


def test_rows_that_cannot_be_used_are_left_out_counted_and_told(tokenizer, tmp_path, caplog) -> None:
    rows = [*ROWS, {"task": "tune", "text": "a"}, {"task": "tone", "text": "a", "tone": "Good"}]
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
    with pytest.raises(SoftPromptError, match="line 4: unknown task"):
        data.setup("predict")
    with pytest.raises(SoftPromptError, match="1 of 1 rows of the test split cannot be used; the first"):
        module(tokenizer, test=write(tmp_path / "bad.jsonl", rows[3:4]), strict=False).setup("test")


def test_a_run_is_resumed_in_the_middle_of_an_epoch_bit_for_bit(tokenizer, tmp_path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_softprompt import SoftPromptCallback
    from tests import modules

    rows = [{**ROWS[number % 2], "text": "a b c d e"[: 1 + 2 * (number % 5)]} for number in range(24)]
    path = write(tmp_path / "rows.jsonl", rows)

    def run(folder, resume=None, workers: int = 0, **options):
        data = module(tokenizer, train=path, batch_size=3, temperature=2.0, num_workers=workers)
        whole, prompts = modules.Plain(), SoftPromptCallback(dict.fromkeys(TASKS, 3))
        saving = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        options = {"max_epochs": 2, "enable_checkpointing": True, "limit_val_batches": 0, **options}
        modules.trainer(folder, prompts, saving, **options).fit(whole, datamodule=data, ckpt_path=resume)
        return {task: prompts.prompts[task].detach().clone() for task in TASKS}

    whole = tmp_path / "whole"
    expected = run(whole)
    for step in (5, 10):
        for workers in (0, 1):
            found = run(tmp_path / f"{step} {workers}", whole / f"step={step}.ckpt", workers)
            assert all(torch.equal(found[task], expected[task]) for task in TASKS)


@pytest.mark.parametrize("saving", [{}, {"save_on_train_epoch_end": True}, {"every_n_train_steps": 4}], ids=str)
@pytest.mark.parametrize("validates", [False, True])
def test_a_run_that_was_saved_at_the_end_of_an_epoch_goes_on_with_the_next(
    saving: dict, validates: bool, tokenizer, tmp_path
) -> None:
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    from lightning_softprompt import SoftPromptCallback
    from tests import modules

    rows = [{**ROWS[number % 2], "text": "a b c d e"[: 1 + 2 * (number % 5)]} for number in range(24)]
    path = write(tmp_path / "rows.jsonl", rows)

    class Seen(Callback):
        def __init__(self) -> None:
            self.batches: list[tuple[int, int, list]] = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.batches.append((trainer.current_epoch, batch_idx, batch["input_ids"].tolist()))

    def run(resume=None) -> Seen:
        data = module(tokenizer, train=path, validation=path, batch_size=6)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **saving)
        options = {"max_epochs": 3, "enable_checkpointing": True, "limit_val_batches": 1.0 if validates else 0}
        callbacks = [SoftPromptCallback(dict.fromkeys(TASKS, 3)), keep, seen := Seen()]
        modules.trainer(tmp_path, *callbacks, **options).fit(modules.Plain(), datamodule=data, ckpt_path=resume)
        return seen

    whole = run().batches
    assert len(whole) == 12
    assert run(tmp_path / "epoch=0-step=4.ckpt").batches == whole[4:]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_batches_may_be_overfitted(tokenizer, tmp_path) -> None:
    from lightning_softprompt import SoftPromptCallback
    from tests import modules

    path = write(tmp_path / "rows.jsonl", [{**ROWS[0], "text": "a b c d e"[: 1 + 2 * (row % 5)]} for row in range(24)])
    data = module(tokenizer, train=path, validation=path, batch_size=6)
    run = modules.trainer(tmp_path, SoftPromptCallback(dict.fromkeys(TASKS, 3)), max_epochs=2, overfit_batches=2)
    run.fit(modules.Plain(), datamodule=data)
    assert run.global_step == 4


def test_a_loader_begins_anew_whenever_it_is_asked_to(tokenizer, tmp_path) -> None:
    data = module(tokenizer, train=write(tmp_path / "rows.jsonl", ROWS * 4), batch_size=5)
    data.setup("fit")
    loader = data.train_dataloader()
    first = next(iter(loader))
    batches = list(loader)
    assert len(batches) == 3 and batches[0]["input_ids"].tolist() == first["input_ids"].tolist()
    loader.load_state_dict({"epoch": 0, "batches": 2, "rows_a_step": 5})
    assert [batch["tasks"] for batch in loader] == [batches[2]["tasks"]] and len(list(loader)) == 3
    loader.load_state_dict({"epoch": 0, "batches": 2, "rows_a_step": 5})
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == 3


CHAT = "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}so{% endif %}"


def test_a_row_without_a_class_has_no_label(tokenizer, monkeypatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "tone": datasets.ClassLabel(names=["good", "bad"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "tone": [1, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    source = Source("some/set", task="tone")
    module(tokenizer, predict=source).setup("predict")
    lenient = module(tokenizer, test=source, strict=False)
    lenient.setup("test")
    assert [example.target_ids for example in lenient.examples["test"]] == [ids(tokenizer, "bad")]
    with pytest.raises(SoftPromptError, match=r"some/set\[test\], row 2: the template ' \{tone\}' needs the"):
        module(tokenizer, test=source).setup("test")


def test_a_run_does_not_go_on_in_the_middle_of_an_epoch_with_other_batches(tokenizer, tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS * 4)
    loaders = []
    for batch_size in (5, 4):
        data = module(tokenizer, train=path, batch_size=batch_size)
        data.setup("fit")
        loaders.append(data.train_dataloader())
    batches = iter(loaders[0])
    for saved_at in (1, 2):
        next(batches)
        loaders[1].load_state_dict({**loaders[0].state_dict(), "batches": 3 * saved_at - 2})  # also beyond its length
        with pytest.raises(SoftPromptError, match="middle of an epoch, at 5 rows a step, cannot go on at 4; use"):
            next(iter(loaders[1]))


def test_a_chat_is_what_the_tokenizer_makes_of_it(tokenizer, tmp_path) -> None:
    tokenizer.chat_template = CHAT
    tasks = {
        "said": TaskTemplate("{text} =", "{tone}", labels=["good", "bad"], chat=True),
        "free": TaskTemplate("{text}", "{answer}", chat=True, system="d e"),
    }
    rows = [{"task": "said", "text": "a b", "tone": "good"}, {"task": "free", "text": "c", "answer": "a b"}]
    data = TaskDataModule(tokenizer, tasks, train=write(tmp_path / "rows.jsonl", rows), max_length=40)
    data.setup("fit")
    said, free = data.examples["train"]
    turns = [{"role": "user", "content": "a b ="}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert said.text_ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert said.target_ids == ids(tokenizer, "good")
    expected = "<system> d e <user> c so"
    assert free.text_ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert free.target_ids == [*ids(tokenizer, "a b"), tokenizer.eos_token_id]
    long = [{"task": "said", "text": "a b c d e a b c d e", "tone": "bad"}]
    room = len(said.text_ids) + 3
    data = TaskDataModule(tokenizer, tasks, test=write(tmp_path / "long.jsonl", long), max_length=room)
    data.setup("test")
    (short,) = data.examples["test"]
    assert len(short.text_ids) <= room - 1 and short.text_ids[-2:] == ids(tokenizer, "= so")


def test_a_chat_needs_a_template(tokenizer, tmp_path) -> None:
    tasks = {"said": TaskTemplate("{text}", "{tone}", chat=True)}
    rows = [{"task": "said", "text": "a", "tone": "good"}]
    with pytest.raises(SoftPromptError, match="the tokenizer has no chat template"):
        TaskDataModule(tokenizer, tasks, train=write(tmp_path / "rows.jsonl", rows)).setup("fit")
    with pytest.raises(SoftPromptError, match="'said' has words of the system and is no chat"):
        TaskDataModule(tokenizer, {"said": TaskTemplate(system="so")})
