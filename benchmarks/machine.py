"""What the benchmarks share: a description of the machine, and where results go."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dsllama.machine import versions


def machine() -> dict[str, Any]:
    """Processor, cores and versions: what a figure must be read with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else "unknown", "cores": os.cpu_count(), "versions": versions()}


def save(name: str, results: dict[str, Any]) -> None:
    """Write benchmarks/results/`name`.json, with the machine it was measured on."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n", encoding="utf-8")
    print(f"written to benchmarks/results/{name}.json")
