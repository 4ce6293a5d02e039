"""Three hosts train, and something happens to one: the user reads what and where, and nothing goes on alone."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, Run, TinyData, starts_processes
from tests.hosts import DSLLAMA, Hosts, why_not

pytestmark = [starts_processes, pytest.mark.long]
NAMES = ["alpha", "beta", "gamma"]
STUCK_AFTER = 30
RANK, LAUNCHER = "m dsllama.training", "m deepspeed.launcher.launch"


def signalled(what: str, number: int, host: str = "gamma") -> Callable[[Hosts], None]:
    return lambda hosts: [hosts.do(host, "kill", f"-{number}", process) for process in processes(hosts, host, what)]


def processes(hosts: Hosts, host: str, what: str) -> list[str]:
    found = subprocess.run(hosts.command(host, "pgrep", "-f", what), capture_output=True, text=True, check=False)
    return found.stdout.split()


FAULTS: dict[str, tuple[Callable[[Hosts], object], str]] = {
    "a rank is killed": (
        signalled(RANK, signal.SIGKILL),
        r"training stopped: rank 2 \(process \d+ on gamma\), .* has gone",
    ),
    "the first rank is killed": (
        signalled(RANK, signal.SIGKILL, "alpha"),
        r"beta: training stopped: rank 0, on \S+, has gone. The last good checkpoint is",
    ),
    "a launcher is killed": (
        signalled(LAUNCHER, signal.SIGKILL),
        r"stopped by another rank after update|stopped by the end of its launcher",
    ),
    "a host crashes": (lambda hosts: hosts.crash("gamma"), r"rank 2 .* gamma.* (has gone|has not been heard of)"),
    "the link is down": (
        lambda hosts: hosts.link("gamma", "down"),
        r"rank 2 \(process \d+ on gamma\), .* has not been heard of for \d+ s \(stuck_after\): gamma does not answer",
    ),
    "deepspeed is killed": (
        signalled("bin/deepspeed", signal.SIGKILL, "alpha"),
        r"ended        stopped by the end of who read its output.*The last checkpoint is",
    ),
    "dsllama launch is killed": (signalled("bin/dsllama", signal.SIGKILL, "alpha"), r"stopped by SIGTERM"),
    "a rank is frozen": (
        signalled(RANK, signal.SIGSTOP),
        r"rank 2 \(process \d+ on gamma\), .*\(stuck_after\): its process is stopped or frozen; gamma answers",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_happens_to_a_host_is_named_and_ends_all(tiny_data: TinyData, tmp_path: Path, fault: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    happens, sentence = FAULTS[fault]
    with Hosts(tmp_path / "hosts", NAMES) as hosts:
        shape = {"batch_size": 1, "tokens_per_update": 9 * 32, "training_tokens": 9 * 32 * 1_000_000}
        often = {"token_ckpt": 9 * 32 * 20, "keep_last": 2, "stuck_after": STUCK_AFTER}
        trained = Run(tmp_path / "run", {**tiny_data.settings, **shape, **often})
        words = ["launch", "--no_check", "--hostfile", hosts.hostfile(), *trained.words()]
        process = hosts.start("alpha", DSLLAMA, *words)
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(iter(process.stdout.readline, "")), daemon=True)
        reader.start()
        log, deadline = trained.folder / "log.csv", time.monotonic() + PATIENCE
        while not log.exists() or len(log.read_text().splitlines()) < 30:
            assert process.poll() is None and time.monotonic() < deadline, "".join(said)
            time.sleep(0.2)
        began = time.monotonic()
        happens(hosts)
        while not re.search(sentence, "".join(said)):
            assert time.monotonic() < deadline and (process.poll() is None or reader.is_alive()), "".join(said)[-4000:]
            time.sleep(0.1)
        named = time.monotonic() - began
        process.wait(PATIENCE)
        ended = time.monotonic() - began
        if fault == "the link is down":
            hosts.link("gamma", "up")
        for name in NAMES[:2] if fault == "a host crashes" else NAMES:
            while processes(hosts, name, RANK):
                assert time.monotonic() < deadline, f"orphans on {name}"
                time.sleep(0.5)
        print(f"FAULT {fault}: named after {named:.1f} s, launcher ended after {ended:.1f} s, "
              f"no rank left after {time.monotonic() - began:.1f} s")  # fmt: skip


@pytest.mark.parametrize(
    ("checks", "sentence"),
    [
        ((), r"1\. gamma: data cannot be used[\s\S]*is dataset_dir reachable under this path there"),
        (("--no_check",), r"rank 2 on gamma could not start: dsllama cannot start: dataset_dir"),
    ],
)
def test_data_that_one_host_lacks(tiny_data: TinyData, tmp_path: Path, checks: tuple[str, ...], sentence: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(tmp_path / "hosts", NAMES) as hosts:
        hosts.do("gamma", "mount", "-t", "tmpfs", "none", tiny_data.settings["dataset_dir"])
        trained = Run(tmp_path / "run", {**tiny_data.settings, "batch_size": 1, "tokens_per_update": 9 * 32})
        began = time.monotonic()
        done = hosts.run("alpha", DSLLAMA, "launch", *checks, "--hostfile", hosts.hostfile(), *trained.words())
        print(f"FAULT data missing {checks}: ended after {time.monotonic() - began:.1f} s")
        assert done.returncode == 2 and re.search(sentence, done.stdout), done.stdout
        assert done.stdout.count("dataset_dir") < 6, done.stdout


def test_a_disk_that_is_full_for_one_host(tiny_data: TinyData, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(tmp_path / "hosts", NAMES[1:]) as hosts:
        hosts.crash("gamma")
        hosts.boot("gamma", below="prlimit --fsize=20000")
        settings = {**tiny_data.settings, "zero_stage": 1, "on_failed_save": "go_on", "token_ckpt": 256 * 5}
        trained = Run(tmp_path / "run", settings)
        done = hosts.run("beta", DSLLAMA, "launch", "--no_check", "--hostfile", hosts.hostfile(), *trained.words())
        sentence = r"not saved    the checkpoint of update 5 could not be written: .*gamma"
        assert re.search(sentence, done.stdout), done.stdout
        assert done.returncode == 1  # its last one could not be written either
