"""What the pages say is so: their code and commands run, their links lead somewhere, the site can be built."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_softprompt import (
    CollapseGuard,
    PromptGradientClipping,
    PromptGradientNorm,
    SoftPromptCallback,
    SoftPrompts,
    TaskTemplate,
    cli,
)
from tests import modules, tiny
from tests.integration.page_server import PageServer, page_server
from tests.integration.pages import PAGES, ROOT, blocks, command_lines
from tests.interop.bases import save_base
from tests.interop.gguf_bases import write_llama
from tests.modules import Plain, Rows
from tests.tokenizer import word_tokenizer

LANGUAGES = {"python", "bash", "yaml", "mermaid", ""}
WITH_PYTHON = {"README.md", "kernels/README.md"}
WITH_PYTHON |= {f"docs/{name}.md" for name in ("answering", "data", "distillation", "early_stopping", "from_peft")}
WITH_PYTHON |= {f"docs/{name}.md" for name in ("health", "own_module", "resuming", "serving")}
WITH_COMMANDS = {"CONTRIBUTING.md", "README.md"}
WITH_COMMANDS |= {f"docs/{name}.md" for name in ("answering", "commands", "distillation", "from_a_config")}
WITH_COMMANDS |= {f"docs/{name}.md" for name in ("resuming", "serving", "several_gpus")}
WITH_YAML = {f"docs/{name}.md" for name in ("config", "early_stopping", "from_a_config", "loggers")}
WITH_COMMANDS |= {"integrations/vllm/README.md"}  # parsed by vLLM itself, in `make test-vllm`
# How many commands run here of each page, without those of other programs.
RUNS = {"README.md": 5, "docs/commands.md": 21, "docs/serving.md": 1}
RUNS |= {"docs/answering.md": 2, "docs/from_a_config.md": 6, "docs/resuming.md": 4}


def run(page: str, names: dict, count: int) -> None:
    """Run the Python of a page, from its first block to its last."""
    found = blocks(page, "python")
    assert len(found) == count
    for block in found:
        exec(compile(block, page, "exec"), names)


def test_every_block_of_code_is_of_a_kind_that_is_run_here() -> None:
    for page in PAGES:
        languages = re.findall(r"^```(.*)\n(?:.*\n)*?```$", (ROOT / page).read_text(), re.MULTILINE)
        assert set(languages) <= LANGUAGES, page
        assert ("python" in languages) == (page in WITH_PYTHON), page
        assert ("bash" in languages) == (page in WITH_COMMANDS), page
        assert ("yaml" in languages) == (page in WITH_YAML), page
        if not page.startswith(("benchmarks/", "kernels/")):
            assert "" not in languages, page


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_on_health(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Words(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = word_tokenizer(["Is", "it", "positive", "or", "negative", "?"])

    def rows(tasks: list[str]) -> torch.utils.data.DataLoader:
        made = Rows(208, names=False, key="tasks")
        made.rows = [(ids, tasks[index % len(tasks)]) for index, (ids, _) in enumerate(made.rows)]
        return torch.utils.data.DataLoader(made, batch_size=4, collate_fn=made.collate)

    names = {
        "torch": torch,
        "module": Words(),
        "MyModule": Words,
        "train_dataloaders": rows(["sentiment", "topic"]),
        "rows_of": lambda task: rows([task]),
    }
    run("docs/health.md", names, 2)
    assert (tmp_path / "health.png").stat().st_size > 10_000
    assert set(names["rates"]) == {"sentiment", "topic"} and all(names["rates"].values())
    callback = names["SoftPromptCallback"](tasks={"sentiment": "Is it", "topic": 20})
    trainer = names["Trainer"](max_epochs=1, callbacks=[callback])
    trainer.fit(names["MyModuleWithRates"](), rows(["sentiment", "topic"]))
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == list(names["rates"].values())


def test_the_code_of_the_kernels_readme() -> None:
    names: dict[str, torch.Tensor] = {}
    run("kernels/README.md", names, 1)
    out, prompts = names["out"], names["prompts"]
    assert out.inputs_embeds.shape == (3, 7, 64) and prompts.grad.tolist() == [[1.0] * 64] * 5
    # The drawing.
    held = out.attention_mask + (out.labels != -100) + (out.inputs_embeds == 0).all(2) * -1
    assert held.tolist() == [[1, 1, 1, 2, 2, 2, 2], [-1, -1, -1, 1, 1, 2, 2], [-1, -1, -1, -1, 1, 2, 2]]


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_on_peft(tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(2, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    names = {
        "BASE": str(tiny_base),
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "tokenizer": AutoTokenizer.from_pretrained(tiny_base),
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    run("docs/from_peft.md", names, 8)
    assert tiny.relative_error(names["logits"], names["peft_logits"]) < 1e-5
    assert tiny.relative_error(names["mixed"][0], names["logits"][0]) < 1e-5
    found = names["imported"]["sentiment"]
    assert torch.equal(found, names["prompts"]["sentiment"]) and torch.equal(found, names["again"]["sentiment"])
    theirs = names["loaded"](**names["batch"]).logits[:, 20:]
    assert tiny.relative_error(theirs[1], names["mixed"][1]) < 1e-5


def test_the_code_of_the_page_on_data(tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"task": "sentiment", "text": "a good film", "sentiment": "positive"}] * 3
    rows += [{"task": "title", "story": "it is so", "title": "the news"}]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("titles.csv").write_text("story,title\nthe text,a text\n")
    names: dict = {"BASE": str(tiny_base)}
    run("docs/data.md", names, 2)
    assert sorted(names["batch"]["tasks"]) == ["sentiment"] * 3 + ["title"] * 2
    assert (names["batch"]["labels"] != -100).any(1).all()


@pytest.fixture
def given(tiny_base, tmp_path, monkeypatch) -> SimpleNamespace:
    """A folder in which what the pages name is there: prompts, an adapter, rows, a checkpoint, configs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "run.yaml").symlink_to(ROOT / "examples" / "mixed_tasks.yaml")
    (tmp_path / "rows.jsonl").write_text('{"task": "sentiment", "text": "it is"}\n{"task": null, "text": "so"}\n')
    (tmp_path / "reviews.jsonl").write_text("".join(f'{{"text": "film {n}", "tone": {n % 2}}}\n' for n in range(20)))
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():  # states of trained models have a direction in common, by which exports are masked
        model.get_input_embeddings().weight += 2 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }} {{ turn.content }} . {% endfor %}=>"
    base = save_base(tmp_path / "base", model, tokenizer)
    write_llama(tmp_path / "BASE.gguf", model)
    (tmp_path / "texts.jsonl").write_text('{"task": "sentiment", "text": "it is"}\n' * 2)
    (tmp_path / "teacher.txt").write_text("it is so good and " * 4)
    prompts = SoftPrompts.for_model(model, {"sentiment": 6, "source": 12})
    prompts.templates["sentiment"] = TaskTemplate("{text} =>", " {label}", [" good", " bad"])
    prompts.save_pretrained("prompts")
    overrides = [f"--model.init_args.base={base}", f"--data.init_args.tokenizer={base}"]
    overrides += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    return SimpleNamespace(words={"MODEL": str(base), "FOLDER": "prompts"}, overrides=overrides)


