"""The peers of the benchmarks do what is claimed of them. Nothing here is timed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests import tiny
from tests.integration.scripts import benchmark

# transformers 5.23 warns of a name that PEFT 0.21.2 reads; PEFT, of positions that it drops.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]


@pytest.fixture(scope="module")
def kernel():
    with benchmark("kernel") as module:
        yield module


@pytest.fixture(scope="module")
def train_step():
    with benchmark("train_step") as module:
        yield module


@pytest.fixture(scope="module")
def mixed_inference():
    with benchmark("mixed_inference") as module:
        yield module


@pytest.mark.parametrize("number", range(6))
def test_the_peers_lay_out_the_same(kernel, number: int) -> None:
    batch = kernel.Batch.of(kernel.SIZES[number], torch.float32, "cpu")
    mine, theirs = kernel.ours(batch), kernel.eager_mixed(batch)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if batch.side == "right":
        peft = kernel.Peft(batch)
        assert peft.agrees_with(mine)
        if len(peft.rows) == 1:
            alone = peft.operations()
            assert all(torch.equal(mine[name], alone[name].to(mine[name].dtype)) for name in alone)
        # And it would be seen if they did not.
        mine["inputs_embeds"][0, 0] += 1
        assert not peft.agrees_with(mine)


@pytest.fixture
def base(train_step):
    return train_step.peers.never_ending(tiny.tiny_model())


@pytest.mark.parametrize("size", [(5, 6, 4, 2), (4, 6, 7, 4), (3, 5, 4, 1)])  # 5 rows of 2 tasks: groups of 3 and 2
def test_a_step_of_peft_task_by_task_is_the_step_of_the_batch(train_step, base, size) -> None:
    steps = train_step.peers_of(base, size)
    for _ in range(2):  # and so is the next one: no gradient is left from the first, no adapter frozen by a switch
        difference, failure = train_step.compare(steps)
        assert not failure and max(difference.values()) < 1e-5
    for name, prompts in {"ours": size[3], "peft": size[3], "peft_one_task": 1, "no_prompt": 0}.items():
        assert len(steps[name].prompts) == prompts
    if size[3] == 1:
        loss, gradient = train_step.differences(steps["ours"], steps["peft_one_task"])
        assert loss < 1e-5 and gradient < 1e-4


def test_a_step_without_prompts_goes_down_to_the_embeddings(train_step, base) -> None:
    step = train_step.peers_of(base, (2, 5, 4, 1))["no_prompt"]
    reached = []

    def before(module: torch.nn.Module, args: Any) -> None:
        if type(module).__name__ == "LlamaDecoderLayer":
            args[0].register_hook(reached.append)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(before)
    try:
        step()
    finally:
        handle.remove()
    assert len(reached) == base.config.num_hidden_layers
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("peer", ["ours_in_parts", "ours_packed", "inline", "peft"])
def test_a_step_that_differs_is_not_timed(train_step, base, monkeypatch, peer) -> None:
    steps = train_step.peers_of(base, (4, 6, 4, 2))
    with torch.no_grad():
        steps[peer].prompts[1][0, 0] += 1e-2
    assert peer in train_step.compare(steps)[1]
    monkeypatch.setattr(train_step, "peers_of", lambda *_: steps)
    monkeypatch.setattr(train_step, "medians_in_turn", lambda *_: pytest.fail("timed"))
    assert train_step.measure((4, 6, 4, 2), base, "cpu")["ours_s"].startswith("FAILED")


def test_a_gradient_of_one_task_that_differs_is_seen(train_step) -> None:
    def peer(scale: float) -> Any:
        prompts = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]

        def run() -> torch.Tensor:
            loss = prompts[0].sum() + scale * (prompts[1] - prompts[1].detach()).sum()  # the same value at any scale
            loss.backward()
            return loss.detach()

        return train_step.Peer(run, prompts)

    assert train_step.differences(peer(1.0), peer(1.0)) == (0, 0)
    assert train_step.differences(peer(1.0), peer(2.0)) == (0, 0.5)


def test_the_times_make_the_ratios(train_step, base, monkeypatch) -> None:
    seconds = dict(ours=2.0, ours_loss_alone=2.0, ours_in_parts=2.0, inline=3.0)
    seconds |= dict(ours_packed=1.0, peft=8.0, peft_one_task=5.0, no_prompt=1.0)
    monkeypatch.setattr(train_step, "medians_in_turn", lambda calls, device: {name: seconds[name] for name in calls})
    row = train_step.measure((4, 6, 3, 2), base, "cpu")
    assert (row["vs_peft"], row["vs_no_prompt"], row["vs_floor"]) == (2.5, 2.0, 1.6)  # the floor: 24 + 6 tokens for 24


def test_peak_memory_is_what_is_held_at_once_without_weights(train_step) -> None:
    measure = sys.modules["measure"]
    weight, rows = torch.randn(512, 512), torch.randn(8, 512, requires_grad=True)

    def held() -> None:
        first = rows @ weight.t()  # a view of what was there
        (first.exp() * 2).sum()

    def backward() -> None:
        rows.exp().exp().exp().sum().backward()
        rows.grad = None

    size = rows.nbytes
    assert 3 * size <= measure.peak_memory(held, "cpu") < 3.1 * size
    # What the graph alone holds counts: three results, and the first gradient.
    assert 4 * size <= measure.peak_memory(backward, "cpu") < 4.1 * size
    # What is freed does not: five sums, and one tensor at a time.
    assert measure.peak_memory(lambda: [torch.ones(1000).sum() for _ in range(5)], "cpu") == 4000 + 5 * 4


@pytest.mark.parametrize("size", [(6, 3, 4), (5, 1, 7), (4, 4, 5)])
def test_the_peers_generate_the_rows_in_order(mixed_inference, base, size) -> None:
    stream = torch.randint(2, tiny.VOCABULARY, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    batch = mixed_inference.Batch.of(stream, *size)
    runs = mixed_inference.runs_of(base, batch, 3)
    expected = mixed_inference.right_answer(base, batch, 3)
    rows = zip(batch.task_ids.tolist(), batch.texts, strict=True)
    alone = [tiny.hard_greedy(base, tiny.Row(task, batch.prompts[task], text), 3)[0] for task, text in rows]
    assert expected.tolist() == alone
    for name in ("ours", "inline", "hard_prompt"):
        assert torch.equal(runs[name](), expected), name
    assert runs["no_prompt"]().shape == expected.shape and not torch.equal(runs["no_prompt"](), expected)
    # Where a group has no pads PEFT is right, too: each row in its place.
    equal = (runs["peft"]() == expected).all(1).tolist()
    for rows_of_task in mixed_inference.peers.rows_of_tasks(batch.task_ids).values():
        longest = max(len(batch.texts[row]) for row in rows_of_task.tolist())
        assert all(equal[row] for row in rows_of_task.tolist() if len(batch.texts[row]) == longest)


def test_tokens_that_differ_are_counted_and_are_not_timed(mixed_inference, base, monkeypatch) -> None:
    expected = torch.arange(8).view(2, 4)
    found = expected.clone()
    assert mixed_inference.percent_equal(found, expected) == 100
    found[1, 3] += 1
    assert mixed_inference.percent_equal(found, expected) == 87.5
    stream = torch.randint(2, tiny.VOCABULARY, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    right_answer = mixed_inference.right_answer
    monkeypatch.setattr(mixed_inference, "right_answer", lambda *given: right_answer(*given) + 1)
    monkeypatch.setattr(mixed_inference, "medians_in_turn", lambda *_: pytest.fail("timed"))
    assert mixed_inference.measure((4, 2, 4, 3), base, stream, "cpu")["ours_s"].startswith("FAILED: 0.0 %")


def test_the_tables_of_tasks_and_switches(mixed_inference, base, monkeypatch, tmp_path) -> None:
    def once(calls: dict[str, Any], device: str) -> dict[str, float]:
        return {name: float(call() is not None) + 1.0 for name, call in calls.items()}

    monkeypatch.setattr(mixed_inference, "medians_in_turn", once)
    stream = torch.randint(2, tiny.VOCABULARY, (200,)).tolist()
    table = mixed_inference.tasks_in_a_batch(4, base, stream, "cpu")
    assert [row["tasks"] for row in table] == [1, 2, 4]
    mixed_inference.draw(table, 4, "a machine", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert len(mixed_inference.switching(base, stream, "cpu")) == 6


def test_a_run_that_goes_wrong_is_told_from_one_that_does_not() -> None:
    with benchmark("collapse") as collapse:
        setting = collapse.tiny(0, "cpu", lessons=20)
        setting.train = setting.train[:12]
        ends = {
            (scenario, protection): collapse.run(setting, scenario, protection)
            for scenario, protection in (("healthy", "none"), ("healthy", "guard"), ("nan", "none"), ("nan", "ours"))
        }
        before = collapse.run(setting, "healthy", "none", steps=0)
        rows = {key: collapse.summary([before], [end], [ends["healthy", "none"]]) for key, end in ends.items()}
    assert [rows[key]["finite"] for key in rows] == [100, 100, 0, 100]
    assert rows["nan", "none"]["worst_loss_change"] == "not finite"
    assert [rows[key]["skipped"] for key in rows] == [0, 0, 0, 1]
    assert ends["healthy", "guard"].loss == ends["healthy", "none"].loss
    assert before.loss != ends["healthy", "none"].loss and not hasattr(setting.model, "soft_prompts")


def test_pads_are_counted_by_batch() -> None:
    with benchmark("padding") as padding:
        assert padding.pads([[3, 5], [2]]) == (2, 12)
        row = padding.measure(["a", "b"] * 40, [1 + (7 * number) % 30 for number in range(80)], 8)
    assert row["order"] == "same rows" and float(row["grouped"]) < float(row["drawn"])


def test_readers_are_held_against_one_another(tmp_path) -> None:
    with benchmark("reading") as reading:
        path = reading.write_rows(tmp_path / "rows.jsonl", 50)
        for way in reading.WAYS:
            reads = {name: read(path, way, str(tmp_path / way)) for name, read in reading.READERS.items()}
            row = reading.row_of(way, 50, {"datasets": 2.0, "source": 1.0}, reads)
            assert row == {"way": way, "datasets": "25", "source": "50", "ratio": 2.0}
        for wrong in ((50, reads["source"][1] + 1), (49, reads["source"][1])):
            assert "FAILED" in reading.row_of("held", 50, {}, {**reads, "source": wrong})["rows"]
