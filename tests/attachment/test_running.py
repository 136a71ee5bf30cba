"""What runs in a thread is seen by that thread alone, and a route by the asyncio task that set it."""

from __future__ import annotations

import asyncio
import inspect
import threading

from lightning_softprompt.attachment.routing import Route
from lightning_softprompt.attachment.running import ThreadPasses, route_of, set_route
from lightning_softprompt.attachment.substitution import Substitution


def test_a_route_is_of_one_attachment_and_of_one_thread() -> None:
    one, other, seen = object(), object(), []
    set_route(one, Route(("one",)))
    thread = threading.Thread(target=lambda: seen.append(route_of(one)))
    thread.start()
    thread.join()
    assert route_of(one) == Route(("one",)) and route_of(other) is None and seen == [None]
    set_route(one, None)
    assert route_of(one) is None


def test_a_route_is_of_one_asyncio_task() -> None:
    attachment = object()

    async def serve(task: str) -> bool:
        set_route(attachment, Route((task,)))
        for _ in range(3):
            await asyncio.sleep(0)
        return route_of(attachment) == Route((task,))

    async def everybody() -> list[bool]:
        return await asyncio.gather(*map(serve, map(str, range(20))))

    assert all(asyncio.run(everybody())) and route_of(attachment) is None


def test_passes_stand_in_each_other_and_end_by_their_owner() -> None:
    passes, outer, inner = ThreadPasses(), Substitution(), Substitution()
    passes.begin(outer, "teacher")
    passes.begin(inner, "student")
    assert passes.innermost is inner and inner.around is outer
    assert passes.end("student") is inner and passes.innermost is outer
    passes.begin(inner, "student")  # interrupted: it never ends by itself
    assert passes.end("teacher") is outer and passes.innermost is None
    assert passes.end("teacher") is None


def test_a_thread_s_passes_are_no_attribute_of_the_class() -> None:
    # torch.compile of PyTorch 2.11 reads an attribute of the class in place of the thread's own of the same name.
    assert inspect.getattr_static(ThreadPasses(), "innermost", None) is None and not hasattr(ThreadPasses, "innermost")


def test_a_pass_is_of_one_thread() -> None:
    passes, seen = ThreadPasses(), []
    passes.begin(Substitution(), "owner")
    thread = threading.Thread(target=lambda: seen.append((passes.innermost, passes.end("owner"))))
    thread.start()
    thread.join()
    assert seen == [(None, None)] and passes.innermost is not None
