"""Who this process is among others, where DeepSpeed's launcher or torchrun has not said so: Slurm's srun, Open MPI's
mpirun, MPICH's and Intel's.

Left alone, each of their N processes would take itself for the first of one, and N trainings write one checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from dsllama.errors import Problem, UserError

# (who has started it, number of processes, rank, rank on its host, processes on its host); as each says it.
_STARTERS = [
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpirun", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
]  # fmt: skip
_PORT = 29500


def adopt(environ: MutableMapping[str, str]) -> None:
    """Put what such a starter says where torch and DeepSpeed look for it: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE,
    MASTER_ADDR, MASTER_PORT. Where there is none, or RANK is there already, nothing changes. Raises UserError."""
    if "RANK" in environ:
        return
    found = next((names for names in _STARTERS if int(environ.get(names[1]) or 1) > 1), None)
    if found is None:
        return
    starter, size, rank, local_rank, local_size = found
    names = [name for name in (rank, local_rank, local_size) if name not in environ]
    if names:
        rule = f"has started {environ[size]} processes and does not say which this is ({', '.join(names)})"
        raise UserError(Problem(starter, rule, "start it with `dsllama launch`, deepspeed or torchrun"))
    here = _tasks_here(environ[local_size], int(environ.get("SLURM_NODEID") or 0))
    visible = [number for number in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
    if visible and len(visible) < here:
        rule = f"shows {len(visible)} GPU to each of {here} processes of a host, and each must see all of them"
        remedy = "--gpus-per-node instead of --gpus-per-task, or --gpu-bind=none"
        raise UserError(Problem(starter, rule, remedy, environ["CUDA_VISIBLE_DEVICES"]))
    address = environ.get("MASTER_ADDR") or _first_host(environ) or ("127.0.0.1" if here == int(environ[size]) else "")
    if not address:
        remedy = f"{starter} -x MASTER_ADDR=$(hostname -I | cut -d' ' -f1) ..., on the first host"
        raise UserError(Problem("MASTER_ADDR", f"is not set, and {starter} does not name the first host", remedy))
    port = environ.get("MASTER_PORT") or str(_PORT + int(environ.get("SLURM_JOB_ID") or 0) % 1000)
    environ.update(
        RANK=environ[rank], WORLD_SIZE=environ[size], LOCAL_RANK=environ[local_rank], LOCAL_SIZE=str(here),
        MASTER_ADDR=address, MASTER_PORT=port,
    )  # fmt: skip


def number(environ: MutableMapping[str, str]) -> int:
    """This process's number, as such a starter says it; 0 without one."""
    return next((int(environ[rank]) for _, _, rank, _, _ in _STARTERS if rank in environ), 0)


def _tasks_here(text: str, node: int) -> int:
    """Of Slurm's "2(x3),1" the number for a node; a plain number is that for all."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    return counts[min(node, len(counts) - 1)] if counts else 1


def _first_host(environ: MutableMapping[str, str]) -> str:
    """Of Slurm's "rack[1-2]n[03-04,7],other": rack1n03."""
    text = environ.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", text)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else ""
