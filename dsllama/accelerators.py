"""Peak dense matrix rates of known accelerators, from their makers' data sheets, for MFU.

bf16 where the chip has it, else fp16; with fp32 accumulation and without sparsity. The first name found in
what the driver calls the device counts, so longer names stand before shorter ones.
"""

from __future__ import annotations

import torch

# name in the driver's device name -> TFLOP/s
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
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_TFLOPS if known in name), None)
