"""Processes that a test starts, watches and signals."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.conftest import PATIENCE, REPOSITORY, environment


def start(*command: object, cwd: Path = REPOSITORY) -> subprocess.Popen[str]:
    """Start a command in a terminal of its own, as it were: Ctrl-C reaches its whole process group."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for_rows(log: Path, rows: int, process: subprocess.Popen[str], seconds: float = PATIENCE) -> None:
    """Until the log has so many rows; fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not log.exists() or len(log.read_text().splitlines()) <= rows:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.1)
