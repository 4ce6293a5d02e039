"""What encoding costs: `python -m benchmarks.encode` writes benchmarks/results/encode.json and prints a table.

    the standard library's text, repeated -> per layout, in turn and several times over: simple | ours | no tiktoken
    the same text, x1, x2, x4            -> ours, in a process of its own: the most memory of all its processes

`simple` is what one writes without a program for it: for each file `tokenizer.encode` of the whole file, and the ids
saved as `.npy`. `ours` is `dsllama encode`, from the call to the manifest: the start of its workers, <SOS> and <EOS>,
checksums and journal included. `no tiktoken` is ours where tiktoken cannot be used. Each layout is the same text: few
large files, or each document in a file of its own. Ratios are taken within each round. The ids are compared, once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import save
from dsllama.data.corpus import gather_stdlib_corpus
from dsllama.data.encode import encode
from dsllama.data.fast_bpe import FastEncoder
from dsllama.data.manifest import Manifest
from dsllama.data.tokenizer import Tokenizer, train_tokenizer

LAYOUTS = ("large files", "small files")
WAYS = ("simple", "ours", "no tiktoken")
SIZES = (1, 2, 4)
LARGE_CHARACTERS = 2_500_000


def simple(files: list[Path], tokenizer_path: Path, out: Path) -> None:
    """One `tokenizer.encode` of each whole file."""
    backend = Tokenizer.load(tokenizer_path).backend
    for number, path in enumerate(files):
        ids = backend.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
        np.save(out / f"{number:06}.npy", np.array(ids, dtype=np.uint16))


def measure(rounds: int, copies: int, workers: int) -> dict[str, Any]:
    """Everything that the table shows."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        corpus = gather_stdlib_corpus(folder / "corpus")
        tokenizer_path = folder / "bpe.json"
        train_tokenizer([corpus], tokenizer_path)
        texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
        size = sum(len(text.encode()) for text in texts)
        results: dict[str, Any] = {
            "data": {
                "source": f"CPython {platform.python_version()}'s standard library",
                "bytes": size * copies,
                "documents": len(texts) * copies,
            },
            "workers": workers,
            "tiktoken": version("tiktoken"),
            "speed": {},
        }
        for layout in LAYOUTS:
            files = _write(texts, copies, folder / layout, layout)
            results["speed"][layout] = _speed(files, tokenizer_path, folder, workers, rounds)
            shutil.rmtree(folder / layout)
        results["memory"] = [_memory(texts, copies * size, tokenizer_path, folder, workers) for size in SIZES]
        return results


def _write(texts: list[str], copies: int, folder: Path, layout: str) -> list[Path]:
    """Each copy has its documents in an order of its own, so that no two large files are the same."""
    folder.mkdir()
    smallest = LARGE_CHARACTERS if layout == "large files" else 0
    files: list[Path] = []
    for copy in range(copies):
        held: list[str] = []
        for number in random.Random(copy).sample(range(len(texts)), len(texts)):
            held.append(texts[number])
            if sum(map(len, held)) >= smallest:
                files.append(_write_file(folder, len(files), held))
                held = []
        if held:
            files.append(_write_file(folder, len(files), held))
    return files


