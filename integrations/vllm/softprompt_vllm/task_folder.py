"""Where the tasks come from: a folder of one of two kinds, and whether it has changed."""

from __future__ import annotations

import os
from pathlib import Path

from softprompt_vllm import saved_prompts, virtual_tokens
from softprompt_vllm.base_model import ServedModel
from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.tasks import Task


class TaskFolder:
    """The tasks of a folder, for a served model.

    Args:
        folder: a folder of saved prompts, or the served model's own folder, if that was exported with virtual tokens;
            None stands for the latter.
        model: the served model.

    Raises:
        SoftPromptError: a folder that is neither, or does not fit the model.
    """

    def __init__(self, folder: Path | None, model: ServedModel) -> None:
        found = folder if folder is not None else model.folder
        if found is None or not any((found / name).is_file() for name in _INDEXES):
            where = f"{folder} has" if folder is not None else "SOFTPROMPT_FOLDER is not set, and the served model has"
            raise SoftPromptError(
                f"{where} neither {saved_prompts.INDEX_NAME} nor {virtual_tokens.INDEX_NAME}; set SOFTPROMPT_FOLDER to "
                "a folder of saved prompts, or serve a folder that export-model wrote"
            )
        self.path = found
        self._model = model
        # The virtual tokens of an export are rows of the model that the engine has loaded, and change with it alone.
        self.is_export = not (found / saved_prompts.INDEX_NAME).is_file()
        self._stamp: tuple[int, int, int] | None = None

    def read(self) -> dict[str, Task]:
        """The tasks of the folder as it is now.

        Raises:
            SoftPromptError: a folder that is damaged, or of another model than the served one.
        """
        stamp = self._stamp_now()
        tasks = self._read_export() if self.is_export else self._read_prompts()
        self._stamp = stamp  # that of before: a save that came since is read next time
        return tasks

    def has_changed(self) -> bool:
        """Whether the folder was written since it was read last without an error."""
        return not self.is_export and self._stamp_now() != self._stamp

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self.path / (virtual_tokens.INDEX_NAME if self.is_export else saved_prompts.INDEX_NAME))
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read_export(self) -> dict[str, Task]:
        served = self._model.folder
        if served is None or self.path.resolve() != served.resolve():
            raise SoftPromptError(
                f"{self.path} is a model with virtual tokens, and the served model is {self._model.name}; serve the "
                "folder itself as the model"
            )
        return virtual_tokens.read_virtual_tokens(self.path, self._model.vocabulary)

    def _read_prompts(self) -> dict[str, Task]:
        if not self._model.takes_embeddings:
            raise SoftPromptError(
                f"the prompts of {self.path} go in as embeddings; start vLLM with --enable-prompt-embeds (the plugin "
                "keeps clients from sending tensors), or serve a folder that export-model wrote"
            )
        found = saved_prompts.read_saved_prompts(self.path, self._model.dtype)
        if found.hidden_size != self._model.hidden_size:
            raise SoftPromptError(
                f"the prompts of {self.path} have width {found.hidden_size}, {self._model.name} has "
                f"{self._model.hidden_size}; serve the model that they were trained for"
            )
        if found.base is not None:
            found.base.check(self._model)
        return found.tasks


_INDEXES = (saved_prompts.INDEX_NAME, virtual_tokens.INDEX_NAME)
