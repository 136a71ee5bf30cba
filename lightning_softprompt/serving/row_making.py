"""What a client asks, as rows for the engine: through the template of its task, within what a row may have."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.inference.requests import Request
from lightning_softprompt.serving.growing_text import GrowingText
from lightning_softprompt.serving.requests import AnswerRequest
from lightning_softprompt.serving.rows import LabelRow, Part, Row, TextRow
from lightning_softprompt.serving.sampling import Sampler
from lightning_softprompt.serving.tasks import ServedTasks

_LOWEST_TEMPERATURE = 1e-5  # below, the likeliest token is the only one left


@dataclass(frozen=True)
class RowMaker:
    """Makes rows of what clients ask.

    Attributes:
        tokenizer: the model's tokenizer.
        end_tokens: the tokens that end an answer.
        most_tokens: of a row, its prompt, its text and its answer.
        most_rows: of a request.
        max_new_tokens: the most tokens of an answer where the client leaves that open, and there is room for them.
    """

    tokenizer: Any
    end_tokens: frozenset[int]
    most_tokens: int
    most_rows: int
    max_new_tokens: int

    def rows(self, asked: AnswerRequest, tasks: ServedTasks, deliver: Callable[[int, Part], None]) -> list[Row]:
        """The rows that a request asks for: `n` for each of its inputs.

        Args:
            asked: the request, whose model is served.
            tasks: those that are served. All rows belong to this state of them.
            deliver: takes the parts of the answers, each with the index of its row.

        Raises:
            SoftPromptError: what cannot be answered.
        """
        inputs, times = asked.inputs(tasks, self.tokenizer), asked.n or 1
        if len(inputs) * times > self.most_rows:
            raise SoftPromptError(
                f"this asks for {len(inputs) * times} answers at once, and the server takes {self.most_rows}; ask for "
                "fewer"
            )
        # Equal texts and seeds are answered alike, wherever they stand in a request.
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        made: list[Row] = []
        for given in inputs:
            request = self._request(asked, tasks, given)
            for number in range(times):
                tell = partial(deliver, len(made))
                if request.labels:
                    made.append(self._label_row(asked, tasks, request, tell))
                else:
                    made.append(self._text_row(asked, tasks, request, f"{seed}:{number}", tell))
        return made

    def _request(self, asked: AnswerRequest, tasks: ServedTasks, given: Any) -> Request:
        task = None if asked.model == tasks.base else asked.model
        request = tasks.reader.to_answer(0, given, task, asked.most_new_tokens or 1, asked.argument_of_most)
        if request.length > self.most_tokens:
            raise SoftPromptError(
                f"prompt, text and answer take {request.length} tokens, and this server takes {self.most_tokens}; "
                f"{request.mend}"
            )
        return request

    def _label_row(
        self, asked: AnswerRequest, tasks: ServedTasks, request: Request, tell: Callable[[Part], None]
    ) -> Row:
        template = tasks.reader.template(request.task)
        assert template is not None and template.labels is not None
        labels = [label.strip() for label in template.labels]
        return LabelRow(request, tasks.prompts, tell, labels=labels, tells_all=asked.alternatives is not None)

    def _text_row(
        self, asked: AnswerRequest, tasks: ServedTasks, request: Request, seed: str, tell: Callable[[Part], None]
    ) -> Row:
        max_tokens = asked.most_new_tokens
        if max_tokens is None:
            max_tokens = min(self.max_new_tokens, self.most_tokens - request.length + 1)
            request = replace(request, length=request.length - 1 + max_tokens)
        temperature = 1.0 if asked.temperature is None else asked.temperature
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        sampler = Sampler(
            temperature if temperature >= _LOWEST_TEMPERATURE else 0.0,
            1.0 if asked.top_p is None else asked.top_p,
            seed,
            asked.alternatives,
            asked.min_tokens or 0,
            self.end_tokens,
        )
        growing = GrowingText(self.tokenizer, stop, strips=tasks.reader.template(request.task) is not None)
        return TextRow(
            request,
            tasks.prompts,
            tell,
            sampler=sampler,
            max_tokens=max_tokens,
            growing=growing,
            tokenizer=self.tokenizer,
            streams=bool(asked.stream),
        )
