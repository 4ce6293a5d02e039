"""Saving while the training goes on: it stands still for a copy of the state, and a thread writes that to disk.

    begin    all ranks   the pinned loss, the copy into memory that was set up at the start     (the stall)
             a thread    blocks, digests, fsync                                                 (meanwhile: updates)
    settle   all ranks   rank 0 writes the manifest and renames: from then on the checkpoint exists

Whether a rank is done, or has failed, rides in the all-reduce that every update makes, so all ranks settle in the same
update and no thread ever takes part in a collective. Where there is no memory for the copy, and for DeepSpeed's own
files, `begin` writes, and the rest is the same.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dsllama.checkpoint import state
from dsllama.checkpoint.catalog import FORMAT, MANIFEST, Checkpoint, digest
from dsllama.files import sha256, write_atomically
from dsllama.machine import memory_limit
from dsllama.sizes import readable_bytes
from dsllama.training import engine as deepspeed_engine
from dsllama.training.checkpoint import random_state
from dsllama.training.engine import World

# Of the memory that is free, what a copy may take: the training's own needs vary.
_SHARE_OF_MEMORY = 0.8
# Lower than the training's where both want the same core (Linux takes a thread's number for a process's).
_NICENESS = 5


@dataclass(frozen=True)
class Saved:
    """A published checkpoint, and what it has cost. stall: seconds for which the first rank's training stood still;
    seconds: from the beginning until the last rank's files were on the disk, or longer where it waited for that."""

    checkpoint: Checkpoint
    stall: float
    seconds: float

    @property
    def megabytes_per_second(self) -> float:
        return self.checkpoint.bytes / 1e6 / max(self.seconds, 1e-9)


class Saver:
    """The saves of a run, one at a time. Every method but `progress` is collective.

    folder: exists; where it has vanished it is not made anew, perhaps on another disk. form: `checkpoint_format`.
    """

    def __init__(self, folder: Path, world: World, engine: Any, form: str = "portable") -> None:
        self.folder, self.world, self.engine, self.form = folder, world, engine, form
        # Why it is not the thread that writes.
        self.foreground = "DeepSpeed's own files are written by the engine" if form != "portable" else ""
        self._memory: torch.Tensor | None = None
        if form == "portable":
            self._set_memory_up()
        self._running: _Save | None = None

    def _set_memory_up(self) -> None:
        needed = state.copy_bytes(self.engine)
        here = int(os.environ.get("LOCAL_SIZE", self.world.size))
        free = min(psutil.virtual_memory().available, memory_limit()) * _SHARE_OF_MEMORY
        why = "the state lies on NVMe" if needed is None else ""
        if needed is not None and needed * here > free:
            copies = f"copies of the state take {readable_bytes(needed * here)} on {socket.gethostname()}"
            why = f"{copies}, and {readable_bytes(free)} of its memory are free for them"
        reasons = [""] * self.world.size
        dist.all_gather_object(reasons, why)  # nobody allocates before all have looked, and all do the same
        self.foreground = next(filter(None, reasons), "")
        if needed is None or self.foreground:
            return
        # Touched, because the first touch of a page takes several times what the copy does.
        try:
            self._memory = torch.zeros(needed, dtype=torch.uint8, pin_memory=self.world.device.type == "cuda")
        except RuntimeError:  # more pinned memory than this system allows: the copy is slower, and no other
            self._memory = torch.zeros(needed, dtype=torch.uint8)

    @property
    def busy(self) -> bool:
        """Whether a save is under way, by this or another rank."""
        return self._running is not None

    @property
    def update(self) -> int:
        """Whose state is being saved."""
        assert self._running is not None
        return self._running.manifest["update"]

    def progress(self) -> tuple[int, int]:
        """(1, 0) when this rank is done with the save under way, (0, 1) when it has failed, else (0, 0)."""
        running = self._running
        if running is None or running.thread.is_alive():
            return 0, 0
        return (0, 1) if running.failure else (1, 0)

    def begin(
        self,
        update: int,
        manifest: dict[str, Any],
        attachments: dict[str, str],
        pinned: state.Pinned,
        needed: int = 0,
        since: float | None = None,
    ) -> None:
        """Begin to save; the state may change as soon as it returns.

        manifest: what the caller knows. attachments: name -> text of small files. pinned: whose loss is to come out
        again at a load. needed: bytes that must be free. since: when the training stood still, by time.perf_counter.
        Raises OSError on every rank if rank 0 cannot begin.
        """
        assert self._running is None, "one save at a time"
        started = since or time.perf_counter()
        final = self.folder / f"update_{update:07d}"
        aside = self.folder / f".writing-{final.name}"
        with all_or_none(self.world):
            if self.world.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                if problem := space_problem(self.folder, needed):
                    raise OSError(errno.ENOSPC, f"{self.folder} {problem}")
                aside.mkdir()
        manifest = {**manifest, "state": self.form, "update": update}
        if self.form == "portable":
            manifest |= state.description(self.engine, pinned)
        own, texts = random_state(self.world), attachments if self.world.is_main else {}
        write: Callable[[Path], dict[str, Any]]
        if self._memory is not None:
            write = state.copy(self.engine, self._memory, own).write
        elif self.form == "portable":
            write = partial(state.save, self.engine, own=own)
        else:
            write = partial(self._write_the_engines, own=own)
        self._running = _Save(final, aside, manifest, started, lambda: {**write(aside), **_write_texts(aside, texts)})
        if self._memory is not None:
            self._running.thread.start()
        else:
            self._running.attempt()
        self._running.stall = time.perf_counter() - started

    def settle(self) -> Saved:
        """Wait for all ranks, and publish. Raises OSError, on every rank, if any could not write; nothing that was
        published before is touched then."""
        assert self._running is not None
        began = time.perf_counter()
        save, self._running = self._running, None
        if save.thread.is_alive():
            save.thread.join()
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, (save.entries, save.failure, save.seconds))
        failures = [f"rank {rank}: {failure}" for rank, (_, failure, _) in enumerate(parts) if failure]
        try:
            if failures:
                raise OSError("; ".join(failures))
            files = {name: entry for entries, *_ in parts for name, entry in entries.items()}
            content = {"format": FORMAT, **save.manifest, "files": dict(sorted(files.items()))}
            content["digest"] = digest(content)
            with all_or_none(self.world):
                if self.world.is_main:
                    _publish(save.aside, save.final, content)
        except OSError:
            if self.world.is_main:  # what is half written may be what fills the disk
                shutil.rmtree(save.aside, ignore_errors=True)
            raise
        stall = save.stall + time.perf_counter() - began
        return Saved(Checkpoint(save.final, content), stall, max(stall, *(seconds for *_, seconds in parts)))

    def _write_the_engines(self, aside: Path, own: dict[str, torch.Tensor]) -> dict[str, Any]:
        try:
            deepspeed_engine.save(self.engine, aside)
            torch.save(own, aside / f"random_rank_{self.world.rank}.pt")
        finally:
            dist.barrier()  # the others are waiting for all files
        names = sorted(str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file())
        return {name: _describe(aside / name) for name in names[self.world.rank :: self.world.size]}


