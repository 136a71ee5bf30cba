"""What is set by environment variables, as vLLM's own plugins are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from softprompt_vllm.errors import SoftPromptError


@dataclass(frozen=True)
class Settings:
    """The plugin's settings.

    Attributes:
        folder: `SOFTPROMPT_FOLDER`, a folder of saved prompts or of an export; None means that the served model is one.
        raw: `SOFTPROMPT_RAW=1`, whether completions take texts as they are, without their task's template.
    """

    folder: Path | None
    raw: bool

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read them.

        Raises:
            SoftPromptError: `SOFTPROMPT_RAW` that is neither 0 nor 1.

        Example:
            >>> Settings.of_environment({"SOFTPROMPT_RAW": "1"})
            Settings(folder=None, raw=True)
        """
        raw = environment.get("SOFTPROMPT_RAW") or "0"
        if raw not in ("0", "1"):
            raise SoftPromptError(f"SOFTPROMPT_RAW must be 0 or 1, found {raw!r}")
        folder = environment.get("SOFTPROMPT_FOLDER")
        return cls(Path(folder) if folder else None, raw == "1")
