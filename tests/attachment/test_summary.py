"""The line that says what is attached."""

from __future__ import annotations

from transformers import MambaConfig, MambaForCausalLM

from lightning_softprompt import SoftPrompts, TaskTemplate, attach
from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.attachment.summary import summary
from tests import tiny


def test_the_line_names_the_route_and_at_most_twenty_tasks() -> None:
    many = SoftPrompts.for_model(tiny.tiny_model(), {f"task{number:02}": 2 for number in range(25)})
    many.freeze("task01")
    many.templates["task02"] = TaskTemplate("{text} =>")
    attachment = attachment_of(attach(tiny.tiny_model(), many))
    line = summary(attachment, "auto")
    assert "'task00' (2 tokens), 'task01' (2 tokens, frozen), 'task02' (2 tokens, a template)" in line
    assert "'task19'" in line and "'task20'" not in line and "and 5 more. Each" in line
    assert line.endswith(
        "Each task's prompt is computed once where that is exact and pays off; elsewhere it goes into each row."
    )
    assert summary(attachment, "never").endswith("more. The model reads the prompt in each row.")
    assert summary(attachment, "always").endswith("Each task's prompt is computed once.")
    other = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, state_size=4, num_hidden_layers=1)).eval()
    attach(other, SoftPrompts.for_model(other, {"a": 2}))
    assert "in each row, as it takes no position_ids" in summary(attachment_of(other), "auto")
