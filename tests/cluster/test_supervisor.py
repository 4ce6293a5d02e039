"""`dsllama launch` sees a run to its end: whatever is killed, it goes on, and nothing is left behind."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsllama.checkpoint.catalog import list_checkpoints, update_of
from dsllama.training.engine import free_port
from tests.conftest import PATIENCE, REPOSITORY, Run, TinyData, environment, run, starts_processes
from tests.hosts import DSLLAMA, Hosts, why_not

pytestmark = starts_processes
ENDLESS = {"training_tokens": 256 * 1_000_000, "token_ckpt": 256 * 20, "keep_last": 2}


class Watched:
    """A `dsllama launch` that runs, and all that it says."""

    def __init__(self, process: subprocess.Popen[str], trained: Run) -> None:
        self.process, self.trained = process, trained
        self.lines: list[str] = []
        self._reader = threading.Thread(
            target=lambda: self.lines.extend(iter(process.stdout.readline, "")), daemon=True
        )
        self._reader.start()

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def until(self, pattern: str, count: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE
        while len(re.findall(pattern, self.said, re.M)) < count:
            assert time.monotonic() < deadline, self.said[-5000:]
            assert self.process.poll() is None or self._reader.is_alive(), self.said[-5000:]
            time.sleep(0.1)

    def until_update(self, update: int) -> None:
        deadline, log = time.monotonic() + PATIENCE, self.trained.folder / "log.csv"
        while not log.exists() or (rows := self.trained.rows()) == [] or int(rows[-1]["update"] or 0) < update:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said[-5000:]
            time.sleep(0.1)

    def newest(self) -> int:
        return max(map(update_of, list_checkpoints(self.trained.folder / "checkpoints")), default=0)

    def end(self) -> int:
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code


def alone(trained: Run, *words: Any) -> Watched:
    command = [DSLLAMA, "launch", "--processes", "2", "--master_port", free_port(), *words, *trained.words()]
    process = subprocess.Popen(
        list(map(str, command)), cwd=REPOSITORY, env=environment(), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    return Watched(process, trained)


def family(process: subprocess.Popen[str], what: str) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(True) if what in " ".join(child.cmdline())]


def test_a_run_goes_on_whatever_is_killed_and_stops_when_it_is_asked(tiny_data: TinyData, tmp_path: Path) -> None:
    trained = Run(tmp_path / "run", {**tiny_data.settings, **ENDLESS})
    watched = alone(trained, "--max_restarts", 3)
    watched.until_update(25)
    everyone = psutil.Process(watched.process.pid).children(True)
    family(watched.process, "--local_rank=1")[0].kill()
    watched.until(r"^restart +1 of 3, from update \d+: training stopped: rank 1 \(process \d+ on .*killed")
    watched.until(r"^recovered +in [\d.]+ s, to the first new update: .*start-up [\d.]+")
    reached = int(trained.rows()[-1]["update"])
    watched.until_update(reached + 25)
    everyone += psutil.Process(watched.process.pid).children(True)
    (launcher,) = [p for p in family(watched.process, "bin/deepspeed") if "launch.py" not in " ".join(p.cmdline())]
    launcher.kill()
    watched.until(r"^restart +2 of 3, from update \d+: stopped by the end of its launcher")
    watched.until(r"^recovered ", 2)
    everyone += psutil.Process(watched.process.pid).children(True)
    watched.process.send_signal(signal.SIGTERM)
    assert watched.end() == 75, watched.said
    assert re.search(r"^stopped by SIGTERM on \S+ after update", watched.said, re.M)
    assert not [process for process in everyone if process.is_running()]
    rows = [int(row["update"]) for row in trained.rows()]
    assert rows == list(range(1, watched.newest() + 1))  # each update once, up to the one that was saved


@pytest.mark.long
def test_restarts_that_come_to_nothing_are_ended(tiny_data: TinyData, tmp_path: Path) -> None:
    ruined = {"max_lr": 1e30, "schedule": "constant", "gradient_clipping": 0, "token_ckpt": 256 * 100}
    trained = Run(tmp_path / "run", {**tiny_data.settings, **ruined})
    done = run(DSLLAMA, "launch", "--processes", 1, "--master_port", free_port(), "--max_restarts", 9, *trained.words())
    assert done.returncode == 70, done.stdout + done.stderr
    assert len(re.findall("^restart ", done.stdout, re.M)) == 3
    assert "3 restarts have come to no new checkpoint" in done.stdout
    assert run(DSLLAMA, "launch", "--processes", 1, "--max_restarts", 9, "--zero_stage", 7).returncode == 2


@pytest.mark.long
def test_two_hosts_die_and_come_back(tiny_data: TinyData, tmp_path: Path) -> None:
    """The run goes on with the one that is left, and with all as soon as they are there again: the samples of each
    update are those of a run that nothing happened to."""
    if reason := why_not():
        pytest.skip(reason)
    shape = {"batch_size": 1, "tokens_per_update": 9 * 32, "token_ckpt": 9 * 32 * 20, "keep_last": 2}
    shape |= {"schedule": "constant", "max_lr": 1e-3}  # which do not depend on how long it is
    with Hosts(tmp_path / "hosts", ["alpha", "beta", "gamma"]) as hosts:
        trained = Run(tmp_path / "run", {**tiny_data.settings, **shape, "training_tokens": 9 * 32 * 1_000_000})
        words = ["launch", "--max_restarts", "5", "--elastic", "1", "--hostfile", hosts.hostfile()]
        watched = Watched(hosts.start("alpha", DSLLAMA, *words, *trained.words()), trained)
        watched.until_update(30)
        began = time.monotonic()
        hosts.crash("beta")
        hosts.crash("gamma")
        watched.until(r"^restart +1 of 5, on 1 hosts \(1 ranks\), from update \d+: training stopped: rank 1 .* beta")
        watched.until(r"^recovered ")
        print(f"RECOVERED after {time.monotonic() - began:.1f} s")
        alone_from = int(trained.rows()[-1]["update"])
        watched.until_update(alone_from + 20)
        began = time.monotonic()
        hosts.boot("beta")
        hosts.boot("gamma")
        watched.until(r"^restart +on 3 hosts \(3 ranks\), from update \d+: hosts that are well again: beta, gamma")
        watched.until(r"^recovered ", 2)
        print(f"GROWN after {time.monotonic() - began:.1f} s")
        watched.until_update(int(trained.rows()[-1]["update"]) + 20)
        (typed,) = hosts.do("alpha", "pgrep", "-f", "bin/dsllama launch").split()
        hosts.do("alpha", "kill", "-INT", typed)
        assert watched.end() == 75, watched.said[-5000:]
        last = min(watched.newest(), 600)
        whole = {**trained.settings, "training_tokens": 9 * 32 * last, "token_ckpt": "1G"}
        straight = Run(tmp_path / "straight", whole)
        assert run(DSLLAMA, "launch", "--processes", "1", *straight.words()).returncode == 0
        found = trained.losses()
        assert list(found) == list(range(1, watched.newest() + 1))
        assert {update: found[update] for update in straight.losses()} == pytest.approx(straight.losses(), rel=1e-3)
