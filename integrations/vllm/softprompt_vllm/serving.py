"""Tasks on vLLM's server: where the plugin touches it.

1. `state.openai_serving_models.lora_requests[task]`: the list of models, the check of names and the name in answers.
2. `engine_client.generate`: every route ends here; a task's prompt goes in front of the request's token ids.
3. `state.online_renderer.render_completion`: a completion's text goes into its task's template.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from vllm.inputs.engine import embeds_input, tokens_input
from vllm.lora.request import LoRARequest

from softprompt_vllm.errors import SoftPromptError
from softprompt_vllm.model_files import served_model
from softprompt_vllm.settings import Settings
from softprompt_vllm.task_folder import TaskFolder
from softprompt_vllm.tasks import Task, mixed_input

logger = logging.getLogger("vllm.softprompt")

# Seconds between two looks at the folder; a look is one call of stat.
INTERVAL = 1.0
# Never seen by the engine. Far from the numbers that vLLM gives to adapters.
_FIRST_NUMBER = 1_000_000


class TaskRequest(LoRARequest):
    """A task where vLLM expects an adapter. A request keeps the one that it got, so a reload changes none midway."""

    task: Any = None


class Serving:
    """Serves the tasks of a folder on vLLM's own routes, and reads the folder anew when it changes.

    Args:
        engine_client: vLLM's `EngineClient`.
        state: the state of the server's app.
        settings: the plugin's settings.

    Raises:
        SoftPromptError: a folder that cannot be served with this model; nothing of the server was changed.
    """

    def __init__(self, engine_client: Any, state: Any, settings: Settings) -> None:
        config = engine_client.model_config
        model = served_model(config)
        self._folder = TaskFolder(settings.folder, model)
        self._models = state.openai_serving_models
        self._vocabulary, self._longest = model.vocabulary, config.max_model_len
        # A copy, as vLLM's threads use the renderer's, and a tokenizer is not made for two at once.
        self._tokenizer = copy.deepcopy(engine_client.renderer.tokenizer)
        self._raw = settings.raw
        self._publish(self._folder.read())
        # From here on clients cannot send tensors (CVE-2025-62164). The engine, another process, has its own copy.
        config.enable_prompt_embeds = False
        self._generate, engine_client.generate = engine_client.generate, self.generate
        renderer = state.online_renderer
        self._render, renderer.render_completion = renderer.render_completion, self.render_completion
        self._watcher = None if self._folder.is_export else asyncio.create_task(self._watch())

    def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        **options: Any,
    ) -> AsyncGenerator[Any, None]:
        """`EngineClient.generate` of vLLM, with the prompt of the task in front. It raises at once, before any answer.

        Raises:
            SoftPromptError: ids that the model does not have, or what a task cannot serve; vLLM answers 400.
        """
        if isinstance(prompt, dict) and prompt.get("type") == "token":
            self._check_ids(prompt["prompt_token_ids"])
        if isinstance(lora_request, TaskRequest):
            prompt, lora_request = self._with_prompt(lora_request.task, prompt, sampling_params), None
        return self._generate(prompt, sampling_params, request_id, lora_request=lora_request, **options)

    async def render_completion(self, request: Any, **options: Any) -> Any:
        """`OnlineRenderer.render_completion` of vLLM, with texts in the template of the task that is asked for.

        Raises:
            SoftPromptError: a text that the template cannot take; vLLM answers 400.
        """
        while True:
            task = self._task(request.model)
            rendered = await self._render(self._with_template(request, task), **options)
            if self._task(request.model) is task:  # else template and prompt would be of two saves
                return rendered

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Refuse ids that the embedding does not have: looking one up would end the engine.

        vLLM checks no ids of requests with embeddings. And `--enable-prompt-embeds` adds a token to the tokenizer,
        `<prompt_embeds>`, whose id the model need not have, so any client could write it.
        """
        wrong = next((each for each in ids if not 0 <= each < self._vocabulary), None)
        if wrong is not None:
            raise SoftPromptError(f"the model has token ids from 0 to {self._vocabulary - 1}, found {wrong}")

    def _with_prompt(self, task: Task, prompt: Any, params: Any) -> Any:
        """What the engine gets for `prompt`, a request's token ids."""
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            raise SoftPromptError(f"the task {task.name!r} takes text or token ids alone")
        if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
            raise SoftPromptError(
                f"the task {task.name!r} has no prompt_logprobs, as virtual tokens have none; leave out "
                "prompt_logprobs, or echo with logprobs"
            )
        ids = prompt["prompt_token_ids"]
        if task.length + len(ids) >= self._longest:
            raise SoftPromptError(
                f"the text has {len(ids)} tokens and the prompt of {task.name!r} has {task.length}; together with one "
                f"new token at most {self._longest} are served; shorten the text, or raise --max-model-len"
            )
        kept = {key: prompt[key] for key in ("prompt", "cache_salt") if key in prompt}
        if isinstance(task.prompt, tuple):
            return tokens_input([*task.prompt, *ids], **kept)
        made = mixed_input(task.prompt, ids)
        return embeds_input(made.embeds, prompt_token_ids=made.token_ids, is_token_ids=made.is_token_ids, **kept)

    def _task(self, name: str | None) -> Task | None:
        found = self._models.lora_requests.get(name)
        return found.task if isinstance(found, TaskRequest) else None

    def _with_template(self, request: Any, task: Task | None) -> Any:
        if task is None or task.template is None or self._raw:
            return request
        template, prompt = task.template, request.prompt
        if isinstance(prompt, str):
            return request.model_copy(update={"prompt": template.token_ids(self._tokenizer, prompt)})
        if isinstance(prompt, list) and prompt and all(isinstance(each, str) for each in prompt):
            ids = [template.token_ids(self._tokenizer, each) for each in prompt]
            return request.model_copy(update={"prompt": ids})
        return request  # token ids are the whole text

    def _publish(self, tasks: Mapping[str, Task]) -> None:
        """Make `tasks` the model names beside the base's and those of adapters, all at once."""
        requests = self._models.lora_requests
        others = {name for name, request in requests.items() if not isinstance(request, TaskRequest)}
        taken = next((name for name in tasks if name in others or self._models.is_base_model(name)), None)
        if taken is not None:
            raise SoftPromptError(
                f"the task {taken!r} has the name of a served model or adapter; rename it (rename-task), or give the "
                "base another name (--served-model-name)"
            )
        for name in requests.keys() - others:
            del requests[name]
        base = self._models.base_model_paths[0].name
        for place, task in enumerate(tasks.values()):
            requests[task.name] = TaskRequest(
                lora_name=task.name,
                lora_int_id=_FIRST_NUMBER + place,
                lora_path=str(self._folder.path),
                base_model_name=base,
                task=task,
            )
        logger.info("softprompt: serving %d tasks of %s", len(tasks), self._folder.path)

    async def _watch(self) -> None:
        """Serve what the folder holds, from a second after it changed. What cannot be served leaves all as it was."""
        told = ""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                if await asyncio.to_thread(self._folder.has_changed):
                    self._publish(await asyncio.to_thread(self._folder.read))
                    told = ""
            except Exception as error:  # a watcher that ended would serve old prompts for ever, without a word
                if str(error) != told:
                    logger.error("softprompt: still serving the tasks of before: %s", error)
                told = str(error)