@pytest.fixture
def server() -> Iterator[PageServer]:
    with page_server() as found:
        yield found


def test_the_code_of_the_page_on_serving(given, server) -> None:
    (line,) = (line for line in command_lines("docs/serving.md") if line[1] == "serve")
    server.start([given.words.get(word, word) for word in line[2:]])
    exec(compile(server.here(*blocks("docs/serving.md", "python")), "docs/serving.md", "exec"), names := {})
    names["client"].close()
    assert names["found"].choices[0].text in ("good", "bad") and len(names["many"].choices) == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", sorted(WITH_COMMANDS & RUNS.keys()))
def test_the_commands_of_the_pages_run(page: str, given, server, capsys) -> None:
    ran = 0
    for line in command_lines(page):
        if line[0] in ("make", "pip"):
            continue
        if line[0] == "curl":
            assert server.asked(line)["choices"]
            continue
        program, command, *arguments = [given.words.get(word, word) for word in line]
        assert program == "lightning-softprompt", line
        if command in ("fit", "validate", "test", "predict"):
            arguments += given.overrides
        if "CHECKPOINT" in arguments:
            arguments[arguments.index("CHECKPOINT")] = str(
                min(Path("checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
            )
        ran += 1
        if command == "serve":
            server.start(arguments)
            continue
        try:
            cli.main([command, *arguments])
        except SystemExit as end:
            assert not end.code and "--print_config" in arguments, line
    assert ran == RUNS[page]
    assert "error" not in capsys.readouterr().err


def test_the_launchers_of_the_page_on_several_gpus_get_arguments_that_are_there(given, capsys) -> None:
    launchers = []
    for line in command_lines("docs/several_gpus.md"):
        line = ["0" if word.startswith("$") else word for word in line]
        launchers.append(line[0])
        start = line.index("fit")
        if line[0] == "torchrun":
            parsed = get_args_parser().parse_args(line[1:])
            assert parsed.module and parsed.training_script == "lightning_softprompt.cli"
        else:
            assert line[start - 1] == "lightning-softprompt"
        with pytest.raises(SystemExit) as end:
            cli.main([*line[start:], "--print_config"])
        assert not end.value.code and "strategy: ddp" in capsys.readouterr().out
    assert launchers == ["torchrun", "torchrun", "srun"]


def test_make_has_the_targets_that_the_pages_name() -> None:
    named = {word for page in PAGES for word in re.findall(r"\bmake ([a-z-]+)\b(?=[` \n])", (ROOT / page).read_text())}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "docs", "lint", "conformance"} <= named & targets
    quoted = {word for page in PAGES for word in re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text())}
    assert quoted <= targets
    for line in command_lines("CONTRIBUTING.md") + command_lines("README.md"):
        assert line[0] != "make" or line[1] in targets


