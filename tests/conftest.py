"""Fixtures that several rooms share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

# Before transformers: typing keeps one object for Union[int, float] and Union[float, int], that of who came first, and
# jsonargparse would read --trainer.limit_predict_batches=1 of Lightning 2.6 as 1.0, which is all of them.
import lightning.pytorch  # noqa: F401
import pytest

from tests import tiny
from tests.kernels.devices import HAS_GPU
from tests.tokenizer import word_tokenizer

_PLACES = {
    "interpreted": ("interpreted on the CPU", HAS_GPU, "the kernels are compiled in this process"),
    "ahead_of_time": ("compiled ahead of time", False, ""),
    "gpu": ("on a GPU", not HAS_GPU, "no GPU"),
}
_ran: Counter[str] = Counter()
_registers: list[int] = []


def pytest_configure(config: pytest.Config) -> None:
    for name, (where, _, _) in _PLACES.items():
        config.addinivalue_line("markers", f"{name}: a test of the Triton kernels, {where}")
    config.addinivalue_line("markers", "compiles: a test of torch.compile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, (_, is_absent, reason) in _PLACES.items():
            if is_absent and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name in _PLACES:
        if name in report.keywords and (report.when == "call" or report.skipped):
            _ran[f"{name} {report.outcome}"] += 1
            _registers.extend(value for key, value in report.user_properties if key == "registers")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say where the Triton kernels ran, so that nobody takes what was skipped for what passed."""
    parts = []
    for name, (where, _, reason) in _PLACES.items():
        passed, failed, skipped = (_ran[f"{name} {outcome}"] for outcome in ("passed", "failed", "skipped"))
        if passed or failed or skipped:
            counts = f"{passed} passed" + (f", {failed} failed" if failed else "")
            if name == "ahead_of_time" and _registers:
                counts += f" ({min(_registers)} to {max(_registers)} registers)"
            parts.append(f"{where}: {counts}" + (f", {skipped} not run ({reason})" if skipped else ""))
    if parts:
        terminalreporter.write_line("Triton kernels: " + "; ".join(parts))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer, as a base model lies on a disk."""
    folder = tmp_path_factory.mktemp("base")
    words = ["good", "bad", "film", "news", "product", "positive", "negative", "a", "the", "and", "of", "is", "it"]
    words += ["so", "text", "=>", "?", ".", "Decide", "whether", "or", "mild", "strong", "tweet"]
    tiny.tiny_model("llama").save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder
