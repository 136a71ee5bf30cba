"""`TaskDataModule`: reads the rows of many tasks from files or the hub and mixes them in batches for a causal LM."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_softprompt.attachment.attach import attachment_inside
from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.loading import load_tokenizer
from lightning_softprompt.base.padding import pad_token_id
from lightning_softprompt.base.tokens import check_ids
from lightning_softprompt.data.encoding import Example, LeftOut, check_labels_left, collate, encode
from lightning_softprompt.data.loader import ResumableLoader
from lightning_softprompt.data.mixing import TaskMixing
from lightning_softprompt.data.sources import Source, Sources, no_source, sources_of
from lightning_softprompt.data.streams import PassThrough, RowStream, StreamMixing
from lightning_softprompt.errors import SoftPromptError, check_at_least_one
from lightning_softprompt.prompts.task_names import check_task_name
from lightning_softprompt.prompts.template_encoding import TaskEncoding
from lightning_softprompt.prompts.templates import TaskTemplate, check_templates, value_text
from lightning_softprompt.seeding import generator

logger = logging.getLogger("lightning_softprompt")

SPLITS = {  # that each stage of the Trainer reads
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class TaskDataModule(LightningDataModule):
    """Batches that mix the rows of any number of tasks.

    A batch holds `input_ids` int64 `[batch, length]`, `attention_mask` and `labels` of the same dtype and shape
    (`labels` are -100 everywhere except on the targets), and `tasks`, one name per row. So a module can call
    `self.model(**batch)`. Rows are padded on the left, and their targets end in the last column. Prediction batches
    have neither targets nor labels.

    Args:
        tokenizer: the model's tokenizer, or its hub id or path.
        tasks: the template of each task.
        train: where training rows come from: a file (`.jsonl`, `.csv`, `.tsv`, `.parquet`), a pattern of files, the id
            of a data set on the hub, a `Source`, or a list of these.
        validation: where validation rows come from, in the same forms.
        test: where test rows come from, in the same forms.
        predict: where the rows to predict come from, in the same forms.
        task_column: the column that names a row's task, for sources that do not name one.
        batch_size: number of rows in a batch.
        max_length: the most tokens a row may have, text and target together; the text is shortened, never the target.
        num_workers: number of processes that make batches.
        seed: the seed of the order of training rows, which is different in each epoch.
        temperature: with 1, every training row comes once per epoch; above 1, rows of small tasks come more often. See
            `TaskMixing`.
        size_limit: the number of training rows above which a task's share grows no further; None sets no limit.
        round_robin: whether the tasks take turns, one training row each; all tasks then come equally often.
        group_by_length: whether to put training rows of similar length into one batch, which saves pads. If length
            depends on the class, many batches then hold rows of one class only.
        strict: whether to raise at the first row that cannot be used. If False, such rows are left out, and a warning
            says how many and why; a label that thereby trains on no row raises. Rows to predict are never left out.
        needs_targets: whether a row without a target cannot be used. `PromptDistillation` needs none.

    Attributes:
        encodings: how the rows of each task become token ids.
        examples: the rows of each split as token ids, after setup.
        skipped: for each split, why rows were left out.

    Raises:
        SoftPromptError: when it is made: a task name, a template, a tokenizer or a source that cannot be used, or
            labels that the tokenizer cannot tell apart. In setup: a missing file, an empty split, an unknown task, or a
            label that is not one of the task's labels; the message names file and line. When batches are asked for,
            because the model is known only then: a label, or a training, validation or test row, with a token that the
            model's embedding does not know.
    """

    def __init__(
        self,
        tokenizer: Any,
        tasks: dict[str, TaskTemplate],
        train: Sources | None = None,
        validation: Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        task_column: str = "task",
        batch_size: int = 16,
        max_length: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        temperature: float = 1.0,
        size_limit: int | None = None,
        round_robin: bool = False,
        group_by_length: bool = False,
        strict: bool = True,
        needs_targets: bool = True,
    ) -> None:
        super().__init__()
        check_at_least_one(batch_size=batch_size, max_length=max_length)
        for task in tasks:
            check_task_name(task)
        check_templates(tasks)
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        self.tasks = tasks
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.sources = {split: sources_of(sources) for split, sources in given.items()}
        for source in chain.from_iterable(self.sources.values()):
            source.check()
        self.task_column = task_column
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.mixing = {"temperature": temperature, "size_limit": size_limit, "round_robin": round_robin}
        self.group_by_length = group_by_length
        self.strict = strict
        self.needs_targets = needs_targets
        self.max_length = max_length
        self.encodings = {task: TaskEncoding.of(self.tokenizer, task, template) for task, template in tasks.items()}
        self._vocabulary: int | None = None
        self.examples: dict[str, list[Example]] = {}
        self.streams: list[RowStream] = []
        self.skipped: dict[str, list[str]] = {}
        self._left_out: dict[str, list[LeftOut]] = {split: [] for split in given}

    def label_ids(self, task: str) -> list[list[int]] | None:
        """The token ids of each of the task's labels, with the end-of-text token if it is trained; None for free text.

        None of them begins another one.
        """
        return self.encodings[task].label_ids

    def setup(self, stage: str) -> None:
        """Read, check and encode the splits that `stage` needs."""
        for split in SPLITS[stage]:
            sources = self.sources[split]
            if not sources or split in self.examples or (split == "train" and self.streams):
                continue
            if split == "train" and any(source.streaming for source in sources):
                self.streams = [self._stream(source) for source in sources]
            else:
                self.examples[split] = [example for source in sources for example in self._encode(source, split)]
                self._report(split, self.examples[split])

    def teardown(self, stage: str) -> None:
        """Warn how many streamed rows could not be used."""
        if stage == "fit" and self.streams:
            self._report("train")

    def train_dataloader(self) -> DataLoader:
        """Training batches in the order of `TaskMixing` or `StreamMixing`. Checkpoints hold the position in it."""
        self._meet_model()
        options: Any = {**self.mixing, **(getattr(self.trainer, "distributed_sampler_kwargs", None) or {})}
        if self.streams:
            if self.group_by_length:
                raise SoftPromptError("group_by_length needs to know all rows; leave it out, or set streaming=False")
            streamed: Any = StreamMixing(self.streams, self.seed, **options)
            return ResumableLoader(PassThrough(streamed.total_size), sampler=streamed, **self._options())
        examples = self._examples("train")
        mixing: Any = TaskMixing(
            [example.task for example in examples],
            self.seed,
            lengths=[len(each.text_ids) + len(each.target_ids) for each in examples] if self.group_by_length else None,
            batch_size=self.batch_size,
            **options,
        )
        return ResumableLoader(examples, sampler=mixing, **self._options())

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation batches. Without a validation source there are none, and `Trainer.validate` raises an error."""
        is_asked_for = self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING
        return self._loader("validation") if "validation" in self.examples or is_asked_for else []

    def test_dataloader(self) -> DataLoader:
        """The batches of the test split."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Batches of texts without targets."""
        rows, ranks = len(self._examples("predict")), getattr(self.trainer, "world_size", 1)
        if rows < ranks:  # Lightning shares the rows out among the ranks, and fails if a rank gets none
            raise SoftPromptError(f"{rows} rows to predict on {ranks} ranks; use at most {rows} devices")
        return self._loader("predict")

    def _stream(self, source: Source) -> RowStream:
        data, num_rows = source.stream("train")
        name = source.name("train")
        # Each source has a seed of its own, so that two tasks over the same texts get them in different orders.
        seed = generator(self.seed, self.sources["train"].index(source), name).initial_seed()

        def encode(row: dict[str, Any]) -> Example:
            where, columns = source.of_stream(row, "train")
            example = self._encode_row(source, columns, where, with_target=True)
            self._check_ids([*example.text_ids, *example.target_ids], where)
            return example

        return RowStream(data, num_rows, seed, name, encode, None if self.strict else self._leave_out)

    def _leave_out(self, reason: str) -> None:
        reasons = self.skipped.setdefault("train", [])
        if not reasons:
            logger.warning("a row cannot be used, and is left out like others to come: %s", reason)
        reasons.append(reason)

    def _encode(self, source: Source, split: str) -> Iterator[Example]:
        for where, row in source.attempts(split):
            try:
                if isinstance(row, SoftPromptError):
                    raise row
                yield self._encode_row(source, row, where, with_target=split != "predict")
            except SoftPromptError as error:
                if self.strict or split == "predict":
                    raise
                self.skipped.setdefault(split, []).append(str(error))
                if not isinstance(row, SoftPromptError):
                    task = source.task or row.get(self.task_column)
                    self._left_out[split].append(LeftOut.of_row(self.tasks, task, row, str(error)))

    def _encode_row(self, source: Source, row: dict[str, Any], where: str, with_target: bool) -> Example:
        task = source.task if source.task is not None else row.get(self.task_column)
        if task is None:
            raise SoftPromptError(
                f"{where}: the column {self.task_column!r} names no task; fill it, set task_column, or give the "
                f"source a task. Columns: {', '.join(map(repr, row))}"
            )
        if (name := value_text(task)) not in self.tasks:  # one of digits is a number in JSON lines and Parquet
            raise SoftPromptError(f"{where}: unknown task {task!r}; known tasks: {', '.join(map(repr, self.tasks))}")
        has_target = with_target and (self.needs_targets or self.tasks[name].has_target(row))
        ids = encode(self.encodings[name], row, where, self.max_length, has_target)
        return Example(name, *ids, columns=None if with_target and self.needs_targets else row)

    def _report(self, split: str, kept: list[Example] | None = None) -> None:
        if not (reasons := self.skipped.get(split)):
            return
        all_rows = "" if kept is None else f" of {len(reasons) + len(kept)}"
        said = f"{len(reasons)}{all_rows} rows of the {split} split cannot be used; the first: {'; '.join(reasons[:3])}"
        if kept == []:
            raise SoftPromptError(said)
        if split == "train" and kept and self.needs_targets:
            check_labels_left(self.encodings, kept, self._left_out[split])
        logger.warning("%s; with strict: true a run stops at the first; all in datamodule.skipped[%r]", said, split)

    def _meet_model(self) -> None:
        """Find out how many ids the model with the prompts knows, and check that it knows those of all labels.

        On a GPU an unknown id would end the process, so it must be found before the model runs.
        """
        module = getattr(self.trainer, "lightning_module", None)
        attachment = None if module is None else attachment_inside(module)
        self._vocabulary = None if attachment is None else vocabulary_size(attachment.model)
        for task, template in self.tasks.items():
            for label, ids in zip(template.labels or [], self.label_ids(task) or [], strict=True):
                self._check_ids(ids, f"the label {label!r} of the task {task!r}")

    def _check_ids(self, ids: list[int], what: str) -> None:
        if self._vocabulary is not None:
            check_ids(ids, self._vocabulary, what)

    def _examples(self, split: str) -> list[Example]:
        if split not in self.examples:
            raise no_source(split)
        if split != "predict":  # in prediction, a row with unknown ids gets no answer, and the others do
            self.examples[split] = self._known(split)
        return self.examples[split]

    def _known(self, split: str) -> list[Example]:
        """The examples whose ids the model knows. Any other raises if `strict`; if not, it is left out and reported."""
        kept = []
        for example in self.examples[split]:
            ids = [*example.text_ids, *example.target_ids]
            try:
                self._check_ids(ids, "it")
                kept.append(example)
            except SoftPromptError as error:
                reason = f"the {split} row {self.tokenizer.decode(ids)!r:.200} of the task {example.task!r}: {error}"
                if self.strict:
                    raise SoftPromptError(reason) from error
                self.skipped.setdefault(split, []).append(reason)
                self._left_out[split].append(LeftOut.of_example(self.encodings, example, reason))
        if len(kept) < len(self.examples[split]):
            self._report(split, kept)
        return kept

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": partial(collate, pad=pad_token_id(self.tokenizer, self._vocabulary)),
        }

    def _loader(self, split: str) -> DataLoader:
        self._meet_model()
        return DataLoader(self._examples(split), **self._options())  # type: ignore[arg-type]
