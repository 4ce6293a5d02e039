"""How a run ends that does not come to its end: a signal, its launcher's end, another rank's death.

A signal, or the end of the launcher, is a stop request. Before the first update is made nothing can be lost, and a
rank leaves at once. After it the loop acts on a request at the end of an update: it travels with the loss in the one
all-reduce, so that all ranks save and stop at the same one.

A thread waits for all of these, so that they are heard while the main thread is in a collective that never returns.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from dsllama.cluster.liveness import EXIT_STOPPED, GONE, Hub, Link, say

EXIT_FAILED = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Ctrl-C reaches a rank more than once, from the terminal and through the launcher.
_SECOND_REQUEST_SECONDS = 3.0
_LOOK_SECONDS = 0.25
# Until the others have seen it too, and until one that was killed by the launcher has gone.
_MOURNING_SECONDS = 2.0
# By which a rank knows that there was a launcher: DeepSpeed's, torchrun. And what is told of one that is no more.
_SET_BY_LAUNCHERS, _GONE = {"CROSS_RANK", "TORCHELASTIC_RUN_ID"}, (0, 0)
# Folders of this process's own, to be removed where it leaves at once.
LEFTOVERS: set[Path] = set()


class StopRequest:
    """Whether somebody wants this run to stop; listens from when it is made until it is closed. Of the main thread.

    cause: what asked for it ("SIGTERM"), empty while nothing has. A second signal by the same sender, some seconds
    after the first, ends the process at once; the launcher, which passes signals on, is another sender than all others.
    began: when this was made.
    siblings: process numbers of this host's other ranks, by rank. last_words: what the user does next.
    at_the_end: told how it ends, where the process leaves at once. liveness: this rank's tie to the first one.
    """

    def __init__(self) -> None:
        self.cause, self.began = "", time.monotonic()
        self.siblings: dict[int, int] = {}
        self.last_words: Callable[[], str] = lambda: "Nothing had been trained, nothing is lost."
        self.at_the_end: Callable[[str], None] = lambda _: None
        self.liveness: Hub | Link | None = None
        self._is_read = _through_ssh() and not _nobody_reads()
        self._phase, self._first, self._from_launcher, self._closed = "while it was starting", 0.0, False, False
        self._launcher = _launcher_at_the_start()
        # nohup has SIGHUP ignored.
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._heard = {number for number, handler in self._before.items() if handler is not signal.SIG_IGN}
        for number in self._heard:
            signal.signal(number, self._handle)  # where another thread does not block it
        signal.pthread_sigmask(signal.SIG_BLOCK, self._heard)
        heard = self._heard  # and not all of this, for the rest of the process
        os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, heard))
        threading.Thread(target=self._watch, name="stop requests", daemon=True).start()

    def __bool__(self) -> bool:
        return bool(self.cause)

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.siblings, self._closed, self.last_words = {}, True, str  # nothing of the run is held any more
        for number in self._heard:
            signal.signal(number, self._before[number])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._heard)

    def first_process(self) -> int:
        """What was started first of all that this process owes its start to: a launcher, or itself."""
        for process in reversed(self._launcher or ()):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{process}/cmdline").read_bytes()
                if process and (b"deepspeed" in command or b"torch" in command):
                    return process
        return os.getpid()

    def phase(self, what: str) -> None:
        """Say what is done from now on; empty once an update has been made. Before that a request is met here."""
        self._phase = what
        if what and self:
            self._leave()

    def ask(self, cause: str) -> None:
        """Have the run stop, as a signal does."""
        if not self:
            self._ask(cause, from_launcher=False)

    def whose(self) -> str:
        """What has asked for it, here or at another rank."""
        if not self and isinstance(self.liveness, Hub):
            deadline = time.monotonic() + 1.0  # it is on its way
            while not self.liveness.wish and time.monotonic() < deadline:
                time.sleep(0.01)
            return self.liveness.wish or "another rank"
        return self.cause or "another rank"

    def mourn(self) -> None:
        """Where another rank has died, say so and end; else return. Takes two seconds."""
        deadline = time.monotonic() + _MOURNING_SECONDS
        while time.monotonic() < deadline:
            self._look_for_the_dead()
            time.sleep(_LOOK_SECONDS / 2)

    def _watch(self) -> None:
        while not self._closed:
            told = signal.sigtimedwait(self._heard, _LOOK_SECONDS)
            if told is not None:
                self._request(told.si_signo, self._launcher is not None and told.si_pid == self._launcher[0])
            elif self._launcher is not None and not self and _launcher() != self._launcher:
                self._ask("the end of its launcher", from_launcher=True)
            elif self._is_read and not self and _nobody_reads():
                # On another host that is all that is seen of it: sshd closes what its session wrote to.
                self._ask("the end of who read its output", from_launcher=True)
            self._look_for_the_dead()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._request(number, from_launcher=False)

    def _request(self, number: int, from_launcher: bool) -> None:
        if not self:
            self._ask(signal.Signals(number).name, from_launcher)
        elif from_launcher == self._from_launcher and time.monotonic() - self._first > _SECOND_REQUEST_SECONDS:
            os._exit(128 + number)

    def _ask(self, cause: str, from_launcher: bool) -> None:
        self.cause, self._first, self._from_launcher = cause, time.monotonic(), from_launcher
        if self._phase:
            self._leave()
        if self.liveness is not None:
            self.liveness.wishes(cause)

    def _leave(self) -> NoReturn:
        rank = int(os.environ.get("RANK", 0))
        if rank != 0:
            time.sleep(_SECOND_REQUEST_SECONDS)  # the first rank has had the same, most likely, and says it for all
        told = f"stopped by {self.cause} {self._phase}. {self.last_words()}"
        self.end(f"rank {rank}: {told}" if rank else told, EXIT_STOPPED)

    def _look_for_the_dead(self) -> None:
        for rank, process in self.siblings.items():
            how = _end_of(process)
            if how is None or self._closed:
                continue
            if how and self.liveness is not None and self.liveness.died(rank, how):
                continue  # the first one says it
            if how == "":  # it has spoken for itself, and what it was needed for would never come
                self.end("", EXIT_FAILED)
            if min(set(self.siblings) - {rank}, default=sys.maxsize) < int(os.environ.get("RANK", 0)):
                time.sleep(_MOURNING_SECONDS)  # that one says it
            what = f"rank {rank} (process {process} on {socket.gethostname()}) {how}"
            self.end(f"training stopped: {what}. {self.last_words()}", EXIT_FAILED)

    def end(self, text: str, code: int) -> NoReturn:
        """End this process at once, and with it the others, with these words."""
        self.at_the_end(text.partition(". ")[0])
        for folder in LEFTOVERS:
            shutil.rmtree(folder, ignore_errors=True)
        if self.liveness is not None:
            self.liveness.end(text, code)
        else:
            say(text, code)
        os._exit(code)


def _through_ssh() -> bool:
    """Whether the launcher above this rank was started by another host's: it has nobody else who could tell it."""
    with contextlib.suppress(OSError, ValueError):
        process = os.getppid()
        for _ in range(2):  # a shell, perhaps, and sshd
            process = int(_stat(process)[1])
            if Path(f"/proc/{process}/comm").read_text(encoding="utf-8").startswith("sshd"):
                return True
    return False


