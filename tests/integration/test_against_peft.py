"""The README's table against PEFT, each line by running real PEFT; where both can do a thing, the same result."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, MultitaskPromptTuningConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model

from lightning_softprompt import SoftPrompts, Tokens, attach
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def peft_model(task: str = "long", kind: str = "llama") -> PeftModel:
    """A tiny model with PEFT's prompt tuning, the prompt set to hard tokens."""
    base = tiny.tiny_model(kind)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(tiny.HARD[task]))
    rows = base.get_input_embeddings().weight[torch.tensor(tiny.HARD[task])].detach().clone()
    model = get_peft_model(base, config, adapter_name=task)
    model.prompt_encoder[task].embedding.weight.data.copy_(rows)
    return model.eval()


def our_model(kind: str = "llama", tasks=tuple(tiny.HARD)):
    model = tiny.tiny_model(kind)
    return attach(model, SoftPrompts.for_model(model, {task: Tokens(tiny.HARD[task]) for task in tasks}))


def one_task_batch(seed: int, side: str) -> tiny.Batch:
    batch = tiny.random_batch(seed, side)
    batch.task_ids[:] = 0
    for row in batch.rows:
        row.task, row.prompt = 0, tiny.HARD["long"]
    return batch


def test_the_same_loss_and_gradient_on_a_right_padded_batch_of_one_task() -> None:
    batch = one_task_batch(0, "right")
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    theirs, ours = peft_model(), our_model()
    their_loss, our_loss = theirs(**inputs).loss, ours(**inputs, task_ids=batch.task_ids).loss
    their_loss.backward()
    our_loss.backward()
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-6, atol=0)
    theirs_gradient = theirs.prompt_encoder["long"].embedding.weight.grad
    assert tiny.relative_error(ours.soft_prompts["long"].grad, theirs_gradient) < 1e-5


def test_one_prompt_a_batch() -> None:
    model = peft_model("long")
    model.add_adapter("short", PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        # Two prompts are named, one a row; both rows get the active one.
        named = model(input_ids=ids, adapter_names=["long", "short"]).logits
        assert torch.equal(named, model(input_ids=ids).logits)
        model.set_adapter("short")
        assert model(input_ids=ids).logits.shape[1] != named.shape[1]
    batch = tiny.random_batch(1, "left")
    out = our_model()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, task_ids=batch.task_ids)
    assert out.logits.shape[:2] == batch.input_ids.shape  # prompts of 7, 2 and 1 tokens, and none


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_left_padded_batches(kind: str) -> None:
    bare, wrong, total = tiny.tiny_model(kind), 0, 0
    for seed in range(6):
        batch = one_task_batch(seed, "left")
        inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        options = dict(max_new_tokens=8, do_sample=False)
        theirs = peft_model(kind=kind).generate(**inputs, **options)[:, -8:].tolist()
        ours = our_model(kind).generate(**inputs, task_ids=batch.task_ids, **options)[:, -8:].tolist()
        expected = [tiny.hard_greedy(bare, row, 8, do_sample=False)[0] for row in batch.rows]
        assert ours == expected
        wrong += sum(a != b for x, y in zip(theirs, expected, strict=True) for a, b in zip(x, y, strict=True))
        total += sum(map(len, expected))
    assert wrong > 0.1 * total


def test_training_a_saved_prompt_further(tmp_path) -> None:
    peft_model().save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        PeftModel.from_pretrained(tiny.tiny_model(), tmp_path / "theirs" / "long", is_trainable=True)
    our_model().soft_prompts.save_pretrained(tmp_path / "ours")
    prompts = SoftPrompts.from_pretrained(tmp_path / "ours")
    model = attach(tiny.tiny_model(), prompts)
    model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]]), tasks=["long"]).loss.backward()
    assert prompts["long"].grad is not None


def test_static_cache() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    options = dict(max_new_tokens=6, do_sample=False)
    expected = tiny.hard_greedy(tiny.tiny_model(), tiny.Row(0, tiny.HARD["long"], ids[0].tolist()), 6, do_sample=False)
    try:
        theirs = peft_model().generate(**inputs, **options, cache_implementation="static")[:, -6:].tolist()
    except Exception:
        theirs = None
    assert theirs != expected
    ours = our_model().generate(**inputs, tasks=["long"], **options, cache_implementation="static")
    assert ours[:, -6:].tolist() == expected


