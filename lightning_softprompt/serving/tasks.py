"""The tasks that are served, read again when the files of their prompts change. A request belongs to one state."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.requests import RequestReader
from lightning_softprompt.prompts.hub import find_folder
from lightning_softprompt.prompts.index import INDEX_NAME
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("lightning_softprompt")


@dataclass(frozen=True)
class ServedTasks:
    """One state of the prompts, and all that belongs to it.

    Attributes:
        base: the name under which the model without a prompt is served.
        prompts: of the tasks.
        reader: turns rows into requests, by the templates of the tasks.
        created: when the files were written, in seconds since 1970.
    """

    base: str
    prompts: SoftPrompts
    reader: RequestReader
    created: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the models: the base, then the tasks."""
        return self.base, *self.prompts.tasks


class TaskFolder:
    """The tasks in a folder of prompts, as it is now.

    Args:
        model: the base model; its device and its dtype are those in which it serves.
        tokenizer: the model's tokenizer.
        source: a folder of prompts, a checkpoint of a run, or an id on the hub.
        base: the name under which the model without a prompt is served.
        raw: whether texts are taken as they are, and no template is used.

    Attributes:
        current: the state that new requests get.
        error: why the files as they are now cannot be served; None where they are.

    Raises:
        SoftPromptError: prompts that cannot be read, do not fit the model, or have a task of the base's name.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, source: str | Path, base: str, raw: bool = False
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._path = find_folder(source)
        self._base = base
        self._raw = raw
        self.error: str | None = None
        self._stamp = self._stamp_now()
        self.current = self._read()

    def refresh(self) -> bool:
        """Read the files again if they have changed, or could not be served. What is served stays as it was then.

        They are held against the model, so nobody may attach prompts to it meanwhile.

        Returns:
            Whether there is a new state.
        """
        stamp = self._stamp_now()
        # What could not be read is tried again: where a folder is copied, its tensors may come after their index.
        if stamp == self._stamp and self.error is None:
            return False
        self._stamp = stamp  # that of before the reading: what is written meanwhile is found the next time
        try:
            self.current = self._read()
        except Exception as error:  # whatever the files hold by now, what is served goes on
            if self.error != str(error):
                logger.warning("the prompts have changed and cannot be served, so the earlier ones are: %s", error)
            self.error = str(error)
            return False
        self.error = None
        logger.info("the prompts have changed; serving %s", ", ".join(self.current.names))
        return True

    def _read(self) -> ServedTasks:
        prompts = SoftPrompts.from_pretrained(self._path)
        prompts.requires_grad_(False)
        prompts.check_fits(self._model)
        if self._base in prompts:
            raise SoftPromptError(
                f"{self._path} has a task {self._base!r}, and the base has this name, too; give the base another one "
                "(--name)"
            )
        templates = {} if self._raw else prompts.templates
        reader = RequestReader(self._model, self._tokenizer, prompts, templates)
        return ServedTasks(self._base, prompts, reader, int(self._stamp[0] // 10**9))

    def _stamp_now(self) -> tuple[int, int, int]:
        """What tells whether the files are others: a save replaces the index last of all."""
        try:
            found = os.stat(self._path / INDEX_NAME if self._path.is_dir() else self._path)
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_size, found.st_ino
