"""The command `serve`: trained prompts behind OpenAI's API."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning_softprompt.cli.loaded_base import loaded_base
from lightning_softprompt.cli.output import say
from lightning_softprompt.errors import SoftPromptError, check_at_least_one
from lightning_softprompt.prompts.characters import has_control
from lightning_softprompt.prompts.soft_prompts import SoftPrompts

_KEY = "LIGHTNING_SOFTPROMPT_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    base: str,
    prompts: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    raw: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    max_new_tokens: int = 256,
    max_rows: int = 64,
    max_batch_tokens: int = 16_384,
    max_queue: int = 256,
    max_body_bytes: int = 4_194_304,
    json: bool = False,
) -> None:
    """Serve trained prompts by OpenAI's API: each task is a model, and so is the base without a prompt.

    Rows of all tasks share one running batch, which they join and leave at each step. A task with a template is asked
    with bare text, and a classification answers its label. Prompts are read again when the folder changes. SIGTERM and
    Ctrl-C end the server within ten seconds.

    Args:
        base: hub id or path of the base model.
        prompts: folder of trained prompts, as `fit` leaves it, a checkpoint of a run, or an id on the hub.
        host: address to listen on; other machines reach 0.0.0.0.
        port: port to listen on; 0 takes any that is free.
        api_key: key that clients have to send; the environment variable LIGHTNING_SOFTPROMPT_API_KEY is not shown to
            other users of the machine.
        name: name of the base among the models; by default the last part of its id or path.
        raw: take texts as they are, without the templates of the tasks.
        device: device of the model, such as cuda:1; auto is a GPU where there is one.
        dtype: dtype of the model, such as bfloat16; auto is that of its files.
        max_new_tokens: most tokens of an answer where a request does not say.
        max_rows: most rows at once in the running batch.
        max_batch_tokens: most tokens of the running batch, prompts, texts and complete answers together; what fits the
            memory.
        max_queue: most rows that wait; what comes then is refused with the status 429.
        max_body_bytes: most bytes of a request.
        json: print where the server listens as JSON.
    """
    server = _import_server()
    from lightning_softprompt.serving.admission import Limits
    from lightning_softprompt.serving.api import Settings, make_app
    from lightning_softprompt.serving.engine import Engine
    from lightning_softprompt.serving.tasks import TaskFolder

    check_at_least_one(max_new_tokens=max_new_tokens, max_body_bytes=max_body_bytes)
    settings = Settings(_key(api_key), max_body_bytes, max_new_tokens)
    limits = Limits(max_rows, max_batch_tokens, max_queue)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    SoftPrompts.from_pretrained(prompts)  # what cannot be served is found before the model is loaded, too
    with server.bind(host, port) as socket:  # a port that is taken is found before the model is loaded
        model, tokenizer = loaded_base(base, device, dtype)
        folder = TaskFolder(model, tokenizer, prompts, name or Path(base).resolve().name, raw)
        engine = Engine(model, tokenizer, limits)
        app = make_app(engine, folder, tokenizer, settings)
        url = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}/v1"
        found = {"url": url, "models": list(folder.current.names), "whole_batches": engine.obstacle}
        if settings.api_key is None and host not in _LOOPBACK:
            logging.warning("whoever reaches %s may ask, as there is no api_key", url)

        def listens() -> None:
            say(found, json, f"serving {', '.join(folder.current.names)} at {url}", flush=True)

        server.Server(app, engine, listens).run(sockets=[socket])


def _key(given: str | None) -> str | None:
    """The key that clients have to send; None lets everybody in."""
    key = (os.environ.get(_KEY) or None) if given is None else given
    if key is not None and (not key or key != key.strip() or has_control(key)):
        raise SoftPromptError(
            "the api_key is empty, has space around it or holds control characters, so that no client can send it; "
            "give another one, or none, which lets everybody in"
        )
    return key


def _import_server() -> Any:
    try:
        from lightning_softprompt.serving import server
    except ImportError as error:
        raise SoftPromptError(
            f"a server needs packages that are not installed ({error}); pip install 'lightning-softprompt[serve]'"
        ) from error
    return server
