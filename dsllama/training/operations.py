"""What DeepSpeed compiles at first use for offload: once for this installation, before the ranks meet, and aloud.

Left alone, each start whose Python lies elsewhere compiles anew (all share one folder), nobody hears of it for minutes,
and a build that was killed leaves a lock file behind for which every later start waits for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from dsllama.errors import Problem, UserError
from dsllama.machine import versions
from dsllama.sizes import readable_bytes

Json = dict[str, Any]
# What this process has read and written below nvme_path, in bytes, and how long it has waited for that.
moved = {"read": 0, "written": 0, "seconds": 0.0}
_EXPECTED = {"cpu_adam": "about a minute", "async_io": "3 to 6 minutes"}


def needed(ds_config: Json) -> list[str]:
    """The operations that an engine of this JSON compiles."""
    zero = ds_config["zero_optimization"]
    devices = [zero.get(part, {}).get("device", "none") for part in ("offload_optimizer", "offload_param")]
    names = ["cpu_adam"] if devices[0] != "none" else []
    return [*names, "async_io"] if "nvme" in devices else names


def settle() -> Path:
    """Where they are kept: TORCH_EXTENSIONS_DIR, or a folder of this installation's own, which is put there."""
    with contextlib.suppress(ImportError):
        import cpuinfo

        # Each DeepSpeedCPUAdam asks it anew for the maker of the CPU, which takes a second.
        if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
            cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        what = [sys.prefix, versions()["torch"], versions()["deepspeed"], os.environ.get("DS_ACCELERATOR")]
        own = hashlib.sha256(repr(what).encode()).hexdigest()[:12]
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(home / "dsllama" / "extensions" / own)
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def make_ready(ds_config: Json, is_main: bool) -> None:
    """Load them; what is missing is compiled by the first process of a host, and the others wait. is_main: says so.

    Raises UserError where one does not compile.
    """
    names = needed(ds_config)
    if not names:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    builders = {"cpu_adam": CPUAdamBuilder, "async_io": AsyncIOBuilder}
    theirs, place = "TORCH_EXTENSIONS_DIR" in os.environ, settle()
    place.mkdir(parents=True, exist_ok=True)
    began, missing = time.monotonic(), [name for name in names if not (place / name / f"{name}.so").exists()]
    if missing and is_main:
        what = ", ".join(f"{name} ({_EXPECTED[name]})" for name in missing)
        print(f"compiling    DeepSpeed's {what}, once for this installation; kept in {place}", flush=True)
    with (place / ".lock").open("w") as lock:
        if missing:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in (*names, "pin_memory") if not theirs else ():  # nobody else builds in our own folder now
                (place / name / "lock").unlink(missing_ok=True)
        for name in names:
            try:
                module = builders[name]().load(verbose=False)
            except RuntimeError as error:
                rule = f"needs DeepSpeed's {name}, which does not compile here: {' '.join(str(error).split())[-500:]}"
                raise UserError(Problem("offload", rule, "mend that, or switch offload off")) from None
            if name == "async_io" and not hasattr(module, "unguarded"):
                module.unguarded, module.aio_handle = module.aio_handle, _guarded(module.aio_handle)
    if missing and is_main:
        print(f"compiled     in {time.monotonic() - began:.0f} s", flush=True)


def _guarded(handle: Any) -> Any:
    """DeepSpeed's class of handles for asynchronous files, made to raise UserError where a disk is full or a file lost.

    Its own does not look at what a write came to, so a disk that fills would leave zeros for weights: a file's whole
    room is taken before it is written for the first time.
    """
    taken: dict[str, int] = {}

    class Guarded(handle):
        def async_pwrite(self, buffer: Any, path: str, offset: int = 0) -> int:
            size = offset + buffer.nbytes
            if taken.get(path, 0) < size:
                try:
                    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
                    try:
                        os.posix_fallocate(descriptor, 0, size)
                    finally:
                        os.close(descriptor)
                except FileNotFoundError:
                    raise _failed(path, "is gone, which it is where another rank has ended") from None
                except OSError as error:
                    raise _failed(path, f"took no {readable_bytes(size)} more ({error.strerror})") from None
                taken[path] = size
            moved["written"] += buffer.nbytes
            if super().async_pwrite(buffer, path, offset) != 0:
                raise _failed(path, "could not be written to")
            return 0

        def async_pread(self, buffer: Any, path: str, offset: int = 0) -> int:
            moved["read"] += buffer.nbytes
            if super().async_pread(buffer, path, offset) != 0:
                raise _failed(path, "does not give back what was written to it")
            return 0

        def wait(self) -> int:
            began = time.perf_counter()
            done: int = super().wait()
            moved["seconds"] += time.perf_counter() - began
            return done

    return Guarded


def _failed(path: str, what: str) -> UserError:
    remedy = "mend that; the same command goes on from the newest checkpoint, which does not lie there"
    return UserError(Problem("nvme_path", f"{what} on {socket.gethostname()}", remedy, path), "the training stopped")
