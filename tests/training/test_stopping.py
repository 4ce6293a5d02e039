"""A run is stopped from outside, in any phase, and goes on from where it was."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsllama.checkpoint.catalog import list_checkpoints
from tests.campaign import Campaign
from tests.conftest import PATIENCE, REPOSITORY, Run, TinyData, deepspeed_command, environment, run, starts_processes
from tests.phases import AFTER_THE_LAST, BEFORE_THE_FIRST_UPDATE, PHASES
from tests.processes import start, wait_for_rows

pytestmark = starts_processes
ENDLESS = {"training_tokens": 10**6 * 256, "token_ckpt": "1G", "log_interval": 1}
RANKS = 2


class Job:
    """A training under DeepSpeed's launcher, and its processes."""

    def __init__(self, trained: Run, phase: str = "training") -> None:
        self.trained, self.phase = trained, phase
        script: list[Any] = ["launch/train.py"]
        if phase in PHASES:
            self.there = trained.folder.with_name("phase")
            script = ["--module", "tests.phases", phase, self.there]
        self.process = start(*deepspeed_command(RANKS, *script, *trained.words()))

    def ranks(self) -> list[psutil.Process]:
        """Those that run our code, by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            words = [word for word in child.cmdline() if word.startswith("--local_rank=")]
            if words:
                found[int(words[0].partition("=")[2])] = child
        return [found[rank] for rank in sorted(found)]

    def wait(self) -> None:
        """Until the phase is there."""
        if self.phase == "training":
            wait_for_rows(self.trained.folder / "log.csv", 5, self.process)
            return
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                if len(self.ranks()) == RANKS and (self.phase == "import" or self.there.exists()):
                    break
                assert self.process.poll() is None, self.process.communicate()[0]
            except psutil.Error:
                assert self.process.poll() is None
            time.sleep(0.1)
        if self.phase in PHASES:
            return
        time.sleep(0.5)  # a process listens from its first tenths of a second on

    def processes(self, who: str) -> list[psutil.Process]:
        """One of "rank 0", "rank 1", "ranks", "launcher" (of the host), "deepspeed" (what was typed), "all"."""
        typed, ranks = psutil.Process(self.process.pid), self.ranks()
        (launcher,) = typed.children()
        known = {"launcher": [launcher], "deepspeed": [typed], "ranks": ranks, "all": [typed, launcher, *ranks]}
        return known[who] if who in known else [ranks[int(who[-1])]]

    def end(self) -> tuple[int, str]:
        """(exit code of the launcher, all that was said) once every process has ended."""
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        return self._ended(everyone)

    def signalled(self, who: str, number: int) -> tuple[int, str]:
        """`end` after a signal to these."""
        everyone, those = psutil.Process(self.process.pid).children(recursive=True), self.processes(who)
        for each in those:
            each.send_signal(number)
        return self._ended(everyone)

    def _ended(self, everyone: list[psutil.Process]) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=PATIENCE)
        _, alive = psutil.wait_procs(everyone, timeout=PATIENCE)
        assert not alive
        return self.process.returncode, said


EXIT_CODES = {"rank 0": 75, "rank 1": 75, "ranks": 75, "launcher": 1, "deepspeed": None, "all": None}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
# DeepSpeed's own processes die of these two.
FATAL = {"launcher": [signal.SIGHUP, signal.SIGUSR1], "deepspeed": SIGNALS, "all": SIGNALS}
CASES = [
    ("deepspeed", signal.SIGTERM, "training"),
    ("rank 1", signal.SIGUSR1, "evaluating"),
    ("all", signal.SIGINT, "writing a save"),
]
ALL_CASES = [case for case in product(EXIT_CODES, SIGNALS, ("import", "training", *PHASES)) if case not in CASES]


@pytest.mark.parametrize(
    ("who", "number", "phase"), [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL_CASES)]
)
def test_a_signal_to_any_process_ends_all_and_loses_nothing(
    tiny_data: TinyData, tmp_path: Path, who: str, number: signal.Signals, phase: str
) -> None:
    settings = PHASES[phase][1] if phase in PHASES else {}
    job = Job(Run(tmp_path / "run", {**tiny_data.settings, **ENDLESS, **settings}), phase)
    job.wait()
    code, said = job.signalled(who, number)
    if number not in FATAL.get(who, []):
        assert code == (0 if phase in AFTER_THE_LAST and who.startswith("rank") else EXIT_CODES[who]), said
    assert "Traceback (most recent call last)" not in said.replace("KeyboardInterrupt", "") or who in FATAL, said
    told = re.findall(r"^(finished:|stopped by .+? (?:after|while|during|before))", said, re.MULTILINE)
    if phase == "import" or phase in BEFORE_THE_FIRST_UPDATE:
        assert told == [] or told[0].endswith(("while", "during", "before")), said
        assert not list_checkpoints(job.trained.folder / "checkpoints")
        return
    if number not in FATAL.get(who, []) or who == "deepspeed":  # else the launcher may take the words with it
        assert len(told) == 1, said
    assert all((word == "finished:") == (phase in AFTER_THE_LAST) for word in told), said
    assert_saved(job.trained)


def assert_saved(trained: Run) -> dict[str, Any]:
    """The newest checkpoint is of the log's last row; its manifest."""
    checkpoint = list_checkpoints(trained.folder / "checkpoints")[-1]
    manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["update"] == int(trained.rows()[-1]["update"])
    samples = trained.settings["tokens_per_update"] // trained.settings["max_seq_len"]
    assert manifest["data"]["consumed_samples"] == manifest["update"] * samples
    return manifest


