"""What this machine has, and what is installed on it."""

from __future__ import annotations

import functools
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from dsllama.errors import Problem

if TYPE_CHECKING:  # importing it takes a second, which `dsllama --version` should not cost
    import torch

# Peak dense matrix rates from the makers' data sheets, for MFU: bf16 where the chip has it, else fp16; with fp32
# accumulation and without sparsity. The first name found in what the driver calls the device counts, so longer names
# stand before shorter ones. Name -> TFLOP/s.
_PEAK_TFLOPS = [
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L4", 121.0),
    ("T4", 65.0),
    ("V100", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 4080", 97.5),
    ("RTX 3090", 71.0),
    ("RTX 3080", 59.5),
    ("RTX 3060", 25.3),
    ("MI300X", 1307.4),
]


def peak_tflops(device: torch.device) -> float | None:
    """The peak of a device in TFLOP/s, or None where it is not known (a CPU always)."""
    import torch

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_TFLOPS if known in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak of this process in GiB: what torch has allocated on a GPU, the resident memory on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> float:
    """Bytes that this process's control group may still take; infinite where nothing limits it."""
    for folder, names in (
        (Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")),
        (Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        try:
            limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names[:2])
            statistics = (folder / "memory.stat").read_text(encoding="ascii").split()
            cached = int(statistics[statistics.index(names[2]) + 1])  # given back when it is needed
        except (OSError, ValueError):
            continue
        return float(limit - used + cached)
    return math.inf


def available_memory() -> float:
    """Bytes of this host's memory that this process can still get."""
    import psutil

    return min(float(psutil.virtual_memory().available), memory_limit())


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what can change a run's numbers."""
    found = {"python": platform.python_version()}
    for package in ("dsllama", "torch", "deepspeed", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def unusable_gpu() -> Problem | None:
    """A GPU of this machine that the installed PyTorch cannot use, and would leave aside in silence; None without one.

    Nothing is said where CUDA_VISIBLE_DEVICES hides them all: then it is meant.
    """
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        kinds = torch.cuda.get_arch_list()
        codes = [kind.rstrip("af").partition("_") for kind in kinds]  # sm_90a: machine code, for major 9, minor 0
        runs = any(kind == "sm" and code[:-1] == str(major) and int(code[-1]) <= minor for kind, _, code in codes)
        compiles = any(kind == "compute" and int(code) <= 10 * major + minor for kind, _, code in codes)
        if kinds and not runs and not compiles:
            rule = f"{torch.__version__} has no code for {torch.cuda.get_device_name()} (sm_{major}{minor})"
            return Problem("torch", f"{rule}, only for {', '.join(kinds)}", _OTHER_TORCH)
        return None
    gpus = _nvidia_smi("-L")
    if not gpus:
        return None
    if torch.version.cuda is None:
        return Problem("torch", f"{torch.__version__} is a CPU build, but this machine has {gpus[0]}", _OTHER_TORCH)
    driver = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") or ["the one that is here"]
    rule = f"{torch.__version__} cannot use {gpus[0]}: its CUDA {torch.version.cuda} needs a newer driver"
    return Problem("torch", f"{rule} than {driver[0]}", f"update the driver, or {_OTHER_TORCH}")


_OTHER_TORCH = (
    "install another build: with make, rm -rf .venv and the same command with TORCH=... (torch==2.6.0, or a wheel for "
    "another CUDA); DS_ACCELERATOR=cpu trains on the CPU"
)


def _nvidia_smi(*words: str) -> list[str]:
    try:
        told = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return told.stdout.strip().splitlines() if told.returncode == 0 else []


def half_precision() -> str:
    """The half precision of this GPU: "bf16", or "fp16" where it has no units for that (before Ampere)."""
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def missing_compiler() -> str:
    """What Triton lacks to compile its launchers for CUDA; empty where it has all."""
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "cc", "clang"))):
        return "a C compiler (gcc)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"Python's headers ({header}; python3-dev)"
