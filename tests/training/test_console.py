"""Nothing that happens to a console can kill a run, and a port that is taken is said."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys

import pytest

from dsllama import console
from tests.conftest import PATIENCE, REPOSITORY, Run, TinyData, deepspeed_command, environment, run, starts_processes
from tests.launches import Words


def shell(line: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, whose exit code is that of the first command in the last pipe."""
    command = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"]
    surroundings = {**environment(), **more}
    return subprocess.run(
        command, cwd=REPOSITORY, env=surroundings, timeout=PATIENCE, text=True, capture_output=True, check=False
    )


@pytest.mark.long  # one rank without a launcher is below
@starts_processes
@pytest.mark.parametrize("redirection", ["2>&- | head -n 1", "< /dev/null > /dev/full 2> /dev/full"])
def test_a_run_whose_console_is_gone_trains_to_its_end(tiny_data: TinyData, tmp_path, redirection: str) -> None:
    trained = Run(tmp_path, {**tiny_data.settings, "training_tokens": 6 * 256})
    words: Words = deepspeed_command(2, "launch/train.py", *trained.words())
    ended = shell(f"{shlex.join(words)} {redirection}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert list(trained.losses()) == [1, 2, 3, 4, 5, 6] and trained.checkpoint(6).is_dir()


@starts_processes
def test_standard_streams_that_are_closed_do_not_become_files(tiny_data: TinyData, tmp_path) -> None:
    trained = Run(tmp_path, {**tiny_data.settings, "training_tokens": 6 * 256})
    ended = shell(f"{sys.executable} launch/train.py {shlex.join(trained.words())} <&- >&- 2>&-")
    assert ended.returncode == 0 and list(trained.losses()) == [1, 2, 3, 4, 5, 6]


def test_letters_that_a_terminal_lacks_are_written_as_escapes() -> None:
    say = "from dsllama import console; console.settle(); console.settle(); print('a\\u6f22b')"
    ended = shell(f"{sys.executable} -c {shlex.quote(say)}", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stdout) == (0, "a\\u6f22b\n"), ended.stderr


def test_words_after_the_console_has_gone_are_lost_and_no_error(capsys, monkeypatch) -> None:
    read, write = socket.socketpair()
    monkeypatch.setattr(sys, "stdout", write.makefile("w", encoding="utf-8"))
    console.settle()
    read.close()
    print("a" * 100_000, flush=True)
    sys.stdout.flush()


@starts_processes
def test_a_port_that_is_taken_is_named_with_what_to_do(tiny_data: TinyData, tmp_path) -> None:
    trained = Run(tmp_path, tiny_data.settings)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words: Words = deepspeed_command(1, "launch/train.py", *trained.words())
        words[words.index("--master_port") + 1] = port
        ended = run(*words)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"{port} is taken" in ended.stderr and "--master_port" in ended.stderr
