"""What a client is answered: OpenAI's own types, whole or in the chunks of a stream, and errors of OpenAI's shape."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import Response
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion import ChoiceLogprobs as ChatLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from lightning_softprompt.serving.requests import AnswerRequest
from lightning_softprompt.serving.rows import Part, Row, Token

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "queue_full"}
DONE = "data: [DONE]\n\n"


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = _CODES.get(status) if status != 404 or param == "model" else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """The response for a request that is not answered."""
    # In ASCII: what a client sent and is told again may hold half of a surrogate pair, which has no place in UTF-8.
    return Response(json.dumps(error_body(status, message, param)), status, headers, "application/json")


def event(content: str) -> str:
    """An event of a stream."""
    return f"data: {content}\n\n"


class Reply:
    """Writes the answer to one request.

    Args:
        request: what was asked.
        rows: what is being answered.

    Example:
        >>> from lightning_softprompt.serving.requests import CompletionRequest
        >>> reply = Reply(CompletionRequest(model="tone", prompt="film"), [])
        >>> chunk = json.loads(reply.chunk(0, Part("good", finish_reason="stop")))
        >>> chunk["object"], chunk["model"], chunk["choices"][0]["text"]
        ('text_completion', 'tone', 'good')
    """

    def __init__(self, request: AnswerRequest, rows: Sequence[Row]) -> None:
        self._request = request
        self._rows = rows
        self._common: dict[str, Any] = {
            "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }

    @property
    def usage(self) -> CompletionUsage:
        """The tokens so far. Inputs are counted once, however often they are answered."""
        prompts = sum(row.prompt_tokens for row in self._rows[:: self._request.n or 1])
        answers = sum(row.completion_tokens for row in self._rows)
        return CompletionUsage(prompt_tokens=prompts, completion_tokens=answers, total_tokens=prompts + answers)

    def whole(self, answers: Sequence[Part]) -> str:
        """The response that holds all answers; each is one part, in the order of the rows."""
        if self._request.is_chat:
            choices = [
                Choice(
                    index=index,
                    finish_reason=part.finish_reason or "stop",
                    logprobs=None if self._tells_nothing else ChatLogprobs(content=_content(part.tokens)),
                    message=ChatCompletionMessage(role="assistant", content=part.text),
                )
                for index, part in enumerate(answers)
            ]
            return _json(ChatCompletion(object="chat.completion", choices=choices, usage=self.usage, **self._common))
        texts = [self._completion(index, part) for index, part in enumerate(answers)]
        return _json(Completion(object="text_completion", choices=texts, usage=self.usage, **self._common))

    def first_chunks(self) -> list[str]:
        """What a stream begins with: in a chat, who speaks."""
        if not self._request.is_chat:
            return []
        delta = ChoiceDelta(role="assistant", content="")
        return [self._chat_chunk([ChunkChoice(index=index, delta=delta)]) for index in range(len(self._rows))]

    def chunk(self, index: int, part: Part) -> str:
        """One part of the answer to the row at an index."""
        if not self._request.is_chat:
            content = Completion(object="text_completion", choices=[self._completion(index, part)], **self._common)
            return _json(content)
        told = None if self._tells_nothing else ChunkLogprobs(content=_content(part.tokens))
        delta = ChoiceDelta(content=part.text) if part.text or part.tokens else ChoiceDelta()
        choice = ChunkChoice(index=index, delta=delta, finish_reason=part.finish_reason, logprobs=told)
        return self._chat_chunk([choice])

    def usage_chunk(self) -> str:
        """What a stream ends with where the client asks for the numbers of tokens."""
        if self._request.is_chat:
            return self._chat_chunk([], usage=self.usage)
        return _json(Completion(object="text_completion", choices=[], usage=self.usage, **self._common))

    @property
    def _tells_nothing(self) -> bool:
        return self._request.alternatives is None

    def _completion(self, index: int, part: Part) -> CompletionChoice:
        told = None if self._tells_nothing else _logprobs(part.tokens)
        # OpenAI's type knows no choice that goes on, and its streams have them.
        return CompletionChoice.construct(index=index, text=part.text, finish_reason=part.finish_reason, logprobs=told)

    def _chat_chunk(self, choices: list[ChunkChoice], usage: CompletionUsage | None = None) -> str:
        found = ChatCompletionChunk(object="chat.completion.chunk", choices=choices, **self._common)
        return _json(found if usage is None else found.model_copy(update={"usage": usage}))


def _json(content: Any) -> str:
    # Fields that were set, null included: clients read `finish_reason` and `logprobs` where they are null, too.
    return json.dumps(content.model_dump(exclude_unset=True, warnings=False), ensure_ascii=False)


def _logprobs(tokens: Sequence[Token]) -> Logprobs:
    return Logprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_best(token.likeliest) for token in tokens],
        text_offset=[max(0, token.begins_at) for token in tokens],  # the first one's space is not of the text
    )


def _best(likeliest: Sequence[tuple[str, float]]) -> dict[str, float]:
    """By text; of tokens of equal text, which come in the order of their likelihood, the likeliest one counts."""
    return dict(reversed(likeliest))


def _content(tokens: Sequence[Token]) -> list[ChatCompletionTokenLogprob]:
    return [
        ChatCompletionTokenLogprob(
            token=token.text,
            logprob=token.logprob,
            bytes=list(token.text.encode()),
            top_logprobs=[
                TopLogprob(token=text, logprob=logprob, bytes=list(text.encode())) for text, logprob in token.likeliest
            ],
        )
        for token in tokens
    ]
