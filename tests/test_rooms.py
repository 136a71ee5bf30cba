"""What keeps the tree readable: each room has its tests under its name, and none grows too long."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "lightning_softprompt": ROOT / "tests",
    "kernels/softprompt_kernels": ROOT / "tests" / "kernels",
    "integrations/vllm/softprompt_vllm": ROOT / "tests" / "vllm",
}
ROOMS = [
    (path, tests / path.relative_to(ROOT / package).with_name(f"test_{path.name}"))
    for package, tests in PACKAGES.items()
    for path in sorted((ROOT / package).rglob("*.py"))
    if not path.stem.startswith("__")
]


@pytest.mark.parametrize(("room", "test"), ROOMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_room_has_a_test_file_of_its_name(room: Path, test: Path) -> None:
    assert test.is_file(), f"the tests of {room.relative_to(ROOT)} belong into {test.relative_to(ROOT)}"
    assert "def test_" in test.read_text(encoding="utf-8")


def test_no_file_is_too_long_to_read() -> None:
    files = [path for folder in (*PACKAGES, "tests", "integrations") for path in (ROOT / folder).rglob("*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lengths) > 100
    assert {path: length for path, length in lengths.items() if length > 300} == {}
