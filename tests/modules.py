"""LightningModules that have never heard of soft prompts, and data for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from tests import tiny

TASKS = {"alpha": 4, "beta": 7, "gamma": 2}


class Rows(torch.utils.data.Dataset):
    """Ragged rows of three tasks; `names` puts the task's name into the batch in place of its index."""

    def __init__(
        self, count: int, tasks: tuple[int, ...] = (0, 1, 2), names: bool = False, key: str = "task_ids"
    ) -> None:
        draw = torch.Generator().manual_seed(count)
        self.rows = []
        for index in range(count):
            length = int(torch.randint(3, 8, (1,), generator=draw))
            ids = torch.randint(2, tiny.VOCABULARY, (length,), generator=draw)
            task: Any = tasks[index % len(tasks)]
            self.rows.append((ids, list(TASKS)[task] if names else task))
        self.key = key

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.rows[index]

    def collate(self, rows: list[tuple[Tensor, Any]]) -> dict[str, Any]:
        width = max(len(ids) for ids, _ in rows)
        ids = torch.stack([functional.pad(row, (0, width - len(row)), value=1) for row, _ in rows])
        mask = torch.stack([functional.pad(torch.ones_like(row), (0, width - len(row))) for row, _ in rows])
        tasks = [task for _, task in rows]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.where(mask == 1, ids, -100),
            self.key: tasks if isinstance(tasks[0], str) else torch.tensor(tasks),
        }


def loader(count: int = 12, batch_size: int = 4, **options: Any) -> DataLoader:
    rows = Rows(count, **options)
    return DataLoader(rows, batch_size=batch_size, collate_fn=rows.collate)


class Plain(LightningModule):
    """`self.model(**batch).loss`, an optimizer over all parameters."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.model = tiny.tiny_model("llama")
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test_loss", self.model(**batch).loss)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.model(**batch).logits

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class OwnLoss(Plain):
    """Own cross-entropy on the returned logits; the task ids stay in the batch."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert logits.shape[:2] == batch["input_ids"].shape
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class BuiltLate(Plain):
    """The base is built in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny.tiny_model("llama")


class BuiltInSetup(BuiltLate):
    """The base is built in `setup`."""

    def configure_model(self) -> None:
        assert self.model is not None

    def setup(self, stage: str) -> None:
        if self.model is None:
            self.model = tiny.tiny_model("llama")


class OverTrainable(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=self.learning_rate)


class OverTrainableOfTheModel(Plain):
    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(
                [p for p in self.model.parameters() if p.requires_grad], lr=self.learning_rate, momentum=0.9
            )
        ]


class OverTheModel(Plain):
    def configure_optimizers(self) -> Any:
        return {"optimizer": torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.1)}


class BuiltBefore(Plain):
    """The optimizer is made in `__init__`, before there is any prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)

    def configure_optimizers(self) -> Any:
        return self.optimizer


class GroupsWithScheduler(Plain):
    """Two groups by weight decay, and a scheduler with one factor a group."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(tiny.VOCABULARY, 1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        out = self.model(**batch)
        return out.loss + self.head(out.logits).square().mean()

    def configure_optimizers(self) -> Any:
        decayed = [p for n, p in self.named_parameters() if "norm" not in n and not n.startswith("head")]
        others = [p for n, p in self.named_parameters() if "norm" in n or n.startswith("head")]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            lr=self.learning_rate,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1.0])
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


EVERY_MODULE = [
    Plain,
    OwnLoss,
    BuiltLate,
    BuiltInSetup,
    OverTrainable,
    OverTrainableOfTheModel,
    OverTheModel,
    BuiltBefore,
    GroupsWithScheduler,
]


def trainer(folder: Any, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = dict(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=1,
    )
    return Trainer(**{**defaults, **options}, callbacks=list(callbacks))


def snapshot(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def base_state(seed: int = 0) -> dict[str, Tensor]:
    """What the base of every module here holds before training."""
    return copy.deepcopy(tiny.tiny_model("llama", seed).state_dict())
