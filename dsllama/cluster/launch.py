"""The command that `dsllama launch` comes to: DeepSpeed's own launcher. It is printed, and may be typed instead."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsllama.cluster.hostfile import Hosts, read_hostfile, select
from dsllama.config import TrainingConfig
from dsllama.errors import Problem, UserError

_MODULE = "dsllama.training"
_PLAIN = re.compile(r"[\w@+=:,./-]+")
# Shorter than that, a hiccup would end a run.
_KEEP_ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
_MOST_HOSTS = 1024  # DeepSpeed's PDSH_MAX_FAN_OUT
_NO_HOSTFILE = "none"  # DeepSpeed takes /job/hostfile where it is told of none


@dataclass(frozen=True)
class Place:
    """Where to train. hosts: None for this machine alone. processes: on this machine; None for one on each GPU."""

    hostfile: Path | None = None
    include: str = ""
    exclude: str = ""
    processes: int | None = None
    master_addr: str = ""
    master_port: int | None = None
    ssh_port: int | None = None

    def hosts(self) -> Hosts | None:
        """The hosts and their slots. Raises UserError."""
        if self.hostfile is None:
            named = {"--include": self.include, "--exclude": self.exclude}
            problems = [Problem(n, "needs a hostfile", "give --hostfile", v) for n, v in named.items() if v]
            if problems:
                raise UserError(problems)
            return None
        if self.processes is not None:
            rule = "is for this machine alone; the hostfile says how many processes a host runs"
            raise UserError(Problem("--processes", rule, "write slots=N in the hostfile, or use --include"))
        return select(read_hostfile(self.hostfile), self.include, self.exclude)


def command(place: Place, hosts: Hosts | None, words: Sequence[str]) -> list[str]:
    """What is typed for DeepSpeed's launcher. words: the training's own. Raises UserError where it is not there."""
    made = [_installed("deepspeed"), "-q"]
    several = hosts is not None and (len(hosts) > 1 or not is_here(next(iter(hosts))))
    if hosts is None:
        made += ["--hostfile", _NO_HOSTFILE]
        if place.processes and (gpus := _gpus()):
            made += ["--include", f"localhost:{','.join(gpus[: place.processes])}"]
        elif place.processes:
            made += ["--num_gpus", str(place.processes)]
    else:
        made += ["--hostfile", str(place.hostfile)]
        made += ["--include", place.include] if place.include else []
        made += ["--exclude", place.exclude] if place.exclude else []
    if several:
        if shutil.which("pdsh") is None:
            rule = "is not installed here, and DeepSpeed starts other hosts with it"
            raise UserError(Problem("pdsh", rule, "apt-get install pdsh, or its like"))
        if hosts is not None and len(hosts) > _MOST_HOSTS:
            rule = f"names {len(hosts)} hosts; pdsh starts {_MOST_HOSTS} at once, and the others when one has ended"
            raise UserError(Problem("--hostfile", rule, "use srun or mpirun (docs/cluster.md)"))
        made += ["--force_multi"]  # else a filter that leaves one host trains on this machine, whichever it names
    given = {"master_addr": place.master_addr, "master_port": place.master_port, "ssh_port": place.ssh_port}
    for name, value in given.items():
        made += [f"--{name}", str(value)] if value else []
    return [*made, "--module", _MODULE, *(map(for_remote_shell, words) if several else words)]


def for_remote_shell(word: str) -> str:
    """A word so that it comes out of pdsh, and of the shell at the other end, as it went in.

    DeepSpeed puts a word with spaces in double quotes, and leaves all others as they are; pdsh replaces %h, %n, %u.
    """
    word = word.replace("%", "%%")
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return word if _PLAIN.fullmatch(word.replace("%%", "")) else shlex.quote(word)


def is_here(name: str) -> bool:
    """Whether a host's name is that of this machine."""
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        theirs = {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    except OSError:
        return False  # a name of ssh's alone
    ours = {address.address.partition("%")[0] for found in psutil.net_if_addrs().values() for address in found}
    return bool(theirs & ours)


def training_words(config_file: str | None, fields: dict[str, object]) -> list[str]:
    """The words that describe a configuration to the ranks, from a parsed command line's."""
    words = ["--config", str(config_file)] if config_file is not None else []
    for name, value in fields.items():
        if name not in TrainingConfig.model_fields:
            continue
        if isinstance(value, list) and len(value) != 1:
            words += [f"--{name}", *map(str, value)]
        else:  # which may begin with a dash
            words.append(f"--{name}={value[0] if isinstance(value, list) else value}")
    return words


def environment(place: Place) -> dict[str, str]:
    """In which that command runs."""
    own = {"PYTHONWARNINGS": "ignore::FutureWarning"}
    found = {**own, **os.environ}
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if place.hostfile is not None:  # else pdsh waits for ever for a host that is frozen or cut off
        found["PDSH_SSH_ARGS_APPEND"] = f"{_KEEP_ALIVE} {os.environ.get('PDSH_SSH_ARGS_APPEND', '')}".strip()
        return found
    import torch

    found.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if place.processes:  # the command names the GPUs; DeepSpeed would say at length that it leaves this aside
        found.pop("CUDA_VISIBLE_DEVICES", None)
    return found


def _gpus() -> list[str]:
    """The numbers of the GPUs that may be used. DeepSpeed's --num_gpus would count from 0, whatever is visible."""
    import torch

    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.device_count()
    numbers = [number.strip() for number in visible.split(",") if number.strip()] or [str(n) for n in range(count)]
    if count and not all(number.isdecimal() for number in numbers):
        rule = "must be numbers, which are what DeepSpeed's launcher understands"
        raise UserError(Problem("CUDA_VISIBLE_DEVICES", rule, "write those that `nvidia-smi -L` shows", visible))
    return numbers[:count]


def _installed(name: str) -> str:
    """A command of this installation, or of the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise UserError(Problem(name, "is not installed here", "pip install deepspeed in this environment"))
    return found
