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
import sys
import time
from pathlib import Path
from typing import Any

from dsllama.errors import Problem, UserError
from dsllama.machine import versions
from dsllama.training import disk

Json = dict[str, Any]
_EXPECTED = {"cpu_adam": "about a minute"}


def needed(ds_config: Json) -> list[str]:
    """The operations that an engine of this JSON compiles."""
    zero = ds_config["zero_optimization"]
    return ["cpu_adam"] if zero.get("offload_optimizer", {}).get("device", "none") != "none" else []


def settle() -> Path:
    """Where they are kept: a folder of this installation's own, which is put into TORCH_EXTENSIONS_DIR. It lies in the
    user's cache, or in what was there: another installation's build would be done anew there, without a word, and a
    lock that a killed one has left would be waited for."""
    with contextlib.suppress(ImportError):
        import cpuinfo

        # Each DeepSpeedCPUAdam asks it anew for the maker of the CPU, which takes a second.
        if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
            cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    what = [sys.prefix, versions()["torch"], versions()["deepspeed"], os.environ.get("DS_ACCELERATOR")]
    own = hashlib.sha256(repr(what).encode()).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsllama" / "extensions"
    place = Path(os.environ.get("TORCH_EXTENSIONS_DIR", home))
    place = place if place.name == own else place / own  # a process that we have started has it already
    os.environ["TORCH_EXTENSIONS_DIR"] = str(place)
    return place


def make_ready(ds_config: Json, is_main: bool) -> None:
    """Load them; what is missing is compiled by the first process of a host, and the others wait. is_main: says so.

    Raises UserError where one does not compile.
    """
    disk.install()
    names = needed(ds_config)
    if not names:
        return
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builders = {"cpu_adam": CPUAdamBuilder}
    place = settle()
    place.mkdir(parents=True, exist_ok=True)
    began, missing = time.monotonic(), [name for name in names if not (place / name / f"{name}.so").exists()]
    if missing and is_main:
        what = ", ".join(f"{name} ({_EXPECTED[name]})" for name in missing)
        print(f"compiling    DeepSpeed's {what}, once for this installation; kept in {place}", flush=True)
    with (place / ".lock").open("w") as lock:
        if missing:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in names:  # nobody else builds in our own folder now
                (place / name / "lock").unlink(missing_ok=True)
        for name in names:
            try:
                builders[name]().load(verbose=False)
            except RuntimeError as error:
                rule = f"needs DeepSpeed's {name}, which does not compile here: {' '.join(str(error).split())[-500:]}"
                raise UserError(Problem("offload", rule, "mend that, or switch offload off")) from None
    if missing and is_main:
        print(f"compiled     in {time.monotonic() - began:.0f} s", flush=True)
