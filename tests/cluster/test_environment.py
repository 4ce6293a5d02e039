"""Processes that srun or mpirun has started know who they are, or refuse; none believes to be alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from dsllama.cluster.environment import adopt
from dsllama.errors import UserError
from tests.conftest import Run, TinyData, run

SLURM = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "6", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "rack[1-2]n[03-04,7],other",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def adopted(environment: dict[str, str]) -> dict[str, str]:
    found = dict(environment)
    adopt(found)
    return {name: value for name, value in found.items() if name not in environment}


def test_slurm() -> None:
    assert adopted(SLURM) == {
        "RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "rack1n03",
        "MASTER_PORT": str(29500 + 456),
    }  # fmt: skip
    assert adopted({**SLURM, "SLURM_NODEID": "1"})["LOCAL_SIZE"] == "2"
    assert adopted({**SLURM, "SLURM_STEP_NODELIST": "a-1,b-2"})["MASTER_ADDR"] == "a-1"
    assert adopted({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}).keys().isdisjoint({"MASTER_ADDR"})


def test_mpirun_on_one_host_and_on_several() -> None:
    assert adopted({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }  # fmt: skip
    assert adopted({**OPEN_MPI, "MASTER_ADDR": "alpha"})["RANK"] == "3"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        adopted(OPEN_MPI)


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"},  # sbatch's own shell, which is one process
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {**SLURM, "RANK": "0"},  # of torchrun in a step
    ],
)
def test_a_process_that_is_alone_or_knows_its_rank_is_left_alone(alone: dict[str, str]) -> None:
    assert adopted(alone) == {}


def test_what_does_not_say_enough_is_refused() -> None:
    with pytest.raises(UserError, match=r"does not say which this is .PMI_RANK"):
        adopted({"PMI_SIZE": "4"})
    with pytest.raises(UserError, match="must see all of them"):
        adopted({**SLURM, "SLURM_NODEID": "0", "CUDA_VISIBLE_DEVICES": "0"})


@pytest.mark.long
def test_mpirun_trains(tiny_data: TinyData, tmp_path: Path) -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("needs mpirun (apt-get install openmpi-bin)")
    trained = Run(tmp_path / "run", tiny_data.settings)
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    done = run(*mpirun, sys.executable, "-m", "dsllama.training", *trained.words())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished: update 20 of 20") == 1
