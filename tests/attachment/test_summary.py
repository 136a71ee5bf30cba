"""The line that says what is attached."""

from __future__ import annotations

from transformers import MambaConfig, MambaForCausalLM

from lightning_softprompt import SoftPrompts, attach
from lightning_softprompt.attachment.attach import attachment_of
from lightning_softprompt.attachment.summary import summary
from tests import tiny


def test_the_line_names_the_route_and_at_most_twenty_tasks() -> None:
    many = SoftPrompts.for_model(tiny.tiny_model(), {f"task{number:02}": 2 for number in range(25)})
    many.freeze("task01")
    attachment = attachment_of(attach(tiny.tiny_model(), many))
    line = summary(attachment, "auto")
    assert "'task00' (2 tokens, no template), 'task01' (2 tokens, no template, frozen)" in line
    assert "'task19'" in line and "'task20'" not in line and "and 5 more. Rows" in line and "or inline where" in line
    assert "inline, in the sequence of every row." in summary(attachment, "never")
    assert summary(attachment, "always").endswith("once for each task.")
    other = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, state_size=4, num_hidden_layers=1)).eval()
    attach(other, SoftPrompts.for_model(other, {"a": 2}))
    assert "every row, as it takes no position_ids" in summary(attachment_of(other), "auto")
