"""What the server answers is what the bare model answers, row by row, whatever runs beside it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import PREPARED, client_of
from server import Server

IDS = {"ignore_eos": True, "return_token_ids": True}


async def complete(
    server: Server, rows: list[dict[str, Any]], key: str = "ids", temperature: float = 0, n: int = 1, top_k: int = 0
) -> list[Any]:
    """All rows at once. `key` says whether they are sent as token ids or as texts."""
    async with client_of(server) as client:
        calls = [
            client.completions.create(
                model=row["task"] or "base",
                prompt=row[key],
                max_tokens=len(row["new"]),
                temperature=temperature,
                n=n,
                logprobs=1,
                extra_body=IDS | {"top_k": top_k},
            )
            for row in rows
        ]
        return await asyncio.gather(*calls)


def equal(answers: list[Any], rows: list[dict[str, Any]]) -> None:
    same = 0
    for one, row in zip(answers, rows, strict=True):
        same += sum(a == b for a, b in zip(one.choices[0].token_ids, row["new"], strict=True))
    count = sum(len(row["new"]) for row in rows)
    print(f"tokens equal to the bare model: {same} of {count}")
    assert same == count


def test_tokens_of_all_tasks_and_of_the_base_at_once(server: Server, expected: dict[str, Any]) -> None:
    rows = expected["first"] + expected["bare"]
    for key in ("ids", "text"):  # the second time prompts are in the cache
        answers = asyncio.run(complete(server, rows, key))
        equal(answers, rows)
        for one, row in zip(answers, rows, strict=True):
            assert one.model == (row["task"] or "base")
            assert one.choices[0].logprobs.token_logprobs[0] == pytest.approx(row["logprob"], abs=1e-3)
            assert one.usage.prompt_tokens == expected["lengths"].get(row["task"], 0) + len(row["ids"])


def test_whole_blocks_of_a_prompt_are_computed_once(server: Server, expected: dict[str, Any]) -> None:
    rows = expected["first"][: len(expected["lengths"]) - 3]
    answers = asyncio.run(complete(server, [row | {"ids": [17, *row["ids"]]} for row in rows]))
    cached = [one.usage.prompt_tokens_details.cached_tokens for one in answers]
    assert cached == [expected["lengths"][row["task"]] // 32 * 32 for row in rows]


def test_the_blocks_of_a_task_are_not_those_of_another(server: Server, expected: dict[str, Any]) -> None:
    """`pair` and `soft.c` have prompts of one length, so that the same ids stand in front of the same text."""
    text = {"new": [0], "ids": [901, 902, 903]}
    first, second, third = (
        asyncio.run(complete(server, [text | {"task": task}]))[0] for task in ("pair", "soft.c", "pair")
    )
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert third.choices[0].logprobs.token_logprobs == pytest.approx(first.choices[0].logprobs.token_logprobs, abs=1e-3)
    assert second.choices[0].logprobs.token_logprobs != pytest.approx(
        third.choices[0].logprobs.token_logprobs, abs=1e-3
    )


def test_texts_of_completions_go_into_the_template(server: Server, expected: dict[str, Any]) -> None:
    equal(asyncio.run(complete(server, expected["templated"], "text")), expected["templated"])


def test_a_task_that_was_trained_on_chats_takes_chats(server: Server, expected: dict[str, Any]) -> None:
    row = expected["templated"][1]

    async def ask() -> Any:
        async with client_of(server) as client:
            return await client.chat.completions.create(
                model="talk", messages=row["messages"], max_tokens=len(row["new"]), temperature=0, extra_body=IDS
            )

    answer = asyncio.run(ask())
    assert answer.choices[0].token_ids == row["new"] and answer.model == "talk"


def test_streams_and_choices(server: Server, expected: dict[str, Any]) -> None:
    rows = expected["first"][:8]

    async def stream(row: dict[str, Any]) -> str:
        async with client_of(server) as client:
            options = {"model": row["task"], "prompt": row["text"], "max_tokens": len(row["new"]), "temperature": 0}
            parts = await client.completions.create(stream=True, extra_body={"ignore_eos": True}, **options)
            return "".join([part.choices[0].text async for part in parts])

    async def streams() -> list[str]:
        return await asyncio.gather(*map(stream, rows))

    whole = asyncio.run(complete(server, rows, "text"))
    assert [one.choices[0].text for one in whole] == asyncio.run(streams())


def test_several_choices(server: Server, expected: dict[str, Any]) -> None:
    rows = expected["first"][:4]
    # Drawn from the likeliest token alone: vLLM takes n with a temperature only.
    answers = asyncio.run(complete(server, rows, "text", temperature=1, n=2, top_k=1))
    equal(answers, rows)
    assert all(one.choices[0].token_ids == one.choices[1].token_ids for one in answers)


def test_a_label_is_chosen_where_the_client_says_so(server: Server, expected: dict[str, Any]) -> None:
    async def ask() -> Any:
        async with client_of(server) as client:
            body = {"structured_outputs": {"choice": [" positive", " negative"]}}
            return await client.completions.create(model="review", prompt="so it is", extra_body=body)

    assert asyncio.run(ask()).choices[0].text in (" positive", " negative")


def test_an_export_answers_by_ids_and_without_embeddings(expected: dict[str, Any], tmp_path) -> None:
    server = Server(PREPARED / "export", tmp_path / "log", None).wait()
    try:
        rows = expected["first"] + expected["bare"]
        equal(asyncio.run(complete(server, rows, "text")), rows)
        answers = asyncio.run(complete(server, rows, "ids"))
        equal(answers, rows)
        first = answers[0].usage.prompt_tokens_details.cached_tokens
        assert first == expected["lengths"][rows[0]["task"]] // 32 * 32
    finally:
        server.end()