@pytest.mark.long
def test_ctrl_c_leaves_a_checkpoint_that_goes_on(tiny_data: TinyData, tmp_path: Path) -> None:
    job = Job(Run(tmp_path / "run", {**tiny_data.settings, **ENDLESS}))
    job.wait()
    job.signalled("all", signal.SIGINT)
    manifest = assert_saved(job.trained)
    more = {**job.trained.settings, "load_ckpt": "true", "training_tokens": (manifest["update"] + 3) * 256}
    result = run(*deepspeed_command(RANKS, "launch/train.py", *Run(job.trained.folder, more).words()))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [int(row["update"]) for row in job.trained.rows()][-4:] == list(
        range(manifest["update"], manifest["update"] + 4)
    )


@pytest.mark.parametrize("mark", ["CROSS_RANK", "TORCHELASTIC_RUN_ID"])
def test_a_rank_whose_launcher_went_while_its_python_started_ends(mark: str, tmp_path: Path) -> None:
    rank = {**environment(), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", mark: "0"}
    command = [sys.executable, "launch/train.py", "--ckpt_dir", tmp_path / "checkpoints"]
    ended = subprocess.run(command, cwd=REPOSITORY, env=rank, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 75, ended.stderr
    assert "stopped by the end of its launcher while it was starting. Nothing had been trained" in ended.stdout


def test_the_death_of_a_rank_is_named_with_what_to_do(tiny_data: TinyData, tmp_path: Path) -> None:
    job = Job(Run(tmp_path / "run", {**tiny_data.settings, **ENDLESS, "token_ckpt": 256}))
    job.wait()
    (victim,) = job.processes("rank 1")
    _, said = job.signalled("rank 1", signal.SIGKILL)
    assert f"training stopped: rank 1 (process {victim.pid} on " in said and "killed" in said
    checkpoint = re.findall(r"The last good checkpoint is (\S+); --load_ckpt true goes on from it", said)
    assert len(checkpoint) == 1 and Path(checkpoint[0]) in list_checkpoints(job.trained.folder / "checkpoints")
    assert "Traceback" not in said


def test_a_run_ends_in_time_and_says_beforehand_what_a_stop_takes(campaign: Campaign) -> None:
    ended, trained = campaign.ended("short_of_time"), campaign.runs["short_of_time", 1]
    assert ended.code == 75, ended.said + ended.complained
    assert "stopped by max_run_time (4s) after update" in ended.said
    assert ended.said.count("LONGER than the grace_period of 0.001 s") == 1
    assert_saved(trained)


SLOW = {"n_layers": 16, "n_embd": 512, "tokens_per_update": 256 * 30}  # updates of some ten seconds


@pytest.mark.long
def test_a_second_wish_counts_only_from_the_sender_of_the_first(tiny_data: TinyData, tmp_path: Path) -> None:
    job = Job(Run(tmp_path / "run", {**tiny_data.settings, **ENDLESS, **SLOW}))
    wait_for_rows(job.trained.folder / "log.csv", 1, job.process)
    first, other = job.ranks()
    first.send_signal(signal.SIGTERM)
    time.sleep(4)
    (launcher,) = job.processes("launcher")
    launcher.send_signal(signal.SIGTERM)  # which passes it on
    code, said = job.end()
    assert code == 1 and "stopped by SIGTERM after update" in said
    assert_saved(job.trained)
    assert not other.is_running()


@pytest.mark.long
def test_a_second_wish_of_the_same_sender_is_met_at_once(tiny_data: TinyData, tmp_path: Path) -> None:
    job = Job(Run(tmp_path / "run", {**tiny_data.settings, **ENDLESS, **SLOW}))
    wait_for_rows(job.trained.folder / "log.csv", 1, job.process)
    (rank,) = job.processes("rank 0")
    rank.send_signal(signal.SIGTERM)
    time.sleep(3.5)
    rank.send_signal(signal.SIGTERM)
    code, said = job.end()
    assert code == 128 + signal.SIGTERM and "stopped by" not in said
