"""Where rows come from: files of every format and the hub, whole and streamed, with the names of their classes."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from lightning.pytorch.cli import LightningArgumentParser

from lightning_softprompt import SoftPromptError, Source, TaskDataModule, TaskTemplate
from tests.data.rows import ROWS, ids, module, write
from tests.data.rows import TASKS_OF_ONE_COLUMN as TASKS


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


@pytest.mark.parametrize("given", [5, {"path": "rows.jsonl"}, [{"text": "secret"}], [["rows.jsonl"]]])
def test_rows_are_no_source_and_no_id_that_the_hub_is_asked_for(given, tokenizer) -> None:
    with pytest.raises(SoftPromptError, match="a source is a file, a pattern, the id of a data set or a Source, got"):
        module(tokenizer, train=given)


def test_a_path_is_a_path_wherever_one_is_given(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path / "base")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "tone": "good"}\n')
    for given in (path, tmp_path / "*.jsonl"):
        data = TaskDataModule(tmp_path / "base", TASKS, test=Source(given, task="tone"))
        data.setup("test")
        assert [example.text_ids for example in data.examples["test"]] == [ids(tokenizer, "a =")]
    with pytest.raises(SoftPromptError, match=r"gone\.jsonl does not exist"):
        next(Source(tmp_path / "gone.jsonl").rows("test"))


def test_csv_lines_count_the_header(tokenizer, tmp_path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,tone\na,good\nb,worse\n")
    with pytest.raises(SoftPromptError, match=r"rows\.csv, line 3: the target is ' worse'"):
        module(tokenizer, test=Source(str(path), task="tone")).setup("test")


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


def test_a_column_of_a_streamed_csv_is_read_alike_in_every_chunk(tokenizer, tmp_path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,tone\n" + "a,1\n" * 12_000 + "a,\n" + "a,1\n" * 10)
    source = Source(str(path), task="free", streaming=True)
    data = TaskDataModule(tokenizer, TASKS, validation=source, strict=False)
    data.setup("validate")
    assert len({tuple(example.target_ids) for example in data.examples["validation"]}) == 1
    (reason,) = data.skipped["validation"]
    assert f"{path}, line 12002: the template '{{tone}}' needs the column 'tone', which is empty" in reason
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "tone": "good"}\n' * 20)
    short = TaskDataModule(tokenizer, TASKS, validation=Source(str(path), "free", streaming=True, num_rows=7))
    short.setup("validate")
    assert len(short.examples["validation"]) == 7


def test_the_hub_is_asked_for_a_stream_and_its_length(tokenizer, monkeypatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "tone": datasets.ClassLabel(names=["good", "bad"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "tone": [0, 1, 0]}, features=features)
    seen = []

    def load(*arguments, **options):
        seen.append((arguments, options))
        return streamed

    monkeypatch.setattr(datasets, "load_dataset", load)
    streamed = data.to_iterable_dataset()
    source = Source("some/set", task="tone", streaming=True)
    module = TaskDataModule(tokenizer, TASKS, train=source, validation=source, batch_size=3)
    with pytest.raises(SoftPromptError, match=r"how many rows some/set\[train\] has; give Source\(num_rows"):
        module.setup("fit")
    streamed.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=3)})
    streamed._split = datasets.Split.TRAIN
    module.setup("fit")
    assert seen[-1] == (("some/set", None), {"split": "validation", "streaming": True})
    (batch,) = module.train_dataloader()
    good, bad = module.label_ids("tone")
    targets = {row[-1].item() for row in batch["labels"]}
    assert targets == {good[0], bad[0]} and len(batch["tasks"]) == 3
    assert [example.target_ids for example in module.examples["validation"]] == [good, bad, good]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_file_that_is_no_jsonl_says_so(split: str, tokenizer, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "tone": "good"}\n{"text":\n')
    data = TaskDataModule(tokenizer, TASKS, **{split: Source(str(path), task="tone", streaming=True)})
    with pytest.raises(SoftPromptError, match=r"rows\.jsonl, line 2: expected one JSON object a line \(.* at char"):
        data.setup("fit")
        list(data.train_dataloader())


def texts(source: Source, template: str = "{text}") -> list[str]:
    return [TaskTemplate(template).render_text(row, where) for where, row in source.rows("train")]


def streamed(source: Source) -> list[tuple[str, dict[str, Any]]]:
    data, size = source.stream("train")
    found = [source.of_stream(row, "train") for row in data]
    assert size == len(found)
    return found


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.csv.gz", "rows.parquet"])
def test_a_stream_gives_the_rows_that_are_held(tmp_path, name: str) -> None:
    path = tmp_path / name
    values = ["00501", "3.10", "true", "None", "2024-05-01", "1e5"]
    if name.endswith("parquet"):
        pandas.DataFrame({"text": values}).to_parquet(path)
    else:
        content = "\n".join(json.dumps({"text": value}) if "json" in name else value for value in values)
        data = (content if "json" in name else f"text\n{content}\n").encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    held = list(Source(str(path)).rows("train"))
    assert [row["text"] for _, row in held] == values
    assert list(Source(str(path), streaming=True).rows("train")) == held == streamed(Source(str(path), streaming=True))
    assert streamed(Source(str(path))) == held  # beside a source that is streamed


def test_numbers_of_a_stream_stand_as_they_are_written(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": 3.10}\n{"text": 1e5}\n{"text": true}\n{"text": "x", "other": [{"mixed": 1}, "types"]}\n')
    assert texts(Source(str(path))) == texts(Source(str(path), streaming=True)) == ["3.10", "1e5", "true", "x"]
    rows = [row for _, row in streamed(Source(str(path), streaming=True))]
    assert [f"{row['text']}" for row in rows] == ["3.10", "1e5", "True", "x"]


def test_a_file_is_read_anew_and_never_copied(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path, secret = tmp_path / "rows.csv", "a text of the user"
    path.write_text(f"text\n{secret}\n")
    os.utime(path, (1.6e9, 1.6e9))
    source = Source(str(path), streaming=True)
    assert texts(source) == [secret] == [row["text"] for _, row in streamed(source)]
    path.write_text("text\nanother one\n")
    os.utime(path, (1.6e9, 1.6e9))
    assert texts(source) == ["another one"] == [row["text"] for _, row in streamed(source)]
    kept = [each for each in (tmp_path / "cache").rglob("*") if each.is_file()]
    assert not any(secret.encode() in each.read_bytes() for each in kept)


def test_several_files_are_a_list_or_a_pattern(tokenizer, tmp_path) -> None:
    for number in (1, 2):
        write(tmp_path / f"fold{number}.jsonl", [{"text": "abc"[number], "tone": "good"}])
    pattern = str(tmp_path / "fold*.jsonl")
    assert texts(Source(pattern)) == texts(Source(pattern, streaming=True)) == ["b", "c"]
    files = [tmp_path / "fold2.jsonl", str(tmp_path / "fold1.jsonl")]
    data = TaskDataModule(tokenizer, {"tone": TASKS["tone"]}, test=[Source(str(each), "tone") for each in files])
    data.setup("test")
    assert [e.text_ids for e in data.examples["test"]] == [ids(tokenizer, "c ="), ids(tokenizer, "b =")]
    write(tmp_path / "fold3.jsonl", [])
    assert texts(Source(pattern)) == ["b", "c"]
    for missing in (str(tmp_path / "none*.jsonl"), str(tmp_path / "fold1*")):
        with pytest.raises(SoftPromptError, match=r"none\*\.jsonl does not exist|fold1\* does not exist|ends in"):
            (tmp_path / "fold1.txt").write_text("no rows")
            texts(Source(missing))
    with pytest.raises(SoftPromptError, match=r"fold1\.txt: expected a file that ends in \.jsonl"):
        texts(Source(str(tmp_path / "fold1.txt")))


def test_a_line_that_cannot_be_read_is_left_out_where_rows_may_be(tokenizer, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "tone": "good"}\nno row\n{"text": "b", "tone": "bad"}\n')
    for streaming in (False, True):
        source = Source(str(path), task="tone", streaming=streaming)
        data = TaskDataModule(tokenizer, TASKS, validation=source, strict=False)
        data.setup("validate")
        assert len(data.examples["validation"]) == 2 and f"{path}, line 2" in data.skipped["validation"][0]
        with pytest.raises(SoftPromptError, match=r"rows\.jsonl, line 2: expected one JSON object"):
            TaskDataModule(tokenizer, TASKS, validation=source).setup("validate")


def test_a_file_that_a_config_names_is_a_path_and_not_its_content(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,tone\na: so,good\n")
    listed = str(tmp_path / "list.csv")
    Path(listed).write_text("- a\n- b\n")
    parser = LightningArgumentParser()
    parser.add_class_arguments(TaskDataModule, "data", sub_configs=True, skip={"tokenizer", "tasks"})
    for given, expected in (
        (str(path), str(path)),
        (listed, listed),
        (f"[{path}]", [str(path)]),
        (f"[{path}, {listed}]", [str(path), listed]),
    ):
        assert parser.parse_args([f"--data.train={given}"]).data.train == expected
    found = parser.parse_args([f"--data.train={{path: {path}, task: tone}}"]).data.train
    assert (found.path, found.task) == (str(path), "tone")
