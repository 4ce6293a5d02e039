"""A run's own folder below nvme_path, on each host.

DeepSpeed's files there have no word of the run in their names: two runs with one nvme_path would train on each other's
weights. So each has a folder that its first process on the host holds (flock: the kernel knows whether the owner lives)
and that is removed at its end. What a killed run has left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsllama.checkpoint.state import raise_together
from dsllama.errors import Problem
from dsllama.sizes import readable_bytes
from dsllama.training.engine import World

Json = dict[str, Any]
_PREFIX, _LOCK = "dsllama-swap-", ".lock"
# Bytes for each parameter of this host's ranks, measured: fp32 weights and two moments; low-precision weights.
_BYTES = {"offload_optimizer": 12, "offload_param": 2}


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
        probe.unlink()
        free = shutil.disk_usage(place).free + sum(size for _, size in _dead(place))
    except OSError as error:
        rule = f"cannot be written to on {socket.gethostname()} ({error.strerror or error})"
        return [Problem("nvme_path", rule, "give a folder on a local NVMe disk", str(place))]
    if free < needed:
        rule = f"has {readable_bytes(free)} free on {socket.gethostname()}, and this run swaps {readable_bytes(needed)}"
        return [Problem("nvme_path", rule, "free some space, or give another disk", str(place))]
    return []


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