# ---------------------------------------------------------------- pictures


@pytest.mark.filterwarnings("ignore")
def test_hooks_are_called_in_the_order_of_the_drawing(tmp_path) -> None:
    calls: list[tuple[str, str]] = []

    def noting(kind: type, actor: str, *hooks: str) -> type:
        def method(hook: str):
            def call(self, *arguments, **options):
                if (actor, hook) not in calls:
                    calls.append((actor, hook))
                return getattr(super(noted, self), hook)(*arguments, **options)

            return call

        noted = type(kind.__name__, (kind,), {hook: method(hook) for hook in hooks})
        return noted

    optimizer = noting(torch.optim.AdamW, "O", "step", "load_state_dict")
    steps = ["setup", "configure_model", "load_state_dict", "configure_optimizers", "training_step", "backward"]
    module = noting(Plain, "M", *steps, "configure_gradient_clipping", "state_dict")
    module.configure_optimizers = lambda self: (
        calls.append(("M", "configure_optimizers")) or optimizer(self.parameters(), lr=0.01)
    )
    before = "on_before_optimizer_step"
    watched = [
        noting(CollapseGuard, "G", "on_fit_start", before, "_after_step"),
        noting(PromptGradientClipping, "C", before),
        noting(PromptGradientNorm, "N", "on_train_start", before, "_after_step"),
        noting(SoftPromptCallback, "S", "setup", "on_fit_start", "on_train_start", before),
    ]

    def fit(resumed: Path | None = None, **options) -> None:
        *others, prompts = watched
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        callbacks = [*(make() for make in others), prompts(tasks={"alpha": 3, "beta": 4, "gamma": 2}), saving]
        trainer = modules.trainer(tmp_path, *callbacks, enable_checkpointing=True, **options)
        trainer.fit(module(), modules.loader(), ckpt_path=resumed)

    fit(max_steps=1)
    calls.clear()
    fit(tmp_path / "step=1.ckpt", max_steps=2)
    said = re.findall(r"^ +(\w)->>(\w): (\w+)$", blocks("docs/hooks.md", "mermaid")[0], re.MULTILINE)
    expected = [(actor, "_after_step" if hook == "step_post_hook" else hook) for _, actor, hook in said]
    assert calls == expected
