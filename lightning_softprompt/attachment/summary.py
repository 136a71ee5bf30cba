"""What is attached to a model, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_softprompt.attachment.prefix_choice import PrefixChoice

if TYPE_CHECKING:
    from lightning_softprompt.attachment.attachment import Attachment

_MOST_NAMES = 20


def summary(attachment: Attachment, prefix: PrefixChoice) -> str:
    """What is attached, in one line: tasks, lengths, which have a template or are frozen, and how rows get prompts."""
    prompts = attachment.prompts
    tasks = []
    for task in list(prompts)[:_MOST_NAMES]:
        facts = [f"{len(prompts[task])} tokens"]
        facts += ["a template"] * (task in prompts.templates) + ["frozen"] * (not prompts[task].requires_grad)
        tasks.append(f"{task!r} ({', '.join(facts)})")
    if len(prompts) > _MOST_NAMES:
        tasks.append(f"and {len(prompts) - _MOST_NAMES} more")
    against = attachment.traits.obstacle
    if prefix == "never" or against:
        route = "The model reads the prompt in each row" + (f", as {against}" if against else "")
    elif prefix == "always":
        route = "Each task's prompt is computed once"
    else:
        route = "Each task's prompt is computed once where that is exact and pays off; elsewhere it goes into each row"
    return f"Soft prompts of {type(attachment.model).__name__}: {', '.join(tasks)}. {route}."
