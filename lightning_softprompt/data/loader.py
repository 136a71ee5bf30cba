"""A loader whose position in an epoch is saved in checkpoints, so that a run can resume in the middle of the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_softprompt.data.mixing import Mixing
from lightning_softprompt.errors import SoftPromptError


class ResumableLoader(DataLoader):
    """Batches of rows in the order of a `Mixing`. Lightning's checkpoints hold the position in the epoch.

    A run that resumes in the middle of an epoch continues with the next batch. It may have another number of workers,
    but must take the same number of rows in a step, on all ranks together. Any other epoch starts at its beginning.

    Raises:
        SoftPromptError: on iteration, a run that resumes in the middle of an epoch with another number of rows a step.
    """

    batch_size: int

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._epoch, self._batches, self._goes_on, self._saved_step = 0, 0, False, 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        mixing = self.sampler if isinstance(self.sampler, Mixing) else None  # overfit_batches replaces it
        epoch = mixing.epoch if mixing else 0
        goes_on = self._goes_on and self._epoch == epoch and mixing is not None
        step = self.batch_size * (mixing.num_replicas if mixing else 1)
        if goes_on and self._batches and self._saved_step != step:
            raise SoftPromptError(
                f"a run that was saved in the middle of an epoch, at {self._saved_step} rows a step, cannot go on "
                f"at {step}; use as many devices and the same batch_size, or a checkpoint of an epoch's end"
            )
        if not (goes_on and self._batches < len(self)):
            self._epoch, self._batches = epoch, 0
        self._goes_on, self._saved_step = False, step
        if mixing:
            mixing.skipped = self._batches * self.batch_size
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def go_on_behind(self, batches: int) -> None:
        """Begin behind that many batches. One more was handed out where an exception ended the run in its middle."""
        if self._goes_on and self._batches == batches + 1:
            self._batches = batches

    def state_dict(self) -> dict[str, int]:
        """The epoch, how many of its batches were handed out, and how many rows all ranks together take in a step."""
        return {"epoch": self._epoch, "batches": self._batches, "rows_a_step": self._saved_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take over a saved position; the next iteration continues from it if that is of the same epoch."""
        self._epoch, self._batches, self._goes_on = state_dict["epoch"], state_dict["batches"], True
        self._saved_step = state_dict["rows_a_step"]
