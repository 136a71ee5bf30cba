"""What vLLM loads: the endpoint plugin `softprompt`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.settings import Settings
from softprompt_vllm.versions import check_version

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI


class SoftPromptPlugin:
    """An endpoint plugin of vLLM (entry point `vllm.endpoint_plugins`), which makes each task a model name.

    vLLM loads it where `VLLM_PLUGINS` names it (`VLLM_PLUGINS=softprompt`). It adds no routes: tasks are asked for on
    vLLM's own.
    """

    name = "softprompt"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add nothing; a part of vLLM's protocol."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Read the tasks and serve them from now on. vLLM calls it once in each of its API processes.

        Args:
            engine_client: vLLM's `EngineClient`.
            state: the state of the server's app.
            args: the server's arguments, unused.

        Raises:
            SystemExit: a version of vLLM, a folder or a base that does not fit, in one line; the server ends.
        """
        try:
            import vllm

            check_version(vllm.__version__)
            from softprompt_vllm.serving import Serving

            state.soft_prompts = Serving(engine_client, state, Settings.of_environment())
        except SoftPromptError as error:
            raise SystemExit(f"softprompt: {error}") from error
