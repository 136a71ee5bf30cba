"""Bodies of requests: read up to a limit, and parsed; what is wrong with one is said in a line."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

Asked = TypeVar("Asked", bound=BaseModel)

SLOWEST = 60.0  # seconds that a body may take to come in
# What a client goes on to send is read and thrown away, up to so many bytes, as most read no answer before.
_PATIENCE = 2**28
# What is wrong with a request as a whole names the argument first.
_NAMED = re.compile(r"(?:there is no argument )?'(.*?)'")
_EXPECTED = {
    "prompt": "must be a text, an object with the columns of the task's template, a list of token ids, or a list of "
    "one of these",
    "stop": "must be a text that is not empty, or a list of at most 16",
}


async def read_body(request: Request, most_bytes: int) -> bytes | None:
    """The body of a request; None if it is larger than `most_bytes`, of which no more than that is ever kept."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most_bytes:
            chunks.clear()
            if size > most_bytes + _PATIENCE:
                break
        else:
            chunks.append(chunk)
    return None if size > most_bytes else b"".join(chunks)


def parse_body(body: bytes, kind: type[Asked]) -> Asked | tuple[str, str | None]:
    """A body as what it asks, or what is wrong with it and with which argument.

    Example:
        >>> from lightning_softprompt.serving.requests import CompletionRequest
        >>> parse_body(b'{"model": "tone", "prompt": "film", "n": 0}', CompletionRequest)
        ("'n': Input should be greater than or equal to 1", 'n')
    """
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        return f"the body is not JSON ({error}); send a JSON object", None
    if not isinstance(content, dict):
        return "the body must be a JSON object", None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        return _said(error)


def _said(error: ValidationError) -> tuple[str, str | None]:
    first = error.errors(include_url=False, include_input=False)[0]
    if not first["loc"]:
        said = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        named = _NAMED.match(said)
        return said, named and named[1]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return f"the argument {'.'.join(map(str, first['loc']))!r} is missing", name
    if name in _EXPECTED:
        return f"{name!r} {_EXPECTED[name]}", name
    return f"{'.'.join(map(str, first['loc']))!r}: {first['msg']}", name
