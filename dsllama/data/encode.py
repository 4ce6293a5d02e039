"""Raw text -> .npy token shards: in parallel, in bounded memory, restartable, the same for any number of workers.

    blocks of input, in order -> workers: documents -> ids, <SOS> and <EOS> round each
                              -> one writer, in order: shards, a journal line each, the manifest last

A shard ends with the block that fills it, so a finished shard is a whole number of blocks, and a run that was
killed goes on after the last one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dsllama.data.bulk import BulkEncoder
from dsllama.data.documents import Block, blocks, input_files
from dsllama.data.manifest import MANIFEST_NAME, Manifest, Shard, token_dtype
from dsllama.data.tokenizer import Tokenizer
from dsllama.errors import Problem, UserError

JOURNAL_NAME = "encode.journal"
_TITLE = "cannot encode"


@dataclass(frozen=True)
class Encoded:
    """What a worker made of one block."""

    ids: np.ndarray
    documents: int
    skipped: dict[str, int]
    problems: list[Problem]
    disk_bytes: int


def encode(
    inputs: list[Path],
    tokenizer_path: str | Path,
    out_dir: str | Path,
    workers: int | None = None,
    shard_tokens: int = 100_000_000,
    text_field: str = "text",
    on_error: str = "stop",
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Encode files and folders of raw text into `out_dir`; returns the manifest that it wrote there.

    workers: processes, None for one per core. shard_tokens: a shard is closed when it holds so many or more.
    on_error: "stop" raises at bad input, "skip" leaves it out and counts it. A finished data set of the same
    input and settings is returned as it is; an interrupted one goes on. Raises UserError.
    """
    out_dir = Path(out_dir)
    if shard_tokens < 1 or (workers is not None and workers < 1):
        raise UserError(Problem("shard_tokens, workers", "must be at least 1", value=(shard_tokens, workers)), _TITLE)
    files = input_files(inputs)
    tokenizer = Tokenizer.load(tokenizer_path)
    settings = {
        "input": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "tokenizer": tokenizer.fingerprint,
        "settings": {"shard_tokens": shard_tokens, "text_field": text_field, "on_error": on_error},
    }
    journal = Journal.open(out_dir, settings, overwrite)
    finished = Manifest.load(out_dir)
    if finished is not None and len(finished.shards) == len(journal.entries):
        return finished
    count = workers or _cores()
    # A spawned worker starts clean: forking a process that has threads can deadlock.
    with ProcessPoolExecutor(count, get_context("spawn"), _start_worker, (str(tokenizer_path), text_field)) as pool:
        try:
            _write_shards(pool, 2 * count + 1, blocks(files), journal, tokenizer, shard_tokens, on_error,
                          sum(f.stat().st_size for f in files), progress)
        except BrokenProcessPool:
            raise UserError(Problem("workers", "a worker process died (out of memory?)",
                                    "run the same command again: it goes on; --workers 1 needs least"), _TITLE) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    shards = [Shard(**entry["shard"]) for entry in journal.entries]
    skipped = Counter[str]()
    for entry in journal.entries:
        skipped.update(entry["skipped"])
    if not shards:
        journal.path.unlink()
        raise UserError(Problem(", ".join(map(str, inputs)), "holds no text", "give files with text in them"), _TITLE)
    manifest = Manifest(token_dtype(tokenizer.vocab_size), tokenizer.vocab_size, tokenizer.fingerprint, shards, dict(skipped))
    manifest.save(out_dir)
    return manifest


class Journal:
    """What is finished, a JSON line per shard; the first line says what input and settings it belongs to."""

    def __init__(self, path: Path, entries: list[dict[str, Any]]) -> None:
        self.path = path
        self.entries = entries

    @classmethod
    def open(cls, out_dir: Path, settings: dict[str, Any], overwrite: bool) -> Journal:
        """The journal of an earlier attempt, or a new one. UserError where `out_dir` holds something else."""
        path = out_dir / JOURNAL_NAME
        out_dir.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(path)
        if overwrite or not lines:
            others = sorted(p.name for p in out_dir.glob("*.npy")) + [n for n in (MANIFEST_NAME,) if (out_dir / n).exists()]
            if others and not overwrite:
                raise UserError(Problem(str(out_dir), f"already holds {others[0]}", "use --overwrite or another --out"), _TITLE)
            for name in others:
                (out_dir / name).unlink()
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return cls(path, [])
        changed = [name for name in settings if lines[0].get(name) != settings[name]]
        if changed:
            rule = f"was begun with another {' and another '.join(changed)}"
            raise UserError(Problem(str(out_dir), rule, "use --overwrite to begin anew, or another --out"), _TITLE)
        entries = list(takewhile(lambda entry: (out_dir / entry["shard"]["file"]).exists(), lines[1:]))
        # Written anew, without a line that a crash cut off and without what lies after a shard that is gone.
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [lines[0], *entries]), encoding="utf-8")
        temporary.replace(path)
        return cls(path, entries)

    def add(self, entry: dict[str, Any]) -> None:
        """Note a finished shard, durably."""
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def blocks_done(self) -> int:
        return self.entries[-1]["blocks"] if self.entries else 0


