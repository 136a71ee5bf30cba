"""What runs in this thread: the route of the enclosing call, and the pass under way. No other thread sees them.

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
    """The route of the enclosing call of this attachment's model, which may be inside a call of another model."""
    return _ROUTES.get().get(attachment)


def set_route(attachment: object, route: Route | None) -> None:
    """Set the route of the passes that follow in this thread or asyncio task; None takes it away."""
    others = {key: value for key, value in _ROUTES.get().items() if key is not attachment}
    _ROUTES.set(others if route is None else {**others, attachment: route})


class ThreadPasses(threading.local):
    """The passes under way in this thread.

    Attributes:
        innermost: the last one that began; those around it follow as its `around`.
    """

    def __init__(self) -> None:
        # No default of the class: torch.compile would read that in place of the thread's own, up to PyTorch 2.11.
        self.innermost: Substitution | None = None

    def begin(self, this: Substitution, owner: object) -> None:
        """Note that `this` runs from now on, a pass of the model that `owner` is attached to."""
        this.owner, this.around = owner, self.innermost
        self.innermost = this

    def end(self, owner: object) -> Substitution | None:
        """End the pass of `owner` that is under way, and return it; None where there is none."""
        this = self.innermost
        while this is not None and this.owner is not owner:
            this = this.around  # one inside that was interrupted
        if this is not None:
            self.innermost = this.around
        return this


PASSES = ThreadPasses()
