"""The campaign on the file system: what lies in a checkpoint is damaged, file by file, and disks fail in writing it.

    make long-test ARGS=tests/checkpoint/test_file_faults.py      SEED=2 for other draws

What a rank of a shared launch does, and which faults there are; tests/failing_disk.c makes calls fail.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

SEED = int(os.environ.get("SEED", "1"))
# Kinds of calls, by the letter that tests/failing_disk.c knows them by, and how each may fail.
OPERATIONS = {"w": "write", "f": "fsync", "o": "open", "n": "rename", "m": "mkdir", "u": "unlink"}
ERRORS = {"w": [errno.ENOSPC, errno.EIO], "f": [errno.EIO, errno.ENOSPC]}
OTHER_ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS]
FOR_GOOD = 10**9
FILES = [
    "manifest.json", "config.yaml", "deepspeed.json", "tokenizer.json",
    *(f"{kind}_{rank:05d}.safetensors" for kind in ("weights", "optimizer") for rank in (0, 1)),
]  # fmt: skip
DAMAGES = [
    "gone", "empty", "half", "a byte short", "a byte more", *(f"bit {number}" for number in range(3)), "page of zeros",
    "unreadable", "a folder",
]  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """Calls of one kind fail below ckpt_dir on a rank, after a share of those that it would make, `times` times."""

    number: int
    operation: str
    error: int
    rank: int
    share: float
    times: int

    def __str__(self) -> str:
        often = "once" if self.times == 1 else "for good"
        return f"{self.number} {OPERATIONS[self.operation]} {errno.errorcode[self.error]} rank {self.rank} {often}"


def failures(count: int) -> list[Failure]:
    """As many as are wanted, drawn by the seed."""
    found = []
    for number in range(count):
        drawn = random.Random(f"{SEED} {number}")
        operation = "wfonmu"[number % 6]
        error = drawn.choice(ERRORS.get(operation, OTHER_ERRORS))
        # A disk that is full for one call only takes the rest at the next one.
        times = FOR_GOOD if (operation, error) == ("w", errno.ENOSPC) else drawn.choice([1, FOR_GOOD])
        found.append(Failure(number, operation, error, drawn.randrange(2), drawn.random(), times))
    return found


def damage(file: Path, how: str) -> None:
    """Spoil a file; what is drawn is drawn by the seed."""
    drawn = random.Random(f"{SEED} {file.name} {how}")
    content = bytearray(file.read_bytes())
    file.unlink()  # it may be a hard link of another's
    if how == "a folder":
        file.mkdir()
    elif how == "half":
        file.write_bytes(content[: len(content) // 2])
    elif how == "a byte short":
        file.write_bytes(content[:-1])
    elif how == "a byte more":
        file.write_bytes(content + b"\0")
    elif how == "page of zeros":
        at = drawn.randrange(0, len(content), 4096)
        file.write_bytes(content[:at] + bytes(min(4096, len(content) - at)) + content[at + 4096 :])
    elif how.startswith("bit "):
        content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
        file.write_bytes(content)
    elif how != "gone":
        file.write_bytes(content if how == "unreadable" else b"")


def built(folder: Path) -> Path:
    """tests/failing_disk.c, compiled; for LD_PRELOAD."""
    library = folder / "failing_disk.so"
    source = Path(__file__).with_name("failing_disk.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, cwd=folder)
    return library


# ---------------------------------------------------------------- in a rank


def train(words: list[str], below: str, rank: int, operation: str, error: int, after: int, times: int) -> list[int]:
    """A training on whose disk a rank's calls fail: exit code, calls that failed, calls that were made. rank: or -1 for
    all; after: the first call that fails, from 1. Calls for reading fail from the start on, others once it trains: a
    rank that cannot start ends, for which the others, in a launch that is shared, would wait."""
    from dsllama.training.run import main
    from dsllama.training.trainer import Trainer

    disk, run = ctypes.CDLL(None), Trainer.run
    kind = ord(operation) if rank in (int(os.environ.get("RANK", "0")), -1) else 0

    def failing(self: Trainer) -> str:
        disk.disk_fails(below.encode(), kind, after, error, times)
        return run(self)

    if operation == "r":
        disk.disk_fails(below.encode(), kind, after, error, times)
    else:
        Trainer.run = failing  # type: ignore[method-assign]
    try:
        code = main(words)
    finally:
        made, failed = disk.disk_seen(), disk.disk_failed()
        disk.disk_fails(b"", 0, 0, 0, 0)
        Trainer.run = run  # type: ignore[method-assign]
    return [code, failed, made]