def test_continuing_from_a_cache() -> None:
    ids, more = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10]])
    whole = torch.cat([ids, more], 1)
    expected = tiny.hard_row(tiny.tiny_model(), tiny.Row(0, tiny.HARD["long"], whole[0].tolist()))[-2:]
    model = our_model()
    with torch.no_grad():
        cache = model(ids, tasks=["long"], use_cache=True).past_key_values
        found = model(more, attention_mask=torch.ones_like(whole), past_key_values=copy.deepcopy(cache)).logits[0]
        assert tiny.relative_error(found, expected) < 1e-5
        try:
            theirs = peft_model()
            cache = theirs(input_ids=ids, use_cache=True).past_key_values
            found = theirs(input_ids=more, attention_mask=torch.ones_like(whole), past_key_values=cache).logits[0, -2:]
            error = tiny.relative_error(found, expected)
        except Exception:
            error = float("inf")
    assert error > 1e-2


def test_the_shape_of_the_logits() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    assert peft_model()(input_ids=ids).logits.shape[1] == 4 + len(tiny.HARD["long"])
    assert our_model()(ids, tasks=["long"]).logits.shape[1] == 4


def test_the_cost_of_the_prompt() -> None:
    batch = one_task_batch(0, "right")
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    theirs, ours, (rows, length), longest = peft_model(), our_model(), batch.input_ids.shape, len(tiny.HARD["long"])
    their_columns, our_columns = columns_of(theirs.get_base_model()), columns_of(ours)
    for _ in range(2):  # every row, in every step
        theirs(**inputs).loss.backward()
        ours(**inputs, task_ids=batch.task_ids).loss.backward()
    assert their_columns == [(rows, longest + length)] * 2
    assert our_columns == [(1, longest), (rows, length)] * 2
    their_columns.clear()
    our_columns.clear()
    with torch.no_grad():
        for _ in range(2):
            theirs(**inputs)
            ours(**inputs, task_ids=batch.task_ids)
    assert their_columns == [(rows, longest + length)] * 2
    assert our_columns == [(1, longest), (rows, length), (rows, length)]


def columns_of(model) -> list[tuple[int, int]]:
    """Grows by the rows and columns of every pass through the first layer."""
    seen: list[tuple[int, int]] = []
    model.model.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(tuple(args[0].shape[:2])))
    return seen


# ---------------------------------------------------------------- docs/comparison.md


def test_multitask_prompt_tuning_mixes_tasks_over_one_shared_prompt_of_one_length() -> None:
    config = MultitaskPromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, num_tasks=2, num_ranks=1)
    model = get_peft_model(tiny.tiny_model("llama"), config).eval()
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.prefix_task_cols.normal_(generator=torch.Generator().manual_seed(0))
        encoder.prefix_task_rows.normal_(generator=torch.Generator().manual_seed(1))
        tasks = torch.tensor([0, 1])
        mixed = model(input_ids=torch.tensor([[5, 6, 7], [5, 6, 7]]), task_ids=tasks).logits
        alone = [model(input_ids=torch.tensor([[5, 6, 7]]), task_ids=task[None]).logits[0] for task in tasks]
        shared = encoder.embedding(torch.arange(3))
        low_rank = encoder.prefix_task_cols @ encoder.prefix_task_rows
        prompts = encoder(torch.arange(3).expand(2, 3), tasks)
    assert tiny.relative_error(mixed, torch.stack(alone)) < 1e-5 and tiny.relative_error(alone[0], alone[1]) > 1e-3
    assert torch.allclose(prompts, shared * low_rank)


def test_loras_share_a_batch_in_inference_alone() -> None:
    model = get_peft_model(tiny.tiny_model("llama"), LoraConfig(init_lora_weights=False), adapter_name="one")
    model.add_adapter("two", LoraConfig(init_lora_weights=False))
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    with torch.no_grad():
        mixed = model.eval()(input_ids=ids, adapter_names=["one", "two"]).logits
    assert tiny.relative_error(mixed[0], mixed[1]) > 1e-3
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(input_ids=ids, adapter_names=["one", "two"])
