"""What `dsllama encode` leaves on the disk: shards, and a journal of them from which an interrupted run goes on.

A shard is written aside, and gets its name when it is whole; then the journal says so, and where in the input the
next one begins. What is not in the journal does not exist.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsllama.data.documents import Cursor
from dsllama.data.manifest import MANIFEST_NAME, Manifest, Shard
from dsllama.errors import Problem, UserError
from dsllama.files import write_atomically

JOURNAL_NAME = "encode.journal"
TITLE = "cannot encode"
_ANEW = "use --overwrite to begin anew, or another --out"


class ShardWriter:
    """Streams ids into one `.npy` file of at most `capacity` of them, and its checksum along."""

    def __init__(self, folder: Path, number: int, dtype: str, capacity: int, sos_id: int) -> None:
        self.final, self._aside = _paths(folder, number)
        self.tokens = self.documents = 0
        self._capacity = capacity
        self._sos_id = sos_id
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = self._aside.open("w+b")
        # A full shard is the rule, so its header can be written, and counted into the checksum, before the ids.
        self._header = self._header_for(capacity)
        self._file.write(self._header)
        self._digest = hashlib.sha256(self._header)

    @property
    def full(self) -> bool:
        return self.tokens == self._capacity

    def add(self, ids: np.ndarray) -> int:
        """Append ids, as many as there is room for; returns how many."""
        part: np.ndarray = ids[: self._capacity - self.tokens].astype(self._dtype, copy=False)
        data = part.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(part)
        self.documents += int(np.count_nonzero(part == self._sos_id))
        return len(part)

    def publish(self) -> Shard:
        """Finish the file and give it its name."""
        if not self.full:
            header = self._header_for(self.tokens)
            assert len(header) == len(self._header), "NumPy leaves room for the length in its header"
            self._file.seek(0)
            self._file.write(header)
            self._file.seek(0)
            self._digest = hashlib.sha256()
            while data := self._file.read(2**20):
                self._digest.update(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._aside.rename(self.final)
        return Shard(self.final.name, self.tokens, self.documents, self._digest.hexdigest())

    def discard(self) -> None:
        """Forget an unfinished file; nothing after `publish`."""
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def _header_for(self, tokens: int) -> bytes:
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": (tokens,)})
        return buffer.getvalue()


@dataclass
class Journal:
    """How far an encoding has come. It is saved whole, in one step, after each shard.

    identity: what input and settings it belongs to. place, used: where the next shard begins: at that block of the
    input, after so many of its ids. skipped: what gave no document before that, the block included if `used` is not 0.
    """

    folder: Path
    identity: dict[str, Any]
    shards: list[Shard] = field(default_factory=list)
    place: Cursor = field(default_factory=Cursor)
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any], overwrite: bool) -> Journal:
        """The journal of an earlier attempt, or a new one; `overwrite` removes what earlier attempts wrote.

        Raises UserError where the folder holds something else, naming what is different.
        """
        path = folder / JOURNAL_NAME
        saved = _load(path)
        if saved is not None and not (folder / MANIFEST_NAME).exists():
            # A kill between the naming of a shard and its note here leaves one that does not exist.
            for unnoted in _paths(folder, len(saved["shards"])):
                unnoted.unlink(missing_ok=True)
        if overwrite:
            _remove(folder, saved)
            saved = None
        if saved is None or not saved["shards"]:
            others = sorted(file.name for file in (*folder.glob(MANIFEST_NAME), *folder.glob("*.npy")))
            if others:
                rule = f"holds {others[0]} already, not from an encoding that could go on"
                raise UserError(Problem(str(folder), rule, _ANEW), TITLE)
            return cls(folder, identity)
        if saved["identity"]["on_error"] == "stop":
            # Nothing was left out so far, so that "skip", from here on, gives what it would have from the beginning.
            saved["identity"]["on_error"] = identity["on_error"]
        changes = list(_changes(saved["identity"], identity))
        if changes:
            raise UserError([Problem(str(folder), f"was begun otherwise: {c}", _ANEW) for c in changes], TITLE)
        shards = [Shard(**shard) for shard in saved["shards"]]
        gone = [shard.file for shard in shards if not (folder / shard.file).is_file()]
        if gone:
            raise UserError([Problem(str(folder / file), "is gone", _ANEW) for file in gone], TITLE)
        return cls(folder, identity, shards, Cursor(*saved["place"]), saved["used"], saved["skipped"])

    def save(self) -> None:
        """Write it durably, in one step."""
        content = {
            "identity": self.identity,
            "shards": [asdict(shard) for shard in self.shards],
            "place": self.place,
            "used": self.used,
            "skipped": self.skipped,
        }
        write_atomically(self.folder / JOURNAL_NAME, json.dumps(content))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process. Raises UserError where another one is encoding into it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = Problem(str(folder), "is being written by another process", "wait for it, or stop it")
            raise UserError(problem, TITLE) from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(handle)


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    """A shard's own name, and the one under which it is written."""
    final = folder / f"shard_{number:05d}.npy"
    return final, folder / f".{final.name}.tmp"


def _load(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(Problem(str(path), f"is damaged ({error})", "delete it, and use --overwrite"), TITLE) from None


def _remove(folder: Path, saved: dict[str, Any] | None) -> None:
    """Delete what an encoding wrote and nothing else, the manifest first: no half of a data set may seem whole."""
    try:
        manifest = Manifest.load(folder)
    except UserError:
        manifest = None
    files = {shard.file for shard in manifest.shards} if manifest else set()
    files |= {shard["file"] for shard in saved["shards"]} if saved else set()
    for name in (MANIFEST_NAME, *sorted(files), JOURNAL_NAME):
        (folder / name).unlink(missing_ok=True)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What differs between two identities, in words."""
    before, after = ({file: stamp for file, *stamp in identity["input"]} for identity in (old, new))
    for file in sorted(before.keys() | after.keys()):
        if before.get(file) != after.get(file):
            what = "is no longer in the input" if file not in after else "was not in the input"
            yield f"{file} {'has changed since' if file in before and file in after else what}"
    if before == after and old["input"] != new["input"]:
        yield "the files were in another order"
    yield from (
        f"{name} was {old.get(name)!r}, now {new[name]!r}"
        for name in new
        if name != "input" and old.get(name) != new[name]
    )