def _nobody_reads() -> bool:
    """Whether standard output or error is a pipe or a socket whose other end is closed."""
    poll = select.poll()
    with contextlib.suppress(OSError):
        for stream in (1, 2):
            mode = os.fstat(stream).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                poll.register(stream, 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return False


def _stat(process: int | str) -> list[str]:
    """Of a process, from its state on: see proc(5), fields 3 and following."""
    return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def _launcher() -> tuple[int, int] | None:
    """The process that has started this rank, and for DeepSpeed's the one that had started that; None for a shell.

    The end of either shows in these numbers: the kernel gives orphans another parent.
    """
    with contextlib.suppress(OSError):
        parent = os.getppid()
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        if b"deepspeed.launcher" in command:
            return parent, int(_stat(parent)[1])
        if b"torchrun" in command or b"torch.distributed" in command:
            return parent, 0
    return None


def _launcher_at_the_start() -> tuple[int, int] | None:
    """The same; _GONE where it, or `deepspeed`, went while this process's Python was starting."""
    found = _launcher()
    if found is None:
        return _GONE if "RANK" in os.environ and _SET_BY_LAUNCHERS & os.environ.keys() else None
    if found[1] != 1 or os.environ.get("CROSS_SIZE") != "1":  # on several hosts there is none above it
        return found
    first = Path("/proc/1/cmdline").read_bytes()  # in a container it may be `deepspeed`
    return found if b"deepspeed" in first else _GONE


def _end_of(process: int) -> str | None:
    """How a process has ended: None while it lives, "" where it has ended itself and said why, else how, for people."""
    try:
        fields = _stat(process)
    except OSError:
        return GONE  # and its parent has been told how
    if fields[0] not in "ZX":
        return None
    number = int(fields[-1]) & 0x7F  # the exit code, where the kernel shows it
    if number == 0:
        return ""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return f"was killed by {name}: by somebody, or for want of memory (the kernel's log, dmesg, tells which)"
    return f"was ended by {name}" + (": a data file has shrunk, or its disk fails" if number == signal.SIGBUS else "")


def command() -> NoReturn:
    """What a launcher starts: listens before it imports what takes seconds."""
    stop = StopRequest()
    with contextlib.suppress(RuntimeError, ValueError, OSError):  # a standard error that is closed
        faulthandler.enable()  # a crash in native code shows where
    from dsllama.training import run

    run.exit_process(run.main(sys.argv[1:], stop))
