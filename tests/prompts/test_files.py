"""Files are written whole or not at all, and one writer at a time is in a folder."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lightning_softprompt import SoftPromptError
from lightning_softprompt.prompts import files
from lightning_softprompt.prompts.files import (
    LOCK_NAME,
    check_writable,
    whole_folder,
    write_atomically,
    write_new,
    writing,
)

HOLD = """
import sys
from pathlib import Path
from lightning_softprompt.prompts.files import writing
with writing(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("mode", [0o640, 0o664, 0o444])
def test_a_replaced_file_keeps_its_permissions(mode: int, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    path.chmod(mode)
    write_atomically(path, b"new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_new_file_has_the_usual_permissions(tmp_path) -> None:
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "usual").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fail(*_):
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
            patched.setattr(os, name, fail)
            write_atomically(tmp_path / "rows.jsonl", b"new")
    assert not os.listdir(tmp_path)
    (tmp_path / "there").write_text("theirs")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "there", b"ours", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "theirs"


def test_one_process_is_in_a_folder_at_a_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(SoftPromptError, match=r"another process has been writing into .* try again"):
            writing(tmp_path).__enter__()
        other.kill()  # its lock goes with it
        other.wait()
    with writing(tmp_path):
        pass


def test_one_thread_is_in_a_folder_at_a_time_and_may_enter_again(tmp_path) -> None:
    inside, most = [], []

    def write() -> None:
        with writing(tmp_path), writing(tmp_path):
            inside.append(1)
            most.append(len(inside))
            os.sched_yield()
            inside.pop()

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_a_folder_that_was_made_in_vain_goes_again(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "new" / "prompts"):
        _ = 1 / 0
    assert not os.listdir(tmp_path)
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
        _ = 1 / 0
    assert sorted(os.listdir(tmp_path / "new")) == [LOCK_NAME, "file"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "empty"):
        _ = 1 / 0
    assert (tmp_path / "empty").is_dir()


def test_whether_a_folder_can_be_written_is_found_without_a_trace(tmp_path) -> None:
    check_writable(tmp_path / "new" / "prompts")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(SoftPromptError, match="cannot be written"):
            check_writable(folder)
    with pytest.raises(SoftPromptError, match="cannot be written"), writing(tmp_path / "file"):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    check_writable(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes").exists()


@pytest.mark.parametrize("enter", [writing, lambda folder: whole_folder(folder, "mark")], ids=["writing", "whole"])
def test_a_folder_that_cannot_be_written_is_one_line(enter, tmp_path) -> None:
    (tmp_path / "file").touch()
    unseen = tmp_path / ("x" * 300)  # as one below a folder that may not be entered
    for folder in (unseen, tmp_path / "file" / "below", Path("/proc/prompts")):
        with pytest.raises(SoftPromptError, match="cannot be written") as caught, enter(folder):
            pass
        assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_a_whole_folder_takes_the_place_of_an_earlier_one_or_nothing_changes(tmp_path) -> None:
    target = tmp_path / "deep" / "served"
    with whole_folder(target, "mark") as staged:
        assert not target.exists() and staged.parent == target.parent
        (staged / "mark").write_text("first")
    with pytest.raises(RuntimeError), whole_folder(target, "mark") as staged:
        (staged / "mark").write_text("half")
        raise RuntimeError
    assert (target / "mark").read_text() == "first"
    with whole_folder(target, "mark") as staged:
        (staged / "mark").write_text("second")
    assert [path.name for path in target.parent.iterdir()] == ["served"] and (target / "mark").read_text() == "second"
    (target / "mark").unlink()
    (target / "mine").touch()
    with (
        pytest.raises(SoftPromptError, match="holds something else than an earlier export"),
        whole_folder(target, "mark"),
    ):
        pass
    assert [path.name for path in target.iterdir()] == ["mine"]
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "new" / "er" / "served", "mark"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty", "mark") as staged:
        (staged / "mark").touch()
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == stat.S_IMODE((tmp_path / "deep").stat().st_mode)


def test_a_link_to_a_folder_stays_one(tmp_path) -> None:
    (tmp_path / "disk" / "served").mkdir(parents=True)
    (tmp_path / "served").symlink_to(tmp_path / "disk" / "served")
    for words in ("first", "second"):
        with whole_folder(tmp_path / "served", "mark") as staged:
            (staged / "mark").write_text(words)
        assert (tmp_path / "disk" / "served" / "mark").read_text() == words
    assert (tmp_path / "served").is_symlink() and len([*tmp_path.iterdir()]) == 2
    assert len([*(tmp_path / "disk").iterdir()]) == 1


def test_a_folder_without_a_name_is_not_replaced(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SoftPromptError, match=r"'\.' cannot be replaced"), whole_folder(Path("."), "mark"):
        pass
    assert not os.listdir(tmp_path)
