"""Offload to NVMe: each run has a folder of its own there."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from dsllama.training import swap
from tests.campaign import Campaign
from tests.conftest import PATIENCE, Run, TinyData, deepspeed_command, environment, starts_processes

NVME: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}}


@starts_processes
def test_a_run_has_a_folder_of_its_own_and_removes_what_dead_runs_left(campaign: Campaign) -> None:
    ended = campaign.ended("swap_folders", 2)
    first, second = ended.values
    assert first == second
    assert first["there"] == sorted(["dsllama-swap-live", first["own"]])
    assert first["left"] == ["dsllama-swap-live"]
    assert "removed" in ended.said and "dsllama-swap-dead (1.05 MB)" in ended.said


def test_space_and_permission_are_looked_at_before_the_start(tmp_path: Path) -> None:
    def problems(place: Path, parameters: int) -> list[str]:
        config = swap.placed(NVME, place)
        return [f"{each.value} {each.rule}" for each in swap.problems(config, parameters, share=0.5)]

    assert problems(tmp_path / "new", 10**6) == []
    assert not list((tmp_path / "new").iterdir())
    (told,) = problems(tmp_path, 10**15)  # 16 bytes each, half of them here
    assert f"{tmp_path} has " in told and "and this run swaps 8" in told
    (tmp_path / "file").touch()
    (told,) = problems(tmp_path / "file", 1)
    assert "cannot be written to on" in told
    assert swap.problems({"zero_optimization": {"stage": 3}}, 10**15, 1.0) == []


@pytest.mark.long
def test_two_runs_may_have_one_place_and_a_killed_one_is_cleared_up(tiny_data: TinyData, tmp_path: Path) -> None:
    settings = {
        **tiny_data.settings, "n_embd": 256, "zero_stage": 3, "precision": "bf16",
        "offload_optimizer": "nvme", "nvme_path": str(tmp_path / "nvme"),
    }  # fmt: skip

    def start(name: str, **changes: Any) -> tuple[Run, subprocess.Popen[str]]:
        run = Run(tmp_path / name, settings | changes)
        command = deepspeed_command(2, "launch/train.py", *run.words())
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return run, subprocess.Popen(command, env=environment(), text=True, start_new_session=True, **streams)  # type: ignore[call-overload,no-any-return]

    alone, process = start("alone")
    assert process.wait(PATIENCE) == 0
    assert list((tmp_path / "nvme").iterdir()) == []
    pairs = [start("one"), start("other", seed=4)]
    killed, process = start("killed", training_tokens=10**7)
    for _, each in pairs:
        assert each.wait(PATIENCE) == 0, each.communicate()
    assert pairs[0][0].losses() == alone.losses()
    while not (killed.folder / "log.csv").exists() or len(killed.rows()) < 3:
        assert process.poll() is None
        time.sleep(0.2)
    subprocess.run(["pkill", "-KILL", "-f", str(killed.folder)], check=True)
    process.wait(PATIENCE)
    process.send_signal(signal.SIGKILL)
    (left,) = (tmp_path / "nvme").iterdir()
    _, process = start("next")
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and f"removed      {left} (" in said
    assert list((tmp_path / "nvme").iterdir()) == []
