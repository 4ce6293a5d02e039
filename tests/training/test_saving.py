"""Saves while the training goes on: none is lost, none is half there, and what they cost is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsllama.checkpoint.catalog import list_checkpoints, open_checkpoint, update_of
from dsllama.checkpoint.state import Copy
from dsllama.training import saving
from dsllama.training.run import main as train
from tests.campaign import Campaign
from tests.conftest import PATIENCE, REPOSITORY, Run, environment, starts_processes

pytestmark = starts_processes


def updates(run: Run) -> list[int]:
    found = [open_checkpoint(path) for path in list_checkpoints(run.folder / "checkpoints")]
    assert [damage for checkpoint in found for damage in checkpoint.damages()] == []
    return [checkpoint.update for checkpoint in found]


def test_a_slow_disk_loses_no_save_and_rows_tell_what_each_has_cost(
    campaign: Campaign, tmp_path: Path, monkeypatch, capsys
) -> None:
    write = Copy.write

    def slowly(copy: Copy, folder: Path) -> Any:
        time.sleep(0.3)
        return write(copy, folder)

    monkeypatch.setattr(Copy, "write", slowly)
    whole = campaign.run("fp32_stage1")
    run = Run(tmp_path, {**whole.settings, "token_ckpt": 4 * 256})
    assert train(run.words()) == 0
    assert updates(run) == [4, 8, 12, 16, 20]
    assert run.losses() == whole.losses()
    told = [row for row in run.rows() if row["save_seconds"]]
    assert int(told[0]["update"]) > 4  # the thread was still writing when its update was told
    assert sum(float(row["save_seconds"]) for row in told) >= 5 * 0.3
    assert all(float(row["save_mb_per_second"]) > 0 for row in told)
    assert all(float(row["save_stall"]) <= float(row["save_seconds"]) for row in told)
    assert capsys.readouterr().out.count("of which training stood still for") == 5


def test_a_write_that_fails_in_the_background_is_said_and_the_next_one_made(
    campaign: Campaign, tmp_path: Path, monkeypatch, capsys
) -> None:
    write = Copy.write

    def fail_once(copy: Copy, folder: Path) -> Any:
        if folder.name.endswith("10"):
            raise OSError(28, "No space left on device")
        return write(copy, folder)

    monkeypatch.setattr(Copy, "write", fail_once)
    run = Run(tmp_path, campaign.run("fp32_stage1").settings)
    assert train(run.words()) == 0
    assert updates(run) == [20] and not list((tmp_path / "checkpoints").glob(".writing*"))
    said = capsys.readouterr().out
    assert "not saved    the checkpoint of update 10 could not be written: rank 0: [Errno 28] No space left" in said


def test_without_memory_for_a_copy_it_is_written_while_training_stands_still(
    campaign: Campaign, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(saving, "memory_limit", lambda: 1000.0)
    monkeypatch.setattr(Copy, "write", None)
    whole = campaign.run("fp32_stage1")
    run = Run(tmp_path, whole.settings)
    assert train(run.words()) == 0
    said = capsys.readouterr().out
    assert said.count("saves        while training stands still: copies of the state take") == 1
    for update in (10, 20):
        ours, theirs = (each.checkpoint(update) / "optimizer_00000.safetensors" for each in (run, whole))
        assert ours.read_bytes() == theirs.read_bytes()


KILLED = """
import os, signal, sys
from dsllama.checkpoint import fragments
from dsllama.training.run import main
write_all = fragments.write_all
def write(descriptor, data):
    if "update_0000020" in os.readlink(f"/proc/self/fd/{descriptor}") and len(data) > 100_000:
        write_all(descriptor, data[:50_000])
        os.kill(os.getpid(), signal.SIGKILL)
    write_all(descriptor, data)
fragments.write_all = write
main(sys.argv[1:])
"""


def test_a_run_that_is_killed_amid_a_save_goes_on_from_the_one_before(
    campaign: Campaign, tmp_path: Path, capsys
) -> None:
    whole = campaign.run("fp32_stage1")
    run = Run(tmp_path, {**whole.settings, "load_ckpt": "auto"})
    command = [sys.executable, "-c", KILLED, *run.words()]
    killed = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert killed.returncode == -9, killed.stderr
    assert [update_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [10]
    assert (tmp_path / "checkpoints" / ".writing-update_0000020" / "weights_00000.safetensors").exists()
    assert train(run.words()) == 0
    assert "which a save or a removal that was cut short had left" in capsys.readouterr().out
    assert updates(run) == [10, 20] and run.losses() == whole.losses()


@pytest.mark.parametrize("form", ["portable", "deepspeed"])
def test_every_row_of_a_save_that_was_waited_for_is_told_too(campaign: Campaign, form: str) -> None:
    name = "fp32_stage1" if form == "portable" else "own_files"
    *_, last = campaign.run(name).rows()
    assert float(last["save_seconds"]) >= float(last["save_stall"]) > 0
