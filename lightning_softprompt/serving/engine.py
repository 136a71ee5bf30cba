"""The engine: one thread that owns the model, and a queue in front of it.

Between any two steps rows join the batch, in the order in which they came, and leave it when they have ended or nobody
waits for them any more. Rows that are answered with a label need one pass alone.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_softprompt.attachment.attach import attach, attachment_of, detach
from lightning_softprompt.base.embedding import vocabulary_size
from lightning_softprompt.base.packed_linear import pack_linear_layers
from lightning_softprompt.base.padding import pad_token_id
from lightning_softprompt.base.support import check_model
from lightning_softprompt.base.traits import ModelTraits
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.ranking import RankedRow, classify_labels
from lightning_softprompt.inference.requests import most_tokens
from lightning_softprompt.inference.writing import Writer
from lightning_softprompt.serving.admission import Admission, Limits, in_passes
from lightning_softprompt.serving.batch import Batch
from lightning_softprompt.serving.rows import LabelRow, Row
from lightning_softprompt.serving.whole_batch import WholeBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_softprompt.prompts.soft_prompts import SoftPrompts

logger = logging.getLogger("lightning_softprompt")

STOPPED = "the server is stopping; ask again when it is back"


class Engine:
    """Answers rows of many tasks as they come. Its thread owns the model: nothing else may call it.

    Args:
        model: a causal LM, with or without prompts attached. Those that a row belongs to are attached when it is read.
        tokenizer: the model's tokenizer.
        limits: on rows and tokens at once; None stands for the defaults.

    Attributes:
        limits: on rows and tokens at once.
        steps: the number of steps so far, each a pass of the model.
        obstacle: why rows are answered in whole batches, one after the other; None where they join and leave.
        longest: the most tokens of a row: of its prompt, its text and its answer.
        attaching: held while prompts are attached, which changes the modules of the model. Who walks through them in
            another thread holds it, too.
        end_tokens: the tokens that end an answer: the tokenizer's, and those of the model's generation config.

    Raises:
        SoftPromptError: a model that cannot take soft prompts.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, limits: Limits | None = None) -> None:
        check_model(model)
        pack_linear_layers(model)
        self.steps = 0
        self._model = model
        self._pad = pad_token_id(tokenizer, vocabulary_size(model))
        traits = ModelTraits.of(model)
        self.obstacle = traits.obstacle
        self._batch: Batch | WholeBatch = (Batch if self.obstacle is None else WholeBatch)(model, self._pad)
        self.limits = limits = limits or Limits()
        # Beyond its longest rotation, what a row is depends on the rows beside it.
        most = (most_tokens(model), traits.longest_rotation, limits.max_batch_tokens)
        self.longest = min(each for each in most if each is not None)
        self.end_tokens = frozenset(Writer(model, tokenizer, 1, {}).end_tokens)
        self.attaching = threading.Lock()
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._ends_at = math.inf
        self._thread = threading.Thread(target=self._run, name="soft-prompt-engine", daemon=True)

    @property
    def running(self) -> int:
        """The number of rows under way."""
        return len(self._batch.rows)

    @property
    def waiting(self) -> int:
        """The number of rows that wait for their turn."""
        with self._changed:
            return sum(not row.is_done for row in self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether rows are answered, and new ones are taken."""
        return self._thread.is_alive() and self._ends_at == math.inf

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> bool:
        """Put rows into the queue, all or none.

        Returns:
            Whether there was room for them.
        """
        with self._changed:
            if not self.is_alive:
                for row in rows:
                    row.fail(STOPPED, 503)
                return True
            if self.waiting + len(rows) > self.limits.max_queue:
                return False
            self._waiting.extend(rows)
            self._changed.notify()
        return True

    def stop(self, patience: float = 0.0) -> None:
        """Take no more rows, and end when those that are here are answered, or after `patience` seconds.

        It returns at once; `join` waits. Rows that are not answered by then end with a failure.
        """
        with self._changed:
            self._ends_at = min(self._ends_at, time.monotonic() + patience)
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, at most `timeout` seconds."""
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while self._has_work():
                with self._changed:
                    admission = Admission(self.limits, self._batch.rows, self._waiting)
                for labels in in_passes(admission.labels, self._model.device.type):
                    self._alone_if_need_be(labels, self._classify)
                for texts in self._batch.passes(admission.texts):
                    self._alone_if_need_be(texts, self._batch.join)
                if self._batch.rows:
                    self._step()
        finally:
            self.stop()
            with self._changed:
                left = [*self._batch.rows, *self._waiting]
                self._waiting.clear()
            self._batch.clear()
            for row in left:
                row.fail(STOPPED, 503)

    def _has_work(self) -> bool:
        """Wait for rows. False when the thread has to end."""
        with self._changed:
            while not (self._waiting or self._batch.rows or self._ends_at < math.inf):
                self._changed.wait()
            return bool(self._waiting or self._batch.rows) and time.monotonic() < self._ends_at

    def _classify(self, rows: Sequence[LabelRow]) -> None:
        ranked = [RankedRow(row.request.ids, row.request.task, row.request.labels) for row in rows]
        for row, found in zip(rows, classify_labels(self._model, ranked, self._pad), strict=True):
            row.answer(found)

    def _alone_if_need_be(self, rows: Sequence[Any], run: Callable[[Any], None]) -> None:
        """Run rows together. Where that fails, run each alone, so that one of them fails no other."""
        self.steps += 1
        try:
            self._use(rows[0].prompts)
            run(rows)
        except Exception as error:
            pending = [row for row in rows if not row.is_done and row.first_at is None]
            if len(pending) == len(rows) == 1:
                _failed(rows, error)
                return
            _failed([row for row in rows if row.first_at is not None], error)
            for row in pending:
                self._alone_if_need_be([row], run)

    def _step(self) -> None:
        rows = self._batch.rows
        self.steps += 1
        try:
            self._batch.step()
        except Exception as error:
            self._batch.clear()
            _failed(rows, error)

    def _use(self, prompts: SoftPrompts) -> None:
        """Attach the prompts that the next rows belong to. Rows under way have theirs in the cache already."""
        attached = attachment_of(self._model)
        if attached is not None and attached.prompts is prompts:
            return
        with self.attaching:
            if attached is not None:
                detach(self._model)
            attach(self._model, prompts)


def _failed(rows: Sequence[Row], error: Exception) -> None:
    if not rows:
        return
    logger.error("%d rows failed", len(rows), exc_info=error)
    for row in rows:
        if isinstance(error, SoftPromptError):
            row.fail(str(error), 400)
        else:
            row.fail("the model failed at this request; the server's log says why", 500)
