"""What is attached to a model, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_softprompt.attachment.prefix_choice import PrefixChoice

if TYPE_CHECKING:
    from lightning_softprompt.attachment.attachment import Attachment

_MOST_NAMES = 20


def summary(attachment: Attachment, prefix: PrefixChoice) -> str:
    """What is attached, in one line: tasks, lengths, which are frozen or have a template, and how rows get prompts."""
    prompts = attachment.prompts
    tasks = []
    for task in list(prompts)[:_MOST_NAMES]:
        facts = [f"{len(prompts[task])} tokens", "a template" if task in prompts.templates else "no template"]
        tasks.append(f"{task!r} ({', '.join(facts + ['frozen'] * (not prompts[task].requires_grad))})")
    if len(prompts) > _MOST_NAMES:
        tasks.append(f"and {len(prompts) - _MOST_NAMES} more")
    against = attachment.traits.obstacle
    if prefix == "never" or against:
        route = "inline, in the sequence of every row" + (f", as {against}" if against else "")
    elif prefix == "always":
        route = "as a prefix, which is computed once for each task"
    else:
        route = "as a prefix, which is computed once for each task, or inline where a batch takes none or gains nothing"
    return f"Soft prompts of {type(attachment.model).__name__}: {', '.join(tasks)}. Rows get them {route}."
