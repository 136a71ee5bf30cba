"""The command `distill`: what it leaves and says, against the bare model in float64."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_softprompt import MixedTaskGenerator, PromptDistillation, SoftPrompts, TaskTemplate, cli
from lightning_softprompt.prompts.files import LOCK_NAME
from tests import tiny
from tests.cli.command_line import ROOT, overrides, refused, run, said
from tests.training.distilled import by_hand, save_chat_base, write

TEACHER = "Decide whether the text is positive or negative . a good film => good the bad product => bad"
WORDS = "Decide whether the is positive or negative a good film bad product news it so"


@pytest.fixture
def given(tmp_path) -> dict[str, Any]:
    """The options of a short run."""
    base = save_chat_base(tmp_path / "base", WORDS)
    (tmp_path / "teacher.txt").write_text(f"{TEACHER}\n")
    words = WORDS.split()
    rows = [{"text": f"{one} {other}"} for one in words[:4] for other in words[-6:]]
    files = {"teacher": tmp_path / "teacher.txt", "texts": write(tmp_path / "texts.jsonl", rows)}
    run = {"steps": 3, "length": 4, "max_new_tokens": 5, "output": tmp_path / "prompts"}
    return {"base": base, "task": "support", **files, **run}


def arguments(given: dict[str, Any], **more: Any) -> list[str]:
    return ["distill", *(f"--{name}={value}" for name, value in {**given, **more}.items() if value is not None)]


@pytest.mark.parametrize("chat", [True, False])
def test_what_a_process_of_its_own_says_is_so(chat: bool, given, tmp_path) -> None:
    done = run(*arguments(given, chat=str(chat).lower()), "--json")
    found = json.loads(done.stdout)
    prompts = SoftPrompts.from_pretrained(tmp_path / "prompts")
    assert prompts.tasks == ("support",) and prompts.lengths == (4,) and found["steps"] == 3
    assert prompts.templates == {"support": TaskTemplate("{text}", "{label}" if chat else " {label}", chat=chat)}
    for file in (tmp_path / "prompts").iterdir():  # the hard prompt is not told
        assert b"whether the text" not in file.read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(given["base"])
    bare = AutoModelForCausalLM.from_pretrained(given["base"]).double()
    embed, end = bare.get_input_embeddings(), tokenizer.eos_token_id

    def ids(words: str) -> list[int]:
        return tokenizer(words)["input_ids"]

    rows = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    random.Random(0).shuffle(rows)
    assert found["rows"] == 2 and found["tokens_before"] == len(ids(TEACHER)) + 2 * chat and found["tokens_after"] == 4
    values, answers, firsts = [], [], []
    start = embed(torch.tensor(ids(TEACHER)[-4:]))
    assert not torch.equal(prompts["support"], start.float())
    assert found["text"] == rows[0]
    for text in rows[:2]:
        hard, behind = (f"text {TEACHER} .", f"tweet {text} . =>") if chat else (TEACHER, text)
        hard, behind = ids(hard), ids(behind)
        answer = tiny.hard_greedy(bare, tiny.Row(0, hard, behind), 5, eos_token_id=end)[0]
        soft = prompts["support"].detach().double()
        both = [embed(torch.tensor(hard)).detach(), soft]
        values.append(by_hand(bare, *both, behind, behind, answer).detach())
        own = bare.generate(
            inputs_embeds=torch.cat([soft, embed(torch.tensor(behind))])[None].detach(),
            attention_mask=torch.ones(1, 4 + len(behind), dtype=torch.int64),
            max_new_tokens=5,
            eos_token_id=end,
        )[0].tolist()
        answers.append(own == answer)
        firsts.append(own[0] == answer[0])
    assert found["divergence"] == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)
    assert found["equal_answers"] == 50 * sum(answers) and found["equal_first"] == 50 * sum(firsts)


def test_a_chat_template_says_no_words_of_its_own_to_the_student(given, tmp_path, capsys) -> None:
    tokenizer = AutoTokenizer.from_pretrained(given["base"])
    own = "{% if messages[0].role != 'system' %}text the film is so good . {% endif %}"
    tokenizer.chat_template = own + tokenizer.chat_template
    tokenizer.save_pretrained(given["base"])
    found = said(capsys, *arguments(given, chat="true"))
    assert found["tokens_after"] == 4 + len(["text"]) and found["tokens_before"] == len(TEACHER.split()) + 1
    template = SoftPrompts.from_pretrained(tmp_path / "prompts").templates["support"]
    assert template == TaskTemplate("{text}", "{label}", chat=True, system="")


def test_the_folder_keeps_its_tasks_and_answers_at_once(given, tmp_path, capsys) -> None:
    model = AutoModelForCausalLM.from_pretrained(given["base"])
    SoftPrompts.for_model(model, {"other": 3}).save_pretrained(tmp_path / "prompts")
    rows = [{"text": "a film", "label": "good"}, {"text": "the news", "label": "bad"}, {"text": "it is"}] * 4
    write(tmp_path / "texts.jsonl", rows)
    found = said(capsys, *arguments(given, labels="[' good', ' bad']"))
    prompts = SoftPrompts.from_pretrained(tmp_path / "prompts")
    assert prompts.tasks == ("other", "support") and found["equal_answers"] in (0, 100)
    generator = MixedTaskGenerator.from_pretrained(given["base"], tmp_path / "prompts")
    assert generator.answer(["a film"], ["support"])[0] in ("good", "bad")
    assert "holds a task 'support' already" in refused(capsys, *arguments(given, base="nowhere"))


@pytest.mark.parametrize(("steps", "is_written_before"), [(3, True), (1, False)])
def test_bars_tell_how_far_it_is(steps: int, is_written_before: bool, given, capsys) -> None:
    cli.main([*arguments(given, steps=steps), "--json"])
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(rf"training, loss \d+\.\d+ \S+ {steps}/{steps} ", told)
    assert re.search(
        r"beside the hard prompt \S+ 5/5 ", told
    )  # two rows, and both again for their time, with a warm-up
    assert bool(re.search(r"answers of the hard prompt \S+ 22/22 ", told)) == is_written_before


def test_it_ends_with_a_table_and_the_command_that_serves(given, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(arguments(given))
    told = capsys.readouterr().out
    for word in ("support: 2 held-out texts", "tokens in front of a text", "equal answers, %", "seconds a request"):
        assert word in told, word
    assert told.splitlines()[-1] == (
        f"to serve them: lightning-softprompt serve --base {given['base']} --prompts {tmp_path / 'prompts'}"
    )


@pytest.mark.parametrize(
    ("more", "files", "message"),
    [
        ({}, {"texts.jsonl": ""}, "texts.jsonl is empty; the train split needs at least one row"),
        ({}, {"texts.jsonl": '{"txt": "a"}\n'}, "line 1: the template '{text}' needs the column 'text', which"),
        ({}, {"texts.jsonl": '{"text": "a"}\n'}, "has one text; give some more"),
        ({}, {"teacher.txt": " \n"}, "is empty; write the hard prompt into it"),
        ({}, {"teacher.txt": "good film"}, "has 2 tokens and length is 6; give a length between"),
        ({"length": 0}, {}, "has 19 tokens and length is 0; give a length between"),
        ({"length": 6}, {"teacher.txt": "good " * 600}, "has 600 tokens and max_new_tokens is 5, and the model has"),
        ({"steps": 0}, {}, "steps must be at least 1, got 0"),
        ({"task": "a/b"}, {}, "a/b"),
        ({"teacher": "gone.txt"}, {}, "the teacher gone.txt does not exist; looked in "),
        ({"texts": "gone.jsonl"}, {}, "gone.jsonl does not exist"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_leave_nothing(more, files, message, given, tmp_path, capsys) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    more = {"length": 6, **more} if "teacher.txt" in files else more
    line = refused(capsys, *arguments(given, **more))
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "prompts").exists()


@pytest.mark.parametrize("kind", ["another base", "a file", "nowhere"])
def test_a_folder_that_will_not_take_the_task_is_found_before_the_first_step(
    kind: str, given, tmp_path, capsys, monkeypatch
) -> None:
    output, message = tmp_path / "prompts", "cannot be written"
    if kind == "another base":
        SoftPrompts.for_model(tiny.tiny_model(seed=9), {"other": 3}).save_pretrained(output)
        message = "prompts of different base models cannot stand together"
    elif kind == "a file":
        output.write_text("mine")
    else:
        output = Path("/dev/null/prompts")
    steps = []
    monkeypatch.setattr(PromptDistillation, "training_step", lambda *given: steps.append(given))
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(capsys, *arguments(given, output=output)) and not steps
    assert [each for each in sorted(tmp_path.rglob("*")) if each.name != LOCK_NAME] == [
        each for each in before if each.name != LOCK_NAME
    ]


@pytest.mark.parametrize(("how", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_run_that_a_signal_ends_leaves_what_it_learned(how, status, given, tmp_path, monkeypatch, capsys) -> None:
    fit = Trainer.fit

    def ended(self: Trainer, module: Any, data: Any) -> None:
        batch_end = module.on_train_batch_end

        def hook(*rest: Any) -> None:
            batch_end(*rest)
            if self.global_step == 2:
                os.kill(os.getpid(), getattr(signal, how))

        module.on_train_batch_end = hook
        fit(self, module, data)

    monkeypatch.setattr(Trainer, "fit", ended)
    with pytest.raises(SystemExit) as end:
        cli.main(arguments(given, steps=9))
    assert end.value.code == status and "as it was after 2 steps" in capsys.readouterr().err
    assert SoftPrompts.from_pretrained(tmp_path / "prompts").lengths == (4,)


def test_the_example_runs_goes_on_and_leaves_the_student_alone(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    words = re.findall(r"\w+|[^\w\s]+", (ROOT / "examples/distill.yaml").read_text())
    base = save_chat_base(tmp_path / "base", " ".join(words))
    config = ["--config=examples/distill.yaml", *overrides(base, tmp_path)]
    found = said(capsys, "fit", *config)
    assert found["monitor"] == "val/divergence" and found["tasks"] == ["support"]
    (row,) = found["results"]
    assert row["measured"] == "divergence" and list(row)[2:] == ["rows", "no prompt", "start", "tuned"]
    assert row["tuned"] == pytest.approx(found["best"], rel=1e-5) and row["tuned"] < row["start"]
    (beside,) = found["fidelity"]
    assert beside["task"] == "support" and beside["rows"] == 8 and beside["tokens_after"] == 24
    assert beside["divergence"] == pytest.approx(found["best"], rel=1e-4) and beside["seconds_before"] > 0
    for saved in map(SoftPrompts.from_pretrained, (found["prompts"], found["checkpoint"])):
        assert saved.tasks == ("support",) and saved.lengths == (24,)
        assert saved.templates["support"] == TaskTemplate("{text}", "{answer}", chat=True)
    assert "workshop" not in (tmp_path / "prompts" / "soft_prompts.json").read_text()
    checkpoint = f"--ckpt_path={found['checkpoint']}"
    validated = said(capsys, "validate", *config, checkpoint)["metrics"]
    assert validated["val/divergence"] == pytest.approx(found["best"], rel=1e-4)
    gone_on = said(capsys, "fit", *config, checkpoint, "--trainer.max_epochs=3")
    assert gone_on["steps"] == 12 and gone_on["results"][0]["start"] == row["start"]
    generator = MixedTaskGenerator.from_pretrained(base, found["prompts"])
    assert generator.answer(["Do you rent city bikes?"], ["support"], max_new_tokens=3)[0] is not None
