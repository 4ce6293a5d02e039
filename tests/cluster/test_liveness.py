"""Who is dead, silent or stuck is named, and all others end; what is known of a run can be read from any shell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsllama import cli
from dsllama.cluster import liveness, status
from dsllama.cluster.liveness import Hub, Progress
from dsllama.training.account import Account
from tests.conftest import PATIENCE, environment

# A rank that is somewhere, and says "told to end" when it is; it goes on to the places that it reads.
RANK = """
import os, sys, threading, time
from dsllama.cluster.liveness import Link, Progress
rank, size, offer = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
progress = Progress()
link = Link(rank, size, offer, progress, stuck_after=float(sys.argv[4]))
def end(text, code):
    link.end(text, code)
    print(f"ended with {code}", flush=True)
    os._exit(code)
link.on_end = end
link.last_words = lambda: "Nothing is lost."
def waits_for_data(line):
    update, micro_step, phase, *_ = line.split()
    progress.update = int(update)
    progress.at(phase, int(micro_step))
    return sys.stdin.readline()
line = "0 0 start-up"
while line.strip():
    line = waits_for_data(line)
    if line.startswith("fail"):
        link.end("training stopped: no more data", 1)
        print("ended itself", flush=True)
        os._exit(1)
link.leave()
"""


class _Ended(BaseException):
    """Ends the hub's thread."""


class Ranks:
    """A hub in this process, and the other ranks in processes of their own. said: by the hub."""

    def __init__(self, size: int, folder: Path, stuck_after: float, stuck_timeout: float | None = None) -> None:
        self.said: list[str] = []
        self.ended: tuple[str, int] | None = None
        self.progress = Progress()
        self.hub = Hub(size, self.progress, stuck_after, stuck_timeout)
        self.hub.on_end, self.hub._say = self._end, self.said.append
        self.hub.last_words = lambda: "Nothing is lost."
        self.hub.keep(folder)
        self.others = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(size), self.hub.offer, str(stuck_after)],
                env={**environment(), "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": str(rank)}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for rank in range(1, size)
        ]  # fmt: skip
        until(lambda: len(self.hub.peers) == size)

    def _end(self, text: str, code: int) -> None:
        self.ended = text, code
        self.hub.end("", code)
        raise _Ended

    def at(self, update: int, phase: str, micro_step: int = 1, but: int = -1) -> None:
        """All are there now; but one."""
        if but != 0:
            self.progress.update = update
            self.progress.at(phase, micro_step)
        for rank, other in enumerate(self.others, 1):
            if rank != but:
                other.stdin.write(f"{update} {micro_step} {phase}\n")
                other.stdin.flush()

    def told(self) -> str:
        return "\n".join(self.said)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []
    monkeypatch.setattr("threading.excepthook", lambda _: None)

    def make(size: int, stuck_after: float = PATIENCE, stuck_timeout: float | None = None) -> Ranks:
        made.append(Ranks(size, tmp_path, stuck_after, stuck_timeout))
        return made[-1]

    yield make
    for each in made:
        each.hub.leave()
        for other in each.others:
            other.kill()
            other.communicate()


def test_a_death_is_named_with_its_place_and_ends_all(ranks: Callable[..., Ranks]) -> None:
    job = ranks(4)
    job.at(57, "forward", 3)
    until(lambda: all(peer.place[2] == "forward" for peer in job.hub.peers.values()))
    victim = job.others[1]
    victim.kill()
    until(lambda: job.ended)
    text, code = job.ended
    host = os.uname().nodename
    where = f"rank 2 (process {victim.pid} on {host}), in the forward pass of update 57, micro-step 3, has gone: killed"
    assert text.startswith(f"training stopped: {where}") and text.endswith(". Nothing is lost.") and code == 1
    for other in (job.others[0], job.others[2]):
        said, _ = other.communicate(timeout=PATIENCE)
        assert said == "ended with 1\n"


def test_what_another_rank_of_its_host_has_seen_is_the_cause(ranks: Callable[..., Ranks]) -> None:
    job = ranks(3)
    assert job.hub.died(2, "was killed by SIGKILL")
    job.others[1].kill()
    until(lambda: job.ended)
    assert "), starting, was killed by SIGKILL. Nothing is lost." in job.ended[0]


def test_the_end_of_the_first_rank_ends_the_others(ranks: Callable[..., Ranks]) -> None:
    job = ranks(3)
    for peer in job.hub.peers.values():  # as the kernel does
        if peer.connection is not None:
            peer.connection.close()
    for other in job.others:  # whose input stays open, or they would leave of their own accord
        assert other.wait(PATIENCE) == 1 and other.stdout.read().endswith("ended with 1\n")


def test_an_error_of_one_rank_is_told_once_by_the_first(ranks: Callable[..., Ranks]) -> None:
    job = ranks(3)
    job.others[0].stdin.write("fail\n")
    job.others[0].stdin.flush()
    until(lambda: job.ended)
    assert job.ended == ("training stopped: no more data", 1)
    assert job.others[0].communicate(timeout=PATIENCE)[0] == "ended itself\n"
    assert job.others[1].communicate(timeout=PATIENCE)[0] == "ended with 1\n"


