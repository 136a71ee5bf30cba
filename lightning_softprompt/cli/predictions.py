"""The file that `predict` writes: the rows as they were read, each with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_softprompt.cli.answer_columns import gold_column, text_columns
from lightning_softprompt.data.datamodule import TaskDataModule
from lightning_softprompt.distributed import gathered
from lightning_softprompt.training.module import CausalLMModule


class PredictionCollector(BasePredictionWriter):
    """Collects what all ranks predict.

    Attributes:
        columns: what each row gets, by the number of the row.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self.columns: dict[int, dict[str, Any]] = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Collect what this rank predicted for the rows of these numbers."""
        numbers = list(batch_indices or ())
        answers = pl_module.answers if isinstance(pl_module, CausalLMModule) else None
        if answers is None:  # a module of the user's own, or one whose own step predicts
            columns = [{"output": answer} for answer in prediction]
        else:
            columns = text_columns(answers, [f"row {number + 1}" for number in numbers])
        self.columns |= zip(numbers, columns, strict=True)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect what the other ranks predicted."""
        for of_rank in gathered(self.columns):
            self.columns |= of_rank

    def rows(self, data: TaskDataModule) -> list[dict[str, Any]]:
        """The rows that were predicted, in their order: their own columns, the task, the answer, and what was right.

        `answer`, the name that version 0.1 gave to the column `output`, is written beside it, unless a row has a column
        of that name.
        """
        rows = []
        for number in sorted(self.columns):  # limit_predict_batches may leave rows out
            example, added = data.examples["predict"][number], self.columns[number]
            own = dict(example.columns or {})
            old = {"answer": added.get("output")} if "answer" not in own else {}
            rows.append(own | {"task": example.task} | old | added | gold_column(data.tasks[example.task], own))
        return rows
