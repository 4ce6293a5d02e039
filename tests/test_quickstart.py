"""`dsllama quickstart` as a user types it, interrupts it, and types it again."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsllama.checkpoint.catalog import list_checkpoints
from tests.conftest import PATIENCE, environment, run, starts_processes
from tests.processes import start, wait_for_rows

DSLLAMA = Path(sys.executable).with_name("dsllama")
pytestmark = starts_processes


@pytest.mark.parametrize("to_the_last", [False, pytest.param(True, marks=pytest.mark.long)])
def test_quickstart_is_interrupted_goes_on_and_knows_when_it_is_done(tmp_path: Path, to_the_last: bool) -> None:
    folder = tmp_path / "quickstart"
    verb = [DSLLAMA, "quickstart", "--dir", folder]
    settings = [
        "n_embd=32",
        "n_layers=1",
        "max_seq_len=64",
        "batch_size=4",
        "tokens_per_update=512",
        "training_tokens=35K",
        "max_lr=0.02",
        "warmup_iterations=5",
        "sample_tokens=8",
    ]
    first = start(*verb, *settings)
    wait_for_rows(folder / "log.csv", 1, first)
    os.kill(first.pid, signal.SIGINT)
    said = first.communicate(timeout=PATIENCE)[0]
    assert first.returncode == 75, said[-3000:]
    assert "stopped, with a checkpoint; `make quickstart` goes on from it" in said
    stopped_at = list_checkpoints(folder / "checkpoints")[-1]

    second = run(*verb, *settings)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"goes on from {stopped_at}" in second.stdout and "tokenizer.json exists" in second.stdout
    start_loss, end_loss = map(
        float, re.findall(r"loss +([\d.]+) at the start .*?, ([\d.]+) at the end", second.stdout)[0]
    )
    assert start_loss == pytest.approx(math.log(8192), abs=0.1) and end_loss < start_loss - 1.5
    for made in ("log.png", "log.samples.txt", "config.yaml", "tensorboard", "shards/manifest.json"):
        assert (folder / made).exists(), made

    written = (folder / "config.yaml").stat().st_mtime_ns
    third = run(*verb)  # its settings are those of the run that is there
    assert third.returncode == 0 and "is finished already" in third.stdout
    other = run(*verb, "n_layers=2", "max_lr=0.02")
    assert other.returncode == 2 and "n_layers = 2: is not what the run in" in other.stderr
    assert "--fresh" in other.stderr and "max_lr" not in other.stderr
    assert (folder / "config.yaml").stat().st_mtime_ns == written

    command_shown = re.search(r"generate +(dsllama generate .*)", third.stdout)
    assert command_shown is not None
    if not to_the_last:  # what follows takes two more starts
        return
    generated = subprocess.run(
        f"{DSLLAMA.parent}/{command_shown[1]} --max_new_tokens 5",
        shell=True,
        text=True,
        capture_output=True,
        env=environment(),
        check=True,
    )
    assert generated.stdout.startswith("The ")

    fresh = run(*verb, "--fresh", "--ranks", "1", *settings, "training_tokens=1K", "warmup_iterations=0")
    assert fresh.returncode == 0, fresh.stdout + fresh.stderr
    kept = next(folder.glob("earlier-*"))
    assert (kept / "checkpoints" / stopped_at.name / "manifest.json").exists()
