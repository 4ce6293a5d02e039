"""What is installed, as it is written into checkpoints and shown at the start."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Versions of what can change a run's numbers."""
    found = {"python": platform.python_version()}
    for package in ("dsllama", "torch", "deepspeed", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
