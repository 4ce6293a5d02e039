"""Raw text -> .npy token shards: in parallel, in bounded memory, restartable, the same for any number of workers.

    files -> blocks, in order -> worker processes: documents -> ids, <SOS> and <EOS> round each
                              -> one writer, in order: shards, each noted in the manifest

Every shard but the last has exactly `shard_tokens` ids; a document may go on in the next one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dsllama.data.chunks import CUTTING
from dsllama.data.documents import Block, Cursor, blocks, input_files, no_documents
from dsllama.data.fast_bpe import FastEncoder
from dsllama.data.manifest import TITLE, Manifest, token_dtype
from dsllama.data.readers import BLOCK_BYTES
from dsllama.data.shards import ShardWriter
from dsllama.data.stream import TokenStream
from dsllama.data.tokenizer import Tokenizer
from dsllama.data.workers import WorkerDied, WorkerPool
from dsllama.errors import Problem, UserError, remedy_for
from dsllama.locks import locked
from dsllama.machine import usable_cores

_GOES_ON = "run the same command again: it goes on where it stopped"
_MOST_PROBLEMS = 100
# Letters of two and three bytes, digits, signs: what any tokenizer for text gives back.
_SAMPLE = "Two words, 3 h\u00e9llo \u4f60 (x)!"


class Encoded(NamedTuple):
    """What a worker made of a block: the ids of its documents, and what gave none."""

    ids: np.ndarray
    skipped: Counter[str]
    problems: list[Problem]
    following: Cursor
    disk_bytes: int


def encode(
    inputs: Sequence[str | Path],
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

    workers: processes, None for one per core; the result does not depend on it. shard_tokens: ids per shard.
    on_error: "stop" raises at bad input, "skip" leaves it out and counts it by kind in the manifest.
    overwrite: remove an earlier data set of ours from `out_dir` first. progress: a bar and notes on stderr.
    A finished data set of the same input and settings is returned as it is; an interrupted one goes on where it
    stopped. Raises UserError for bad input, a folder that holds something else, a full disk, a worker that died.
    """
    out_dir = Path(out_dir)
    workers = usable_cores() if workers is None else workers
    _check(out_dir, workers, shard_tokens, on_error)
    files = input_files(inputs)
    tokenizer = Tokenizer.load(tokenizer_path)
    given_back = tokenizer.decode(tokenizer.encode(_SAMPLE))
    if given_back.replace("\u2581", " ").strip() != _SAMPLE:  # SentencePiece's sign for a blank
        rule = f"loses text: of {_SAMPLE!r} it leaves {given_back!r}"
        problem = Problem("--tokenizer", rule, "train one with `dsllama tokenizer`", str(tokenizer_path))
        raise UserError(problem, TITLE)
    identity = {
        "input": _stamps(files),
        "tokenizer": tokenizer.fingerprint,
        "shard_tokens": shard_tokens,
        "text_field": text_field,
        "on_error": on_error,
        "cutting": CUTTING,
    }
    say: Callable[[str], None] = partial(print, file=sys.stderr) if progress else lambda _: None
    with _explained(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        with locked(out_dir, TITLE):
            new = Manifest(
                dtype=token_dtype(tokenizer.vocab_size),
                vocab_size=tokenizer.vocab_size,
                tokenizer=tokenizer.fingerprint,
                shards=[],
                identity=identity,
                resume={"cursor": [0, 0], "used": 0},
            )
            manifest = Manifest.begin(out_dir, new, overwrite)
            if manifest.resume is None:
                TokenStream(out_dir)  # raises where a shard is no longer what it was
                say(f"{out_dir}: already encoded")
                return manifest
            if manifest.shards:
                say(f"{out_dir}: going on after {len(manifest.shards)} finished shards")
            encoder = FastEncoder(tokenizer)
            if encoder.slow_because:
                say(f"encoding at about a third of the speed: {encoder.slow_because}")
            skipped = _write_shards(files, tokenizer, out_dir, manifest, workers, progress, encoder.may_cut)
            if not manifest.shards:
                raise no_documents(files, skipped)
            if _stamps(files) != identity["input"]:
                raise UserError(Problem("inputs", "changed while they were encoded", "use --overwrite"), TITLE)
            manifest.skipped, manifest.resume = dict(sorted(skipped.items())), None
            manifest.save(out_dir)
            return manifest


def _write_shards(
    files: list[Path], tokenizer: Tokenizer, out_dir: Path, manifest: Manifest, workers: int, progress: bool, cut: bool
) -> Counter[str]:
    """Encode everything that the manifest has not yet; returns what was skipped in the whole input, by kind."""
    assert manifest.resume is not None
    identity = manifest.identity
    sizes = [path.stat().st_size for path in files]
    total = sum(sizes)
    # More workers than blocks would only have to be started.
    workers = max(1, min(workers, -(-total // BLOCK_BYTES)))
    place, used, skipped = Cursor(*manifest.resume["cursor"]), manifest.resume["used"], Counter(manifest.skipped)
    noted = len(manifest.shards)

    def new_writer() -> ShardWriter:
        number = len(manifest.shards)
        return ShardWriter(out_dir, number, manifest.dtype, identity["shard_tokens"], tokenizer.sos_id)

    def publish(following: Cursor, offset: int) -> None:
        manifest.shards.append(writer.publish())
        manifest.resume, manifest.skipped = {"cursor": [*following], "used": offset}, dict(skipped)
        nonlocal noted
        if len(manifest.shards) > 1.02 * noted:  # each, but where there are very many: it is written whole each time
            manifest.save(out_dir)
            noted = len(manifest.shards)

    manifest.save(out_dir)
    writer = new_writer()
    make = partial(_block_encoder, tokenizer.backend.to_str())
    done, hidden = sum(sizes[: place.file]), not progress or None
    bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="encoding", disable=hidden)
    try:
        with bar, WorkerPool(workers, make) as pool:
            for encoded in pool.in_order(blocks(files, identity["text_field"], place, cut)):
                if encoded.problems and identity["on_error"] == "stop":
                    raise UserError(encoded.problems, TITLE)
                if not used:
                    skipped.update(encoded.skipped)
                while used < len(encoded.ids):
                    used += writer.add(encoded.ids[used:])
                    if writer.full:
                        at_end = used == len(encoded.ids)
                        publish(*((encoded.following, 0) if at_end else (place, used)))
                        writer = new_writer()
                place, used = encoded.following, 0
                bar.update(encoded.disk_bytes)
            bar.update(total - bar.n)
        if writer.tokens:
            publish(place, 0)
    finally:
        writer.discard()
    return skipped


def _block_encoder(tokenizer_json: str) -> Callable[[Block], Encoded]:
    """What a worker does: a block of input to ids."""
    tokenizer = Tokenizer(tokenizer_json, Path())
    to_ids, dtype = FastEncoder(tokenizer), np.dtype(token_dtype(tokenizer.vocab_size))
    sos, eos = np.array([tokenizer.sos_id], dtype), np.array([tokenizer.eos_id], dtype)

    def encode_block(block: Block) -> Encoded:
        found = block.read()
        parts: list[np.ndarray] = [np.empty(0, dtype)]
        for document, ids in zip(found.documents, to_ids([d.text for d in found.documents]), strict=True):
            parts += [sos] if document.starts else []
            parts.append(ids.astype(dtype))
            parts += [eos] if document.ends else []
        problems = found.problems[:_MOST_PROBLEMS]
        return Encoded(np.concatenate(parts), found.skipped, problems, block.following, block.disk_bytes)

    return encode_block


@contextmanager
def _explained(out_dir: Path) -> Iterator[None]:
    """Say in a UserError what no check can foresee, and after Ctrl-C how to go on."""
    try:
        yield
    except WorkerDied as error:
        problem = Problem("workers", str(error), f"{_GOES_ON}; --workers 1 needs the least memory")
        raise UserError(problem, TITLE) from None
    except OSError as error:
        where = str(error.filename or out_dir)
        remedy = f"{remedy_for(error, 'see to it')}; then {_GOES_ON}"
        raise UserError(Problem(where, f"cannot be read or written ({error.strerror})", remedy), TITLE) from None
    except KeyboardInterrupt:
        print(f"stopped; {_GOES_ON}", file=sys.stderr)
        raise


def _check(out_dir: Path, workers: int, shard_tokens: int, on_error: str) -> None:
    problems = []
    if workers < 1:
        problems.append(Problem("workers", "must be at least 1", "leave it out for one per core", workers))
    if shard_tokens < 1:
        problems.append(Problem("shard_tokens", "must be at least 1", "100e6 makes files of 200 MB", shard_tokens))
    if on_error not in ("stop", "skip"):
        problems.append(Problem("on_error", "must be 'stop' or 'skip'", "use 'stop' to see all of it", on_error))
    if out_dir.exists() and not out_dir.is_dir():
        problems.append(Problem("--out", "is a file, not a folder", "give another name", str(out_dir)))
    if problems:
        raise UserError(problems, TITLE)


def _stamps(files: list[Path]) -> list[list[Any]]:
    """By which the same input is known again: path, size in bytes, time of the last change in nanoseconds."""
    return [[str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]
