"""A run's own folder below nvme_path, on each host.

DeepSpeed's files there have no word of the run in their names: two runs with one nvme_path would train on each other's
weights. So each has a folder that its first process on the host holds (flock: the kernel knows whether the owner lives)
and that is removed at its end. What a killed run has left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import mmap
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsllama.checkpoint.state import raise_together
from dsllama.errors import Problem
from dsllama.sizes import readable_bytes
from dsllama.training import stopping
from dsllama.training.engine import World

Json = dict[str, Any]
_PREFIX, _LOCK = "dsllama-swap-", ".lock"
# Bytes for each parameter of this host's ranks, measured: fp32 weights, two moments and gradients;
# low-precision weights.
_BYTES = {"offload_optimizer": 16, "offload_param": 2}
# Linux's only; DeepSpeed reads and writes past the page cache.
_DIRECT = getattr(os, "O_DIRECT", 0)
_IN_MEMORY = ("tmpfs", "ramfs")
_SLOW_BYTES_PER_SECOND, _MEASURED_BYTES, _BLOCK = 1e9, 2**26, 2**22


def place_of(ds_config: Json) -> Path | None:
    """The nvme_path of a DeepSpeed JSON; None where nothing is offloaded to NVMe."""
    return next((Path(part["nvme_path"]) for part in _parts(ds_config)), None)


def _parts(ds_config: Json) -> Iterator[Json]:
    zero = ds_config["zero_optimization"]
    parts = (zero.get(name, {}) for name in _BYTES)
    return (part for part in parts if part.get("device") == "nvme")


def needed_bytes(ds_config: Json, parameters: int, share: float) -> int:
    """What a host with this share of all ranks writes below nvme_path."""
    zero = ds_config["zero_optimization"]
    each = sum(size for part, size in _BYTES.items() if zero.get(part, {}).get("device") == "nvme")
    return int(share * parameters * each)


def problems(ds_config: Json, parameters: int, share: float) -> list[Problem]:
    """What keeps this host's nvme_path from taking a run; asked before anything starts."""
    place = place_of(ds_config)
    if place is None:
        return []
    needed = needed_bytes(ds_config, parameters, share)
    try:
        place.mkdir(parents=True, exist_ok=True)
        probe = place / f".{_PREFIX}{uuid.uuid4().hex}"
        probe.touch()
        try:
            os.close(os.open(probe, os.O_RDWR | _DIRECT))
        finally:
            probe.unlink()
        free = shutil.disk_usage(place).free + sum(size for _, size in _dead(place))
    except OSError as error:
        why = "its file system has no O_DIRECT" if error.errno == errno.EINVAL else error.strerror or error
        rule = f"cannot be written to on {socket.gethostname()} ({why})"
        return [Problem("nvme_path", rule, "give a folder on a local NVMe disk", str(place))]
    if free < needed:
        rule = f"has {readable_bytes(free)} free on {socket.gethostname()}, and this run swaps {readable_bytes(needed)}"
        return [Problem("nvme_path", rule, "free some space, or give another disk", str(place))]
    return []


def traffic(ds_config: Json, parameters: int, share: float) -> tuple[float, float]:
    """(bytes read, bytes written) below nvme_path in an update, by ranks with this share of all: the optimizer's states
    once; weights in each forward and each backward pass."""
    zero, both = ds_config["zero_optimization"], [0.0, 0.0]
    passes = {"offload_optimizer": 1, "offload_param": 2 * ds_config["gradient_accumulation_steps"]}
    for part, size in _BYTES.items():
        if zero.get(part, {}).get("device") == "nvme":
            both[0] += share * parameters * size * passes[part]
            both[1] += share * parameters * size
    return both[0], both[1]


def pace(folder: Path, moved: tuple[float, float]) -> str:
    """For people: how fast this host's disk is, and what moving so many bytes to and fro takes of each update.

    Raises OSError.
    """
    block, file = mmap.mmap(-1, _BLOCK), folder / ".pace"
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR | _DIRECT, 0o600)
    rates: list[float] = []
    try:
        for move in (os.preadv, os.pwritev)[::-1]:
            began, done = time.perf_counter(), 0
            while done < _MEASURED_BYTES and time.perf_counter() - began < 1:
                done += move(descriptor, [block], done)
            os.fsync(descriptor)
            rates.insert(0, done / max(time.perf_counter() - began, 1e-9))
    finally:
        os.close(descriptor)
        file.unlink()
    seconds = sum(size / rate for size, rate in zip(moved, rates, strict=True))
    read, write = (f"{readable_bytes(rate)}/s" for rate in rates)
    lines = [
        f"nvme_path    {folder.parent} on {socket.gethostname()}: reads {read}, writes {write}; an update reads "
        f"{readable_bytes(moved[0])} and writes {readable_bytes(moved[1])}: {seconds:.1f} s of it at that rate"
    ]
    if (kind := _file_system(folder)) in _IN_MEMORY:
        lines.append(f"             it is a {kind}, which is memory: offload to cpu takes no more, and is faster")
    elif min(rates) < _SLOW_BYTES_PER_SECOND:
        lines.append("             that is slow: local NVMe disks do 2 GB/s and more; is this one, and is it free?")
    return "\n".join(lines)


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder lies on; empty where the kernel does not say."""
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
        above = [(len(where), kind) for _, where, kind, *_ in mounts if folder.resolve().is_relative_to(where)]
        return max(above, default=(0, ""))[1]
    return ""


@contextlib.contextmanager
def own_folder(place: Path | None, world: World) -> Iterator[Path | None]:
    """A folder below `place` for this run alone, on each host; None for None. What dead runs have left is removed.

    Collective; raises OSError on every rank.
    """
    if place is None:
        yield None
        return
    folder = place / f"{_PREFIX}{world.tell(uuid.uuid4().hex[:12])}"
    lock, failure = -1, ""
    if world.local_rank == 0:
        try:
            for left, size in _dead(place):
                shutil.rmtree(left)
                said = f"{left} ({readable_bytes(size)}), which a run that was killed had left"
                print(f"removed      {said} on {socket.gethostname()}", flush=True)
            # Held before it has its name, by which others look for dead ones.
            aside = folder.with_name(f".{folder.name}")
            aside.mkdir(parents=True)
            lock = os.open(aside / _LOCK, os.O_CREAT | os.O_RDWR)
            fcntl.flock(lock, fcntl.LOCK_EX)
            aside.rename(folder)
            stopping.LEFTOVERS.add(folder)
        except OSError as error:
            failure = f"{socket.gethostname()}: {error}"
    try:
        raise_together(failure, OSError)
        yield folder
    finally:
        if lock >= 0:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def placed(ds_config: Json, folder: Path | None) -> Json:
    """A DeepSpeed JSON with this folder for nvme_path."""
    ds_config = copy.deepcopy(ds_config)
    for part in _parts(ds_config) if folder is not None else ():
        part["nvme_path"] = str(folder)
    return ds_config


def _dead(place: Path) -> Iterator[tuple[Path, int]]:
    """Folders of runs on this host that no process holds any more, with their sizes."""
    for folder in sorted(place.glob(f"{_PREFIX}*")):
        with contextlib.suppress(OSError):  # another start has just removed it
            lock = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield folder, sum(file.stat().st_blocks * 512 for file in folder.rglob("*"))
            finally:
                os.close(lock)
