"""Writing files: each whole or not at all, and one writer of a folder at a time."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_softprompt.errors import SoftPromptError

LOCK_NAME = ".soft_prompts.lock"
# Seconds that a writer waits for another one. A writer holds the lock while it writes some kilobytes.
_PATIENCE = 60.0


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make `folder` if it does not exist, and keep all other writers out of it, of this and of other processes.

    It may be entered again by the thread that is in it. Readers need no lock. If the block raises, a folder that was
    made for it and is still empty is removed.

    Raises:
        SoftPromptError: a folder that cannot be written, or another writer that does not end.
    """
    # Only a singleton can be acquired again by the thread that holds it.
    lock = FileLock(folder / LOCK_NAME, is_singleton=True)
    with errors_name(folder):
        missing = _missing(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout as error:
            raise SoftPromptError(
                f"another process has been writing into {folder} for {_PATIENCE:.0f} seconds; try again when it "
                "has ended"
            ) from error
    try:
        yield
    except BaseException:
        _remove_empty(folder, missing)
        raise
    finally:
        lock.release()


def check_writable(folder: Path) -> None:
    """Raise a `SoftPromptError` where a writer could not get into `folder`, and leave no folder behind."""
    with errors_name(folder):
        missing = _missing(folder)
    with writing(folder):
        _remove_empty(folder, missing)


@contextmanager
def errors_name(folder: Path) -> Iterator[None]:
    """Raise an operating system's error in the block as a `SoftPromptError` that names `folder`."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter from a file system without locks
        raise SoftPromptError(
            f"{folder} cannot be written ({error}); make it a folder that you may write into, with free space, or "
            "choose another one"
        ) from error


def write_new(path: Path, data: bytes, replaced: Path) -> None:
    """Write `data` to `path`, which must not exist, down to the disk, with the permissions of the file `replaced`.

    If there is no file `replaced`, it gets the usual permissions of new files. If writing fails, nothing is left.
    """
    file = path.open("xb")
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            path.chmod(stat.S_IMODE(replaced.stat().st_mode))
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file and rename that to `path`, so that nobody ever reads half a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "answers.txt", b"yes")
        ...     [(each.name, each.read_text()) for each in Path(folder).iterdir()]
        [('answers.txt', 'yes')]
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_new(temporary, data, path)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path, mark: str) -> Iterator[Path]:
    """A new folder beside `folder`, for files that are too large for memory; it takes its place when the block ends.

    If the block raises, nothing is left of the new folder, and `folder` is what it was.

    Args:
        folder: a folder that does not exist, is empty, or holds a file `mark`, as one that was written before does.
        mark: the name of that file.

    Raises:
        SoftPromptError: a folder that holds something else, has no name, as ".", or cannot be written.
    """
    if not folder.name:
        raise SoftPromptError(f"{str(folder)!r} cannot be replaced by another folder; give the name of a folder in it")
    with errors_name(folder):
        folder = folder.resolve()  # a link stays one, and what it leads to is replaced
        missing = [each for each in folder.parents if not each.exists()]
        is_full = folder.exists() and not (folder.is_dir() and ((folder / mark).is_file() or not any(folder.iterdir())))
    if is_full:
        raise SoftPromptError(f"{folder} holds something else than an earlier export (no {mark}); choose another one")
    staged, earlier = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}") for _ in range(2))
    try:
        with errors_name(folder):
            staged.mkdir(parents=True)
        yield staged
        with errors_name(folder):
            if folder.exists():
                os.replace(folder, earlier)
            os.replace(staged, folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        if earlier.exists() and not folder.exists():
            os.replace(earlier, folder)
        with suppress(OSError):
            for each in missing:
                each.rmdir()
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _missing(folder: Path) -> list[Path]:
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove_empty(folder: Path, missing: list[Path]) -> None:
    """Remove the folders in `missing`, which were made for a writer, if that has written nothing."""
    if missing and [each.name for each in folder.iterdir()] == [LOCK_NAME]:
        with suppress(OSError):  # another writer waits in it
            (folder / LOCK_NAME).unlink()
            for each in missing:
                each.rmdir()