def _write_file(folder: Path, number: int, texts: list[str]) -> Path:
    path = folder / f"{number:06}.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def _speed(files: list[Path], tokenizer_path: Path, folder: Path, workers: int, rounds: int) -> dict[str, Any]:
    out = folder / "out"
    slow_path = _without_tiktoken(tokenizer_path, folder / "slow.json")
    runs: dict[str, Callable[[], object]] = {
        "simple": lambda: simple(files, tokenizer_path, out),
        "ours": lambda: encode(files, tokenizer_path, out, workers=workers, progress=False),
        "no tiktoken": lambda: encode(files, slow_path, out, workers=workers, progress=False),
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    ids: dict[str, np.ndarray] = {}
    for round_ in range(rounds):
        for way in WAYS:
            out.mkdir()
            start = time.perf_counter()
            runs[way]()
            seconds[way].append(time.perf_counter() - start)
            if round_ == 0:
                ids[way] = _ids(out)
            shutil.rmtree(out)
    special = 2  # <SOS> and <EOS> have the ids 0 and 1
    assert all(np.array_equal(ids["simple"], ids[way][ids[way] >= special]) for way in WAYS)
    size = sum(path.stat().st_size for path in files)
    return {
        "files": len(files),
        "tokens": len(ids["simple"]),
        "megabytes_per_second": {way: _spread([size / 1e6 / t for t in times]) for way, times in seconds.items()},
        "tokens_per_second": {way: _spread([len(ids["simple"]) / t for t in times]) for way, times in seconds.items()},
        "ratio": {way: _spread(_ratios(seconds["simple"], seconds[way])) for way in WAYS[1:]},
    }


def _without_tiktoken(tokenizer_path: Path, other: Path) -> Path:
    """The same tokenizer, so described that tiktoken is not used: for words in the vocabulary, merging is skipped."""
    content = json.loads(tokenizer_path.read_text(encoding="utf-8"))
    content["model"]["ignore_merges"] = True
    other.write_text(json.dumps(content), encoding="utf-8")
    assert FastEncoder(Tokenizer.load(other)).slow_because
    return other


def _ids(folder: Path) -> np.ndarray:
    manifest = Manifest.load(folder)
    names = [shard.file for shard in manifest.shards] if manifest else sorted(p.name for p in folder.iterdir())
    return np.concatenate([np.load(folder / name) for name in names])


def _memory(texts: list[str], copies: int, tokenizer_path: Path, folder: Path, workers: int) -> dict[str, Any]:
    """The greatest sum of resident memory over our process and its workers, looked at every 20 ms.

    Pages that they share, such as Python itself, count once for each.
    """
    path, out = folder / "all.jsonl", folder / "out"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(copies):
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    arguments = [str(path), str(tokenizer_path), str(out), str(workers)]
    code = (
        "import sys; from dsllama.data.encode import encode; path, tokenizer, out, workers = sys.argv[1:]; "
        "encode([path], tokenizer, out, workers=int(workers), progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    most = 0
    while process.poll() is None:
        most = max(most, _resident(psutil.Process(process.pid)))
        time.sleep(0.02)
    assert process.returncode == 0
    size = path.stat().st_size
    shutil.rmtree(out)
    path.unlink()
    return {"bytes": size, "peak_bytes": most}


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
    return total


def _spread(values: list[float]) -> list[float]:
    """Median, least and greatest."""
    return [median(values), min(values), max(values)]


def _ratios(theirs: list[float], ours: list[float]) -> list[float]:
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def render(results: dict[str, Any]) -> str:
    """The table that people read."""
    data = results["data"]
    lines = [
        f"{data['bytes'] / 1e6:.0f} MB of text, {data['documents']:,} documents, {results['workers']} workers; "
        "median (least-greatest)",
        "",
        f"{'':>12} {'files':>6} "
        + " ".join(f"{way + ', MB/s':>20}" for way in WAYS)
        + " ".join(f"{way + ' / simple':>22}" for way in WAYS[1:]),
    ]
    for layout, speed in results["speed"].items():
        values = " ".join(f"{_range(speed['megabytes_per_second'][way], 1):>20}" for way in WAYS)
        ratios = " ".join(f"{_range(speed['ratio'][way], 2):>22}" for way in WAYS[1:])
        lines.append(f"{layout:>12} {speed['files']:>6} {values}{ratios}")
    lines += ["", "most memory of ours, its process and workers together:"]
    first = results["memory"][0]["peak_bytes"]
    for row in results["memory"]:
        peak = row["peak_bytes"]
        size = f"{row['bytes'] / 1e6:>8.0f} MB of input"
        lines.append(f"{size}: {peak / 2**20:>5.0f} MiB ({peak / first:.2f} x the first)")
    return "\n".join(lines)


def _range(values: list[float], digits: int) -> str:
    middle, least, greatest = (f"{value:,.{digits}f}" for value in values)
    return f"{middle} ({least}-{greatest})"


def main() -> None:
    parser = argparse.ArgumentParser(description="The speed of encoding, beside the simple way; and its memory.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=4, help="of the standard library's text, of about 10 MB each")
    parser.add_argument("--workers", type=int, default=2)
    results = measure(**vars(parser.parse_args()))
    print(render(results))
    save("encode", results)


if __name__ == "__main__":
    main()
