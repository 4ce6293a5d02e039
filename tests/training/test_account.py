"""Every second of a run is in one part of its account, over all starts; work that no later start builds on is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsllama import cli
from dsllama.training import account
from dsllama.training.account import Account


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def reads(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    fake = SimpleNamespace(time=made.reads, perf_counter=made.reads, strftime=time.strftime, localtime=time.localtime)
    monkeypatch.setattr(account, "time", fake)
    yield made


class Run:
    """Starts of a run whose every step takes a whole number of seconds."""

    def __init__(self, ckpt_dir: Path, clock: Clock) -> None:
        self.ckpt_dir, self.clock, self.starts = ckpt_dir, clock, 0

    def start(self, resumed_from: tuple[int, dict[str, Any]] | None = None) -> Account:
        """3 s to begin, 2 s of engine, 1 s of restore; then the loop begins."""
        self.starts += 1
        made = Account()
        folder = self.ckpt_dir / "starts" / f"{self.starts:04d}"
        folder.mkdir(parents=True)
        self.clock.passes(3)
        made.keep(folder)
        made._ended.set()  # it is written when the test says so
        made.enter("engine")
        self.clock.passes(2)
        if resumed_from is not None:
            with made.part("restore"):
                self.clock.passes(1)
            made.resumed(*resumed_from)
        made.enter("rest")
        return made

    def trains(self, made: Account, updates: range) -> None:
        """10 s for an update, of which 1 s is waiting for data; the first takes 20 s more, to compile."""
        for update in updates:
            with made.one_update():
                made.timing("data", lambda: self.clock.passes(1))()
                self.clock.passes(9 if made.updates else 29)
            made.made(update)

    def saves(self, made: Account) -> dict[str, Any]:
        """4 s; what the manifest has of the account, as a later process reads it."""
        with made.part("saves"):
            found: dict[str, Any] = json.loads(json.dumps(made.snapshot()))
            self.clock.passes(4)
        return found


@pytest.fixture
def run(tmp_path: Path, clock: Clock) -> Run:
    return Run(tmp_path, clock)


def shown(run: Run) -> tuple[list[account.Start], dict[str, float]]:
    starts = account.read(run.ckpt_dir)
    seconds = account.total(starts)
    assert sum(seconds.values()) == pytest.approx(run.clock.now - starts[0].began)  # nothing twice, nothing missing
    return starts, {part: round(value, 6) for part, value in seconds.items() if value}


def test_one_start_that_comes_to_its_end(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    made = run.start()
    run.trains(made, range(1, 6))
    with made.part("evaluation"):
        run.clock.passes(7)
    run.saves(made)
    run.clock.passes(2)
    made.write("finished")
    [start], seconds = shown(run)
    assert seconds == {
        "start-up": 3, "engine": 2, "compilation": 20, "data": 5, "steps": 45, "evaluation": 7, "saves": 4, "rest": 2,
    }  # fmt: skip
    assert (start.ended, start.updates, start.update) == ("finished", 5, 5)
    assert cli.main(["account", str(run.ckpt_dir)]) == 0
    assert "goodput 51.14%" in capsys.readouterr().out  # 45 of 88 s


def test_work_beyond_the_checkpoint_that_is_gone_on_from_is_lost(run: Run) -> None:
    first = run.start()
    run.trains(first, range(1, 4))
    kept = run.saves(first)
    run.trains(first, range(4, 6))  # 20 s, lost with the 4 s of the save
    first.write()  # killed
    run.clock.passes(50)
    second = run.start((3, kept))
    run.trains(second, range(4, 7))
    second.write("finished")
    starts, seconds = shown(run)
    assert seconds == {
        "start-up": 6, "engine": 4, "restore": 1, "compilation": 40, "data": 6, "steps": 54, "lost": 24, "down": 50,
    }  # fmt: skip
    assert starts[1].recovery is not None
    assert {part: value for part, value in starts[1].recovery.items() if value} == {
        "down": 50, "start-up": 3, "engine": 2, "restore": 1, "data": 1, "first update": 29,
    }  # fmt: skip


def test_starts_that_nothing_is_left_of(run: Run) -> None:
    """The second is killed before it saves, and the third goes on from the first's checkpoint."""
    first = run.start()
    run.trains(first, range(1, 3))
    kept = run.saves(first)
    first.write()
    second = run.start((2, kept))
    run.trains(second, range(3, 5))  # 20 s and 20 s of compilation
    second.write()
    third = run.start((2, kept))
    run.trains(third, range(3, 5))
    third.write("stopped by SIGTERM")
    starts, seconds = shown(run)
    assert [start.seconds["lost"] for start in starts] == pytest.approx([4, 20, 0])
    assert seconds["steps"] == 4 * 9
    assert seconds["compilation"] == 3 * 20


def test_a_run_that_begins_anew_has_lost_all_before(run: Run) -> None:
    first = run.start()
    run.trains(first, range(1, 3))
    first.write()
    second = run.start()
    run.trains(second, range(1, 3))
    second.write("finished")
    starts, _ = shown(run)
    assert [start.seconds["steps"] for start in starts] == [0, 18]
    assert starts[0].seconds["lost"] == 20


def test_a_rollback_loses_what_was_done_since(run: Run) -> None:
    made = run.start()
    run.trains(made, range(1, 4))
    kept = run.saves(made)
    run.trains(made, range(4, 6))
    with made.part("restore"):
        run.clock.passes(1)
    made.resumed(3, kept)
    run.trains(made, range(4, 5))
    again = run.saves(made)
    run.clock.passes(6)
    made.write()
    second = run.start((4, again))
    second.write("finished")
    starts, seconds = shown(run)
    assert seconds["steps"] == 4 * 9
    assert seconds["lost"] == 24 + 10  # of the rollback; the second save and what came after it
    assert starts[0].resumed_from == 0


def test_a_file_that_a_crash_has_cut_short_is_passed_over(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    made = run.start()
    run.trains(made, range(1, 3))
    made.write("finished")
    for number, text in ((2, ""), (3, "[1]"), (4, '{"began": 1}')):
        folder = run.ckpt_dir / "starts" / f"{number:04d}"
        folder.mkdir()
        (folder / account.ACCOUNT).write_text(text)
    assert [start.number for start in account.read(run.ckpt_dir)] == [1]
    assert cli.main(["account", str(run.ckpt_dir / "starts")]) == 2
    assert "holds no account of a run" in capsys.readouterr().err


def test_the_account_is_written_while_a_run_works(tmp_path: Path) -> None:
    made = Account()
    made.keep(tmp_path)
    before = json.loads((tmp_path / account.ACCOUNT).read_text())["seconds"]["start-up"]
    deadline = time.monotonic() + 900
    while json.loads((tmp_path / account.ACCOUNT).read_text())["seconds"]["start-up"] <= before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    made.close("stopped by SIGTERM")
    made.close("failed")  # which it was not
    assert json.loads((tmp_path / account.ACCOUNT).read_text())["ended"] == "stopped by SIGTERM"