class ShardWriter:
    """Streams ids into one `.npy` file; the length in its header is filled in at the end."""

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self.final = folder / f"shard_{number:05d}.npy"
        self._aside = folder / f".{self.final.name}.tmp"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = self._aside.open("wb")
        self._header_bytes = self._header(0)
        self.tokens = self.documents = 0
        self.skipped: Counter[str] = Counter()

    def add(self, block: Encoded) -> None:
        """Append what a worker made of a block."""
        self._file.write(block.ids.astype(self._dtype, copy=False).tobytes())
        self.tokens += len(block.ids)
        self.documents += block.documents
        self.skipped.update(block.skipped)

    def publish(self, blocks_done: int) -> dict[str, Any]:
        """Finish the file, give it its name, and return its journal entry."""
        self._file.seek(0)
        # NumPy leaves room for the length to grow, so the header keeps its size.
        assert self._header(self.tokens) == self._header_bytes
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = hashlib.sha256()
        with self._aside.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        self._aside.rename(self.final)
        shard = Shard(self.final.name, self.tokens, self.documents, digest.hexdigest())
        return {"shard": asdict(shard), "blocks": blocks_done, "skipped": dict(self.skipped)}

    def discard(self) -> None:
        """Forget an unfinished file."""
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def _header(self, tokens: int) -> int:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(self._file, {"descr": descr, "fortran_order": False, "shape": (tokens,)})
        return self._file.tell()


def _write_shards(
    pool: ProcessPoolExecutor, in_flight: int, source: Iterator[Block], journal: Journal, tokenizer: Tokenizer,
    shard_tokens: int, on_error: str, total_bytes: int, progress: bool,
) -> None:
    dtype = token_dtype(tokenizer.vocab_size)
    folder = journal.path.parent
    writer = ShardWriter(folder, len(journal.entries), dtype)
    done = 0
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="encoding", disable=not progress or None) as bar:
        while done < journal.blocks_done:  # cut again, as before, but not encoded again
            bar.update(next(source).disk_bytes)
            done += 1
        try:
            for encoded in _in_order(pool, in_flight, source):
                done += 1
                bar.update(encoded.disk_bytes)
                if encoded.problems and on_error == "stop":
                    raise UserError(encoded.problems, _TITLE)
                writer.add(encoded)
                if writer.tokens >= shard_tokens:
                    journal.add(writer.publish(done))
                    writer = ShardWriter(folder, len(journal.entries), dtype)
            if writer.tokens:
                journal.add(writer.publish(done))
        finally:
            writer.discard()


def _in_order(pool: ProcessPoolExecutor, in_flight: int, source: Iterator[Block]) -> Iterator[Encoded]:
    """Results in the order of the blocks, with at most `in_flight` of them in memory."""
    waiting: deque[Future[Encoded]] = deque()
    for block in source:
        waiting.append(pool.submit(_encode_block, block))
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ------------------------------------------------------------ in a worker


_worker: dict[str, Any] = {}


def _start_worker(tokenizer_path: str, text_field: str) -> None:
    import signal

    # Ctrl-C goes to the parent, which ends the pool; a worker's own traceback would only be noise.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes are the parallelism
    tokenizer = Tokenizer.load(tokenizer_path)
    _worker.update(tokenizer=tokenizer, encoder=BulkEncoder(tokenizer), text_field=text_field)


def _encode_block(block: Block) -> Encoded:
    tokenizer: Tokenizer = _worker["tokenizer"]
    found = block.read(_worker["text_field"])
    dtype = token_dtype(tokenizer.vocab_size)
    sos, eos = (np.array([number], dtype) for number in (tokenizer.sos_id, tokenizer.eos_id))
    parts: list[np.ndarray] = []
    for document, ids in zip(found.documents, _worker["encoder"]([d.text for d in found.documents]), strict=True):
        parts += [*([sos] if document.starts else []), ids.astype(dtype), *([eos] if document.ends else [])]
    ids = np.concatenate(parts) if parts else np.empty(0, dtype)
    skipped = {kind: n for kind, n in (("empty", found.empty), ("bad", len(found.problems))) if n}
    documents = sum(document.ends for document in found.documents)
    return Encoded(ids, documents, skipped, found.problems, block.disk_bytes)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a journal; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
