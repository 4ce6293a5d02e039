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
        if fault == "a rank is frozen":
            signalled(RANK, signal.SIGCONT)(hosts)  # else it would lie there until its host is booted
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
