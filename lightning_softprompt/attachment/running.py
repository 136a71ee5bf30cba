"""What runs in this thread: the route of the call around, and the pass that is under way; no other thread sees them.

One attached model may be called from any number of threads and asyncio tasks at once. So nothing of a call is kept on
the model or on the attachment. A route lasts while other asyncio tasks run in the same thread, so it is a context
variable. A pass does not, so it is thread-local: torch.compile (2.13) can trace that, and no context variables.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType

from lightning_softprompt.attachment.routing import Route
from lightning_softprompt.attachment.substitution import Substitution

_ROUTES: ContextVar[Mapping[object, Route]] = ContextVar("soft_prompt_routes", default=MappingProxyType({}))


def route_of(attachment: object) -> Route | None:
    """The route of the call around, by attachment: a call of one attached model may run another one."""
    return _ROUTES.get().get(attachment)


def set_route(attachment: object, route: Route | None) -> None:
    """Let the passes that follow, in this thread or asyncio task, have a route, or none."""
    others = {key: value for key, value in _ROUTES.get().items() if key is not attachment}
    _ROUTES.set(others if route is None else {**others, attachment: route})


class ThreadPasses(threading.local):
    """The passes under way in this thread.

    Attributes:
        innermost: the last one that began; those around it follow as its `around`.
    """

    innermost: Substitution | None = None

    def begin(self, this: Substitution, owner: object) -> None:
        """`this` is a pass of the model that `owner` is attached to, and runs from now on."""
        this.owner, this.around = owner, self.innermost
        self.innermost = this

    def end(self, owner: object) -> Substitution | None:
        """The pass of `owner` that is under way, which is over; None where there is none."""
        this = self.innermost
        while this is not None and this.owner is not owner:
            this = this.around  # one inside that was interrupted
        if this is not None:
            self.innermost = this.around
        return this


PASSES = ThreadPasses()