class _Save:
    """One save of one rank."""

    def __init__(
        self, final: Path, aside: Path, manifest: dict[str, Any], started: float, write: Callable[[], dict[str, Any]]
    ) -> None:
        self.final, self.aside, self.manifest, self.started, self._write = final, aside, manifest, started, write
        self.entries: dict[str, Any] = {}
        self.failure = ""
        self.stall = self.seconds = 0.0
        self.thread = threading.Thread(target=self._run, name="save", daemon=True)

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        self.attempt()

    def attempt(self) -> None:
        """Write, on this thread."""
        try:
            self.entries = self._write()
        except Exception as error:  # whatever it is, the other ranks wait for the word
            self.failure = " ".join(str(error).split())[:300] or type(error).__name__
        self.seconds = time.perf_counter() - self.started


# ---------------------------------------------------------------- files


def expected_bytes(parameters: int, form: str) -> int:
    """About what a checkpoint takes: weights and two moments in fp32, and in DeepSpeed's own files the model again."""
    return parameters * (12 if form == "portable" else 16) + 2**20


def space_problem(folder: Path, needed: int) -> str:
    """What keeps a folder from taking so many bytes; empty where nothing does."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # a file system that does not say
        return ""
    return f"has {readable_bytes(free)} free, and a checkpoint takes {readable_bytes(needed)}" if free < needed else ""


def _write_texts(aside: Path, texts: dict[str, str]) -> dict[str, Any]:
    for name, text in texts.items():
        (aside / name).write_text(text, encoding="utf-8")
    return {name: _describe(aside / name) for name in texts}


def _describe(file: Path) -> dict[str, Any]:
    """Size and checksum of a file that has just been written, once the disk really has it."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _publish(aside: Path, final: Path, manifest: dict[str, Any]) -> None:
    write_atomically(aside / MANIFEST, json.dumps(manifest, indent=1))
    if final.exists():  # a damaged one of the same update: kept, under a name that nobody resumes from
        final.rename(final.with_name(f"damaged-{final.name}-{time.time_ns()}"))
    try:
        aside.rename(final)
    except FileNotFoundError:
        # NFS may repeat a request whose answer was lost, and then finds that it has been done.
        if not (final / MANIFEST).exists():
            raise
    _flush_folder(final.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
    finally:
        os.close(descriptor)


# How file systems say that they have no fsync for folders; those that need one have it.
_REFUSALS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def all_or_none(world: World) -> Iterator[None]:
    """Raise OSError on every rank if writing failed on any: a rank that left alone would hang the others."""
    failure = ""
    try:
        yield
    except OSError as error:
        failure = f"rank {world.rank}: {' '.join(str(error).split())[:300]}"
    state.raise_together(failure, OSError)
