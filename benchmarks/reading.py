"""Rows of JSON lines as `Source` reads them, beside the library `datasets` alone: rows a second and memory.

    python benchmarks/reading.py [--quick] [--device cpu|cuda] [--json PATH]

held: all rows in their order, as training reads what it encodes; `datasets` first makes a copy of the file in its
cache. streamed: the same without a copy. shuffled: streamed, ten thousand rows at a time. datasets, source: rows a
second. ratio: source over datasets. datasets_MB, source_MB: the most memory of a process that reads, beyond what it had
before. copy_MB: what `datasets` leaves in its cache; `Source` leaves nothing. Both have to give the same rows. The
large file is read once, and its seconds are those of the processor, so that what else runs there does not count.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from measure import digits, medians_in_turn, parse_options, progress, report

SHUFFLED = {"seed": 0, "buffer_size": 10_000}
WAYS = ("held", "streamed", "shuffled")
Read = tuple[int, int]


def write_rows(path: Path, count: int) -> Path:
    """A file of reviews with a label, a number and an id."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"Review {number}: a film of {number % 97} minutes, and not one of them is né too long. " * (
                1 + number % 3
            )
            row = {
                "id": f"{number:08}",
                "text": text,
                "label": ("positive", "negative")[number % 2],
                "score": number / 7,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def read_all(rows: Iterable[dict[str, Any]]) -> Read:
    """How many rows there are, and a sum over them that any order has."""
    count = total = 0
    for row in rows:
        count += 1
        total += zlib.crc32(row["text"].encode()) + zlib.crc32(row["label"].encode())
    return count, total


def by_datasets(path: Path, way: str, cache: str) -> Read:
    """The library `datasets` alone, with `cache` as its cache."""
    import datasets

    options = {"data_files": str(path), "split": "train", "cache_dir": cache, "streaming": way != "held"}
    data = datasets.load_dataset("json", **options)
    return read_all(data.shuffle(**SHUFFLED) if way == "shuffled" else data)


def by_source(path: Path, way: str, cache: str) -> Read:
    """`Source`, which uses no cache."""
    from lightning_softprompt import Source

    source = Source(str(path), streaming=way != "held", num_rows=None if way == "held" else 10**9)
    if way != "shuffled":
        return read_all(row for _, row in source.rows("train"))
    return read_all(row["row"] for row in source.stream("train")[0].shuffle(**SHUFFLED))


READERS = {"datasets": by_datasets, "source": by_source}


def once(reader: str, path: Path, way: str) -> dict[str, Any]:
    """One reading of `path` in a process of its own: its time, its memory and what it leaves in the cache."""
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_measure_once, args=(send, reader, path, way))
    child.start()
    send.close()
    found = receive.recv()
    child.join()
    return found


def _measure_once(send: Any, reader: str, path: Path, way: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        READERS[reader](write_rows(Path(folder) / "warm.jsonl", 1000), way, f"{folder}/warm")
        _forget_memory()
        before, start = _most_memory(), time.process_time()
        read = READERS[reader](path, way, f"{folder}/cache")
        seconds = time.process_time() - start
        left = sum(each.stat().st_size for each in Path(folder, "cache").rglob("*") if each.is_file())
        send.send({"seconds": seconds, "memory": _most_memory() - before, "left": left, "read": read})


def _most_memory() -> int:
    """The most bytes this process held in memory since the last `_forget_memory`; Linux alone tells."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def _forget_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def row_of(way: str, count: int, seconds: dict[str, float], reads: dict[str, Read]) -> dict[str, Any]:
    """One row of a table, without a time where the readers differ."""
    if reads["datasets"] != reads["source"] or reads["source"][0] != count:
        return {"way": way, "rows": "FAILED: other rows"}
    speed = {reader: count / seconds[reader] for reader in READERS}
    rounded = {reader: f"{digits(value):,.0f}" for reader, value in speed.items()}
    return {"way": way, **rounded, "ratio": digits(speed["source"] / speed["datasets"])}


def in_turn(path: Path, count: int) -> list[dict[str, Any]]:
    """Medians of each way, both readers in this process."""
    rows = []
    for way in WAYS:
        reads: dict[str, Read] = {}

        def call(reader: str, way: str = way, reads: dict[str, Read] = reads) -> Callable[[], None]:
            def read() -> None:
                with tempfile.TemporaryDirectory() as cache:
                    reads[reader] = READERS[reader](path, way, cache)

            return read

        seconds = medians_in_turn({reader: call(reader) for reader in READERS}, "cpu", repeats=5)
        rows.append(row_of(way, count, seconds, reads))
        progress.print(rows[-1])
    return rows


def once_each(path: Path, count: int, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Each of the ways once with each reader, in processes of their own."""
    rows = []
    for way in ways:
        found = {reader: once(reader, path, way) for reader in READERS}
        seconds = {reader: of["seconds"] for reader, of in found.items()}
        row = row_of(way, count, seconds, {reader: tuple(of["read"]) for reader, of in found.items()})
        memory = {f"{reader}_MB": digits(of["memory"] / 1e6) for reader, of in found.items()}
        rows.append({**row, **memory, "copy_MB": digits(found["datasets"]["left"] / 1e6)})
        progress.print(rows[-1])
    return rows


def main() -> None:
    options = parse_options(__doc__.splitlines()[0])
    few, many = (2_000, 20_000) if options.quick else (20_000, 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / "few.jsonl", few)
        tables = {f"{few:,} rows, medians in turn": in_turn(path, few)}
        path = write_rows(Path(folder) / "many.jsonl", many)
        name = f"{many:,} rows of {path.stat().st_size // many} bytes, each once in a process of its own"
        tables[name] = once_each(path, many, WAYS if options.quick else WAYS[:1])
    report("Reading JSON lines", tables, options)


if __name__ == "__main__":
    main()
