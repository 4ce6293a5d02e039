"""One run at a time in a folder: refused while the owner lives, wherever it is, and never because of a dead one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsllama import locks
from dsllama.errors import UserError
from dsllama.locks import Hold, hold
from dsllama.training.run import main as train
from tests.conftest import PATIENCE, REPOSITORY, Run, TinyData, one_clear_screen

OWNER = """
import sys
from pathlib import Path
from dsllama import locks
path, machine = Path(sys.argv[1]), sys.argv[2]
if machine:  # one that flock does not reach
    locks._machine, locks._BEAT_SECONDS, locks.fcntl.flock = lambda: machine, 0.1, lambda *_: None
held = locks.hold(path, "ckpt_dir", str(path), "")
print("held", flush=True)
sys.stdin.read()
held.release()
"""


def owner(path: Path, machine: str = "") -> subprocess.Popen[str]:
    """A process that holds a lock file until its standard input ends."""
    command = [sys.executable, "-c", OWNER, str(path), machine]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("", timeout=PATIENCE)


def test_a_second_one_is_refused_by_name_until_the_first_has_ended(tmp_path: Path) -> None:
    first = owner(tmp_path / "lock")
    with pytest.raises(UserError, match=rf"in use by another run: process {first.pid} on .*, for \d+s") as refused:
        hold(tmp_path / "lock", "ckpt_dir", "runs/x", "use another")
    assert "ckpt_dir = 'runs/x'" in str(refused.value) and "use another" in str(refused.value)
    end(first)
    hold(tmp_path / "lock", "ckpt_dir", "", "").release()


def test_one_that_was_killed_does_not_block(tmp_path: Path) -> None:
    first = owner(tmp_path / "lock")
    first.kill()
    first.wait(PATIENCE)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == first.pid
    hold(tmp_path / "lock", "ckpt_dir", "", "").release()


def test_another_machines_blocks_as_long_as_it_counts(tmp_path: Path, monkeypatch, capsys) -> None:
    first = owner(tmp_path / "lock", machine="another")
    monkeypatch.setattr(locks, "_WATCH_SECONDS", PATIENCE)
    with pytest.raises(UserError, match=f"process {first.pid}"):
        hold(tmp_path / "lock", "ckpt_dir", "", "")
    assert "looking for" in capsys.readouterr().err
    os.kill(first.pid, signal.SIGKILL)
    first.wait(PATIENCE)
    monkeypatch.setattr(locks, "_WATCH_SECONDS", 1.0)
    hold(tmp_path / "lock", "ckpt_dir", "", "").release()


def test_one_that_ended_in_order_is_not_waited_for(tmp_path: Path, capsys) -> None:
    end(owner(tmp_path / "lock", machine="another"))
    hold(tmp_path / "lock", "ckpt_dir", "", "").release()
    assert capsys.readouterr().err == ""


def test_one_that_was_taken_for_dead_knows_it_afterwards(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(locks.fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(locks, "_machine", lambda: "one")
    first = hold(tmp_path / "lock", "ckpt_dir", "", "")
    assert first.lost_to() == ""
    monkeypatch.setattr(locks, "_machine", lambda: "two")
    monkeypatch.setattr(locks, "_WATCH_SECONDS", 0.2)  # the first counts every five seconds
    second = hold(tmp_path / "lock", "ckpt_dir", "", "")
    assert f"process {os.getpid()} on" in first.lost_to()
    first.release()
    assert json.loads((tmp_path / "lock").read_text())["machine"] == "two"
    assert second.lost_to() == ""
    second.release()
    assert (tmp_path / "lock").read_text() == ""
    third = hold(tmp_path / "lock", "ckpt_dir", "", "")
    (tmp_path / "lock").write_text("")  # as one that has taken it and ended leaves it
    assert third.lost_to() == "a run that has ended since"
    (tmp_path / "lock").unlink()
    with pytest.raises(FileNotFoundError, match="vanished"):
        third.lost_to()
    third.release()


def test_a_run_is_refused_the_folder_and_the_log_of_another(tiny_data: TinyData, tmp_path: Path, capsys) -> None:
    run = Run(tmp_path, tiny_data.settings)
    (tmp_path / "checkpoints").mkdir()
    held: list[Hold] = [hold(tmp_path / name, "x", "", "") for name in (".log.csv.lock", "checkpoints/.lock")]
    assert train(run.words()) == 2
    message = one_clear_screen(capsys.readouterr())
    assert "log_file = " in message and "ckpt_dir = " in message
    assert message.count(f"is in use by another run: process {os.getpid()} on") == 2
    for each in held:
        each.release()