def test_a_frozen_process_is_named_and_told_from_a_frozen_host(ranks: Callable[..., Ranks]) -> None:
    job = ranks(3, stuck_after=4.0)
    frozen = job.others[1]
    frozen.send_signal(signal.SIGSTOP)
    until(lambda: job.ended)
    assert f"silent       rank 2 (process {frozen.pid} on " in job.told()
    assert "its process is stopped" in job.ended[0] and "rank 2" in job.ended[0]
    frozen.send_signal(signal.SIGCONT)


def test_the_rank_that_all_wait_for_is_named_with_its_stack(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    job = ranks(3, stuck_after=3.0)
    for update in (1, 2):
        job.at(update, "step")
        until(lambda u=update: all(peer.place[0] == u for peer in job.hub.peers.values()))
    job.at(3, "data", 2)
    until(lambda: all(peer.place[0] == 3 for peer in job.hub.peers.values()))
    job.at(3, "backward", 2, but=1)
    until(lambda: "stack        rank 1" in job.told())
    assert f"stuck        rank 1 (process {job.others[0].pid} on " in job.told()
    assert "waiting for the data of update 3, micro-step 2" in job.told() and "the other 2 wait" in job.told()
    assert "waits_for_data" in (tmp_path / "stack_of_rank_1.txt").read_text()
    assert job.ended is None
    job.at(4, "step")
    until(lambda: "goes on" in job.told())


def test_a_run_in_which_nobody_moves_ends(ranks: Callable[..., Ranks]) -> None:
    job = ranks(2, stuck_after=2.0, stuck_timeout=4.0)
    for update in (1, 2):
        job.at(update, "step")
        until(lambda u=update: all(peer.place[0] == u for peer in job.hub.peers.values()))
    until(lambda: job.ended)
    assert "each of 2 ranks is in the optimizer's step of update 2" in job.ended[0] and "stuck_timeout" in job.ended[0]


def test_a_straggler_is_named_with_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, said = Hub(3, Progress()), list[str]()
    hub._left.set()  # without its thread
    hub._thread.join()
    hub._say = said.append
    hub.peers |= {rank: liveness.Peer(rank, f"host{rank}", 100 + rank) for rank in (1, 2)}
    hub._first_update = 1
    for seconds, update in ((0.0, 10), (40.0, 50)):  # an update a second; a forward pass takes 0.1 s, 0.2 s on rank 2
        for rank, peer in hub.peers.items():
            peer.place = [update, 1, "step", update, 0.1 * update * (2 if rank == 2 else 1), 0.0]
        hub._look_for_stragglers(seconds)
    (line,) = said  # of an update, 3 x 0.1 s are what all wait for
    assert line.startswith(
        "straggler    rank 2 (process 102 on host2) computes 600 ms of each update, the others 300 ms"
    )
    assert line.endswith("30% of the time")


def test_somebody_who_knows_the_word_may_stop_a_run_and_nobody_else(
    ranks: Callable[..., Ranks], tmp_path: Path
) -> None:
    job, causes = ranks(1), list[str]()
    job.hub.interrupt = causes.append
    until((tmp_path / liveness.STATUS).exists)
    assert (tmp_path / liveness.STATUS).stat().st_mode & 0o077 == 0
    told = json.loads((tmp_path / liveness.STATUS).read_text())
    told["offer"]["secret"] = "x" * 32
    false = tmp_path / "false"
    false.mkdir()
    (false / liveness.STATUS).write_text(json.dumps(told))
    liveness.interrupt(false, "nobody")
    assert liveness.interrupt(tmp_path, "SIGTERM")
    until(lambda: causes)
    assert causes == ["SIGTERM"] and not liveness.interrupt(tmp_path / "nowhere", "SIGTERM")


def test_status_tells_of_a_run_that_works_and_of_one_that_has_ended(
    ranks: Callable[..., Ranks], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints" / "starts" / "0001"
    folder.mkdir(parents=True)
    account = Account()
    account.keep(folder)
    job = ranks(2)
    job.hub.keep(folder)
    job.at(7, "forward", 2)
    until(lambda: job.hub.peers[1].place[0] == 7)
    job.hub.write()
    told = status.of(tmp_path)
    assert told["state"] == "runs" and "offer" not in told
    assert [rank[:6] for rank in told["ranks"]] == [
        [rank, os.uname().nodename, process, 7, 2, "forward"]
        for rank, process in ((0, os.getpid()), (1, job.others[0].pid))
    ]
    assert cli.main(["status", str(tmp_path)]) == 0
    assert "in the forward pass of update 7, micro-step 2" in capsys.readouterr().out
    account.close("finished")
    job.hub.leave()
    assert cli.main(["status", str(folder.parents[1]), "--watch"]) == 0
    assert "ended 0s ago: finished" in capsys.readouterr().out
    assert cli.main(["status", str(folder)]) == 2 and "holds no run" in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path / "nowhere")]) == 2 and "does not exist" in capsys.readouterr().err
