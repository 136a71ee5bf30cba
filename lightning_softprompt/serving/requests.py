"""What a client asks: OpenAI's arguments, checked one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lightning_softprompt.base.guarded_text import guarded, token_names
from lightning_softprompt.base.tokens import encode_turns
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.templates import columns_of
from lightning_softprompt.serving.tasks import ServedTasks

# Arguments of OpenAI's that are not served, each with the values that ask for nothing; so does null.
_ASK_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Arguments that say something to OpenAI, and change no answer.
_SAY_NOTHING = {"user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"}
_SAY_NOTHING |= {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
_MOST_LOGPROBS = 20
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]
_Id = Annotated[int, Field(ge=0)]
_Of = TypeVar("_Of")
# Its first wrong element is enough: to note each of a million takes half a minute and gigabytes.
_List = Annotated[list[_Of], Field(fail_fast=True)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool = False


class AnswerRequest(BaseModel):
    """What completions and chat completions have in common.

    `min_tokens` is no argument of OpenAI's: before so many tokens no answer ends. It goes into `extra_body` of
    OpenAI's client.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    is_chat: ClassVar[bool]

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_served(self) -> AnswerRequest:
        for name, value in (self.model_extra or {}).items():
            if value is None:  # asks for nothing, whatever it is
                continue
            nothing = _ASK_FOR_NOTHING.get(name)
            if nothing is not None and value not in nothing:
                raise SoftPromptError(f"{name!r} is not served here; leave it out")
            if nothing is None and name not in _SAY_NOTHING:
                raise SoftPromptError(f"there is no argument {name!r}; leave it out, or check its name")
        return self

    @property
    def most_new_tokens(self) -> int | None:
        """The most tokens of an answer; None where the client leaves that open."""
        return self.max_tokens

    @property
    def argument_of_most(self) -> str:
        """The argument that says so; empty where none does."""
        return "" if self.max_tokens is None else "max_tokens"

    @property
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens are told with their log-probabilities; None where nothing is told."""
        raise NotImplementedError

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def inputs(self, tasks: ServedTasks, tokenizer: Any) -> list[Any]:
        """The inputs, each to be answered `n` times: texts, columns, or token ids that no template is put around."""
        raise NotImplementedError


class CompletionRequest(AnswerRequest):
    """What `POST /v1/completions` is given. A prompt is a text, the columns of a template, or token ids, or a list."""

    is_chat: ClassVar[bool] = False
    prompt: str | dict[str, Any] | _List[_Id] | _List[str] | _List[dict[str, Any]] | _List[_List[_Id]]
    logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None

    @property
    def alternatives(self) -> int | None:
        """As in `AnswerRequest`."""
        return self.logprobs

    def inputs(self, tasks: ServedTasks, tokenizer: Any) -> list[Any]:
        """As in `AnswerRequest`."""
        if isinstance(self.prompt, list) and not self.prompt:
            raise SoftPromptError("'prompt' is an empty list; give it at least one text")
        is_one = not isinstance(self.prompt, list) or isinstance(self.prompt[0], int)
        inputs = [self.prompt] if is_one else [*self.prompt]
        if tasks.reader.template(self.model) is not None:
            _check_not_empty("prompt", (given for given in inputs if isinstance(given, str)))
        return inputs


class _ContentPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: str
    content: str | _List[_ContentPart]

    def turn(self) -> dict[str, str]:
        """The turn as chat templates have it.

        Raises:
            SoftPromptError: a role or a content that a causal LM of texts does not know.
        """
        role = "system" if self.role == "developer" else self.role
        if role not in ("system", "user", "assistant"):
            raise SoftPromptError(f"a message has the role {self.role!r}; roles are system, user and assistant")
        parts = self.content
        if isinstance(parts, str):
            return {"role": role, "content": parts}
        for part in parts:
            if part.type != "text" or part.text is None:
                raise SoftPromptError(f"a message has content of the type {part.type!r}; give texts alone")
        return {"role": role, "content": "".join(part.text or "" for part in parts)}


class ChatRequest(AnswerRequest):
    """What `POST /v1/chat/completions` is given."""

    is_chat: ClassVar[bool] = True
    messages: Annotated[_List[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _refuse_what_would_not_be_told(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise SoftPromptError("'top_logprobs' are told with 'logprobs' alone; set 'logprobs' to true")
        return self

    @property
    def most_new_tokens(self) -> int | None:
        """As in `AnswerRequest`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def argument_of_most(self) -> str:
        """As in `AnswerRequest`."""
        return "max_completion_tokens" if self.max_completion_tokens else super().argument_of_most

    @property
    def alternatives(self) -> int | None:
        """As in `AnswerRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def inputs(self, tasks: ServedTasks, tokenizer: Any) -> list[Any]:
        """As in `AnswerRequest`. What the user says is put into the task's template, where the task has one."""
        turns = [message.turn() for message in self.messages]
        encoding = tasks.reader.encoding(self.model)
        if encoding is None:
            names = token_names(tokenizer)
            return [encode_turns(tokenizer, [_guarded(turn, names) for turn in turns], names)]
        _check_not_empty("message", (turn["content"] for turn in turns if turn["role"] == "user"))
        template = encoding.template
        if not template.chat:
            if len(turns) != 1 or turns[0]["role"] != "user":
                raise SoftPromptError(
                    f"the task {self.model!r} was trained on single texts, and answers one message of a user; found "
                    f"the roles {[turn['role'] for turn in turns]}"
                )
            return [turns[0]["content"]]
        columns = [*dict.fromkeys(columns_of(template.text))]
        if len(columns) != 1:
            raise SoftPromptError(
                f"a message fills a template of one column, and {template.text!r} has {len(columns)}; ask "
                "/v1/completions with the columns as the prompt"
            )
        said = [
            {**turn, "content": encoding.text_of({columns[0]: turn["content"]}, "the message")}
            if turn["role"] == "user"
            else _guarded(turn, encoding.names)
            for turn in turns
        ]
        if template.system is not None and turns[0]["role"] != "system":
            said.insert(0, {"role": "system", "content": template.system})
        return [encode_turns(tokenizer, said, encoding.names)]


def _check_not_empty(what: str, texts: Iterable[str]) -> None:
    if not all(text.strip() for text in texts):
        raise SoftPromptError(f"the {what} is empty; give it some words")


def _guarded(turn: Mapping[str, str], names: re.Pattern[str] | None) -> dict[str, str]:
    """A turn of a client, in which names of tokens stay text: no client ends a turn, or begins one of the system."""
    return {**turn, "content": guarded([(turn["content"], True)], names)}
