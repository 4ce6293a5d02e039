"""What this machine has, and what is installed on it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

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


def versions() -> dict[str, str]:
    """Versions of what can change a run's numbers."""
    found = {"python": platform.python_version()}
    for package in ("dsllama", "torch", "deepspeed", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
