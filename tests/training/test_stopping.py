"""A run is stopped from outside, and goes on from where it was."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from dsllama.checkpoint.catalog import list_checkpoints
from tests.conftest import PATIENCE, Run, TinyData, deepspeed_command, run, starts_processes
from tests.processes import start, wait_for_rows

pytestmark = starts_processes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_job_leaves_a_checkpoint_that_goes_on(
    tiny_data: TinyData, tmp_path: Path, number
) -> None:
    trained = Run(tmp_path / "run", {**tiny_data.settings, "training_tokens": 4000 * 256, "token_ckpt": "1G"})
    process = start(*deepspeed_command(2, "launch/train.py", *trained.words()))
    wait_for_rows(tmp_path / "run" / "log.csv", 5, process)
    os.killpg(process.pid, number)
    process.communicate(timeout=PATIENCE)
    checkpoint = list_checkpoints(trained.folder / "checkpoints")[-1]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["update"] == int(trained.rows()[-1]["update"])
    assert manifest["data"]["consumed_samples"] == manifest["update"] * 8

    if number == signal.SIGINT:
        return  # the quickstart goes on from that one
    more = {**trained.settings, "load_ckpt": "true", "training_tokens": (manifest["update"] + 3) * 256}
    result = run(*deepspeed_command(2, "launch/train.py", *Run(trained.folder, more).words()))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [int(row["update"]) for row in trained.rows()][-4:] == list(
        range(manifest["update"], manifest["update"] + 4)
    )
