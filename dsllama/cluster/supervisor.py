"""`dsllama launch` while a run is on: DeepSpeed's own launcher is its child, and it does what that leaves undone.

    hosts that are well -> deepspeed ... -> how did it end?
         ^                                    0 done, 2 a mistake, 75 somebody's wish: that is it
         +------- from the newest checkpoint -- anything else, `--max_restarts` times; signals to single ranks too

* a signal to this process asks the run to stop, over the first rank's connection: it saves, on whatever hosts;
* where DeepSpeed's launcher is killed, what it has left behind is ended, on all hosts;
* with `--elastic MIN` a run goes on with the hosts that answer, and takes in those that come back. The samples of an
  update stay what they are: accumulation is derived anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from dsllama.checkpoint.catalog import list_checkpoints, update_of
from dsllama.cluster import doctor, launch, liveness
from dsllama.cluster.hostfile import Hosts, as_filter
from dsllama.config import TrainingConfig
from dsllama.derived import derive
from dsllama.errors import EXIT_USER_ERROR, Problem, UserError
from dsllama.sizes import readable_duration
from dsllama.training import account
from dsllama.training.stopping import EXIT_FAILED

# What it returns where start after start has come to no new checkpoint: "internal software error" in sysexits.h.
EXIT_NO_PROGRESS = 70
_MOST_IN_VAIN = 3
_LOOK_SECONDS = 0.2
# After the first rank has ended the run: until what still hangs is killed.
_LEFT_SECONDS = 10.0
# Of no news from the first rank: it is no more, or nobody can tell.
_NEWS_SECONDS = 10.0
_ASK_AGAIN_SECONDS, _LONGEST_WAIT = 10.0, 3600.0
_LOOK_FOR_HOSTS_SECONDS = 60.0
_SOUND = (0, EXIT_USER_ERROR, liveness.EXIT_STOPPED)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SECOND_WISH_SECONDS = 3.0  # Ctrl-C comes more than once, from terminals and from impatience


@dataclass(frozen=True)
class Restarts:
    """most: so many restarts; fewest_hosts: as few may take part, None for all of them; asks: whether hosts are
    looked at before the first start."""

    most: int = 0
    fewest_hosts: int | None = None
    asks: bool = True


@dataclass
class _Attempt:
    """One start of DeepSpeed's launcher. folder: of the start in ckpt_dir, once there is one."""

    hosts: Hosts | None
    process: subprocess.Popen[bytes]
    earlier: int
    began: float = field(default_factory=time.monotonic)
    folder: Path | None = None
    status: dict[str, Any] = field(default_factory=dict)
    cleared: bool = False
    asked: bool = False


class Supervisor:
    """place, words, config: as typed. vocab_size: of the model."""

    def __init__(
        self, place: launch.Place, words: Sequence[str], config: TrainingConfig, vocab_size: int, restarts: Restarts
    ) -> None:
        self.place, self.words, self.config, self.vocab_size = place, list(words), config, vocab_size
        self.restarts, self.hosts = restarts, place.hosts()
        self.wish, self._wished_at, self._at_once = "", 0.0, 0  # the user's; the number of the second signal
        self._grows = ""  # why it is stopped for a restart with more hosts
        self._is_restart = self._recovers = False
        self._child = 0

    def run(self) -> int:
        """Until the run has come to its end; returns the exit code. Raises UserError."""
        hosts = self.first_hosts()
        made = in_vain = 0
        with self._listening():
            while True:
                before = self._newest()
                code, why = self._attempt(hosts)
                if not why:
                    return code
                in_vain = in_vain + 1 if self._newest() == before and not self._grows else 0
                if not self._grows:
                    if made == self.restarts.most:
                        if made:
                            self._say(f"ended        {why}; max_restarts {made} are used up")
                        return code
                    if in_vain > _MOST_IN_VAIN:
                        self._say(f"ended        {why}; {_MOST_IN_VAIN} restarts have come to no new checkpoint")
                        return EXIT_NO_PROGRESS
                    made += 1
                found = self._wait_for_hosts(_ASK_AGAIN_SECONDS if in_vain > 1 else 0.0)
                if found is None:
                    return liveness.EXIT_STOPPED if self.wish else code
                hosts = found if self.hosts is not None else None
                newest = self._newest()
                told = [] if self._grows else [f"{made} of {self.restarts.most}"]
                told += [f"on {_size(hosts)}"] if hosts is not None else []
                told += [f"from update {newest}" if newest else "from the beginning"]
                self._say(f"restart      {', '.join(told)}: {self._grows or why}")
                self._is_restart = self._recovers = True
                self._grows = ""

    # -------------------------------------------------------- one start

    def _attempt(self, hosts: Hosts | None) -> tuple[int, str]:
        """(its exit code, why it should be started again: empty where it should not)."""
        attempt = self._start(hosts)
        next_look = time.monotonic() + _LOOK_FOR_HOSTS_SECONDS
        while attempt.process.poll() is None:
            time.sleep(_LOOK_SECONDS)
            self._look(attempt)
            if self.wish or self._grows:
                self._pass_on(attempt)
            self._end_what_hangs(attempt)
            if self.restarts.fewest_hosts and time.monotonic() > next_look:
                next_look = time.monotonic() + _LOOK_FOR_HOSTS_SECONDS
                threading.Thread(target=self._look_for_more_hosts, args=(hosts,), daemon=True).start()
        code = attempt.process.returncode
        if code not in _SOUND:
            self._clear_up(attempt)
        if self._at_once:
            return 128 + self._at_once, ""
        ended = self._how_it_ended(attempt)
        if code not in (EXIT_USER_ERROR, liveness.EXIT_STOPPED) and attempt.folder is not None:
            # DeepSpeed's launcher returns 0 where it, or pdsh, was killed.
            known = {"finished": 0, "stopped": liveness.EXIT_STOPPED}
            code = known.get((ended.split() or [""])[0], code or EXIT_FAILED)
        if code in (0, EXIT_USER_ERROR):
            return code, ""
        if self.wish:
            return liveness.EXIT_STOPPED, ""
        if code == liveness.EXIT_STOPPED:
            return code, "" if "max_run_time" in ended else ended
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        why = ended or f"DeepSpeed's launcher was ended {how}"
        if attempt.process.returncode <= 0:  # what the ranks have said may not have come through
            self._say(f"ended        {why}{self._last_good()}")
        return (128 - code if code < 0 else code), why

    def _start(self, hosts: Hosts | None) -> _Attempt:
        command = self.command(hosts)
        self._say("starting     " + shlex.join(command))
        earlier = self._last_start()
        process = subprocess.Popen(  # in a session of its own: the terminal's signals come to us alone
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_parent,
            env=launch.environment(self.place),
        )  # fmt: skip
        self._child = process.pid
        return _Attempt(hosts, process, earlier)

    def command(self, hosts: Hosts | None) -> list[str]:
        """What would be typed. Raises UserError."""
        words = list(self.words)
        if self._is_restart and self._newest():
            words += ["--load_ckpt=auto"]
        place = self.place
        if hosts is not None and hosts != self.hosts:
            master_addr = place.master_addr if next(iter(hosts)) == next(iter(self.hosts or hosts)) else ""
            place = replace(place, include=as_filter(hosts), exclude="", master_addr=master_addr)
        return launch.command(place, hosts, words)

    def _look(self, attempt: _Attempt) -> None:
        """Read how it goes."""
        if attempt.folder is None:
            number = self._last_start()
            if number > attempt.earlier:
                attempt.folder = self._starts() / f"{number:04d}"
        if attempt.folder is not None:
            with contextlib.suppress(OSError, ValueError):
                attempt.status = json.loads((attempt.folder / liveness.STATUS).read_text(encoding="utf-8"))
        if self._recovers and any(place[3] for place in attempt.status.get("ranks", ())):
            self._tell_recovery(attempt)

    def _tell_recovery(self, attempt: _Attempt) -> None:
        """From the end of the start before to its own first update, by part; once."""
        start = self._account_of(attempt)
        if start is not None and start.recovery is not None:
            parts = {name: seconds for name, seconds in start.recovery.items() if seconds >= 0.05}
            told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
            self._say(f"recovered    in {sum(start.recovery.values()):.1f} s, to the first new update: {told}")
            self._recovers = False

    def _pass_on(self, attempt: _Attempt) -> None:
        """Have it stop: by the first rank, or, where that is not there yet, by DeepSpeed's launcher. A second signal
        of the user's ends it at once."""
        if self._at_once:
            self._kill(attempt)
        elif not attempt.asked:
            attempt.asked = True
            if self.wish:
                self._say("stopping     after this update, with a checkpoint (the same again stops at once)")
            if attempt.folder is None or not liveness.interrupt(attempt.folder, self.wish or self._grows):
                attempt.process.terminate()

    def _end_what_hangs(self, attempt: _Attempt) -> None:
        """Where the first rank has ended the run, and something does not go: a frozen rank, a host without a link."""
        status = attempt.status
        if not status.get("ended") or attempt.cleared:
            return
        if time.time() - status["written"] > status.get("within", 0.0) + _LEFT_SECONDS:
            self._clear_up(attempt)

    def _clear_up(self, attempt: _Attempt) -> None:
        """Leave no process of it on any host: ranks that still can may save before."""
        attempt.cleared = True
        if attempt.hosts is not None:  # ranks whose output nobody reads any more save and stop
            for process in self._descendants():
                with contextlib.suppress(psutil.Error):
                    if process.name() in ("pdsh", "ssh"):
                        process.kill()
        deadline = time.monotonic() + _LEFT_SECONDS
        while self._saves(attempt) or (self._descendants() and time.monotonic() < deadline):
            if self._at_once:
                break
            time.sleep(_LOOK_SECONDS)
        self._kill(attempt)

    def _saves(self, attempt: _Attempt) -> bool:
        """Whether the first rank still lives, and has not ended."""
        self._look(attempt)
        told = attempt.status
        if not told or told["ended"]:
            return False
        first = next(iter(attempt.hosts or ["localhost"]))
        if launch.is_here(first) and not psutil.pid_exists(told["ranks"][0][2]):
            return False
        return bool(time.time() - told["written"] < max(_NEWS_SECONDS, 3 * told["every"]))

    def _kill(self, attempt: _Attempt) -> None:
        """Every rank that is left, by its number, on its host; then what is left here."""
        ranks: dict[str, list[int]] = {}
        names = [name for name, slots in (attempt.hosts or {}).items() for _ in slots]
        for rank, _, pid, *_ in attempt.status.get("ranks", []):
            ranks.setdefault(names[rank] if rank < len(names) else "localhost", []).append(pid)
        if ranks:
            with ThreadPoolExecutor(min(64, len(ranks))) as pool:
                list(pool.map(self._kill_on, ranks, ranks.values()))
        for process in self._descendants():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _kill_on(self, name: str, pids: list[int]) -> None:
        script = (
            f"for p in {' '.join(map(str, pids))}; do grep -aqs -e dsllama -e launch/train /proc/$p/cmdline && "
            "kill -9 $p; done; true"
        )
        asking = doctor.Asking(self.place, time.monotonic() + _LEFT_SECONDS)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(asking.command("localhost" if launch.is_here(name) else name, ["sh", "-c", script]),
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           timeout=_LEFT_SECONDS, check=False)  # fmt: skip

    # -------------------------------------------------------- hosts

    def first_hosts(self) -> Hosts | None:
        """Those to start with. Raises UserError."""
        self.command(self._fitting(self.hosts))  # mistakes first, before anybody waits for a host
        return self._fitting(self._well() if self.restarts.asks or self.restarts.fewest_hosts else self.hosts)

    def _well(self, names: Sequence[str] = (), quietly: bool = False) -> Hosts | None:
        """Those that are well, of these or of all. Raises UserError where they are too few."""
        if self.hosts is None:
            return None
        asked = {name: slots for name, slots in self.hosts.items() if not names or name in names}
        found = doctor.examine(self.place, asked, self.words, self.config, quick=True)
        ill = {name for problem in found.problems for name in problem.where.split(", ")}
        well = {name: slots for name, slots in asked.items() if name not in ill}
        if quietly or not ill:
            return well
        fewest = self.restarts.fewest_hosts
        if fewest is None or len(well) < fewest:
            print("\n".join(found.lines()), file=sys.stderr)
            rule = "not well" if fewest is None else f"well, and --elastic {fewest} wants as many"
            count = len(ill) if fewest is None else len(well)
            raise UserError(Problem("--hostfile", f"{count} of {len(asked)} hosts are {rule}",
                                    "mend what is said above (--no_check starts all the same)"),
                            "nothing was started")  # fmt: skip
        for problem in found.problems:
            self._say(f"left out     {problem}")
        return well

    def _fitting(self, hosts: Hosts | None) -> Hosts | None:
        """As many of their slots as can share an update's samples. Raises UserError, without `--elastic` as soon as
        one slot is left over."""
        if hosts is None:
            return None
        slots = [(name, slot) for name, numbers in hosts.items() for slot in numbers]
        if self.restarts.fewest_hosts is None:
            derive(self.config, len(slots), self.vocab_size)
            return hosts
        for count in range(len(slots), 0, -1):
            with contextlib.suppress(UserError):
                derive(self.config, count, self.vocab_size)
                break
        else:
            derive(self.config, len(slots), self.vocab_size)
        taken: Hosts = {}
        for name, slot in slots[:count]:
            taken.setdefault(name, []).append(slot)
        return taken

    def _wait_for_hosts(self, first_pause: float) -> Hosts | None:
        """Those to go on with; waits for them, an hour at most. None where that, or a wish, has ended it. Without a
        hostfile an empty one."""
        deadline, pause = time.monotonic() + _LONGEST_WAIT, first_pause
        while True:
            wakes = time.monotonic() + pause
            while time.monotonic() < wakes and not self.wish:
                time.sleep(_LOOK_SECONDS)
            if self.wish:
                return None
            if self.hosts is None:
                return {}
            if not self.restarts.asks and self.restarts.fewest_hosts is None:
                return self.hosts
            try:
                return self._fitting(self._well())
            except UserError as error:
                if time.monotonic() > deadline:
                    self._say(f"ended        {error.problems[0]}, for {readable_duration(_LONGEST_WAIT)}")
                    return None
                pause = _ASK_AGAIN_SECONDS

    def _look_for_more_hosts(self, hosts: Hosts | None) -> None:
        """Have a run that lacks hosts stop, for a start with more of them, where some are well again."""
        missing = [name for name in self.hosts or {} if name not in (hosts or {})]
        if not missing or hosts is None or self.wish:
            return
        back = self._well(missing, quietly=True) or {}
        if not back:
            return
        more = {name: slots for name, slots in (self.hosts or {}).items() if name in hosts or name in back}
        with contextlib.suppress(UserError):
            if sum(map(len, (self._fitting(more) or {}).values())) > sum(map(len, hosts.values())):
                self._grows = f"hosts that are well again: {', '.join(back)}"

    # -------------------------------------------------------- what is in ckpt_dir

    def _starts(self) -> Path:
        return Path(self.config.ckpt_dir) / "starts"

    def _last_start(self) -> int:
        return max((int(path.name) for path in self._starts().glob("[0-9]*") if path.name.isdecimal()), default=0)

    def _newest(self) -> int:
        """The update of the newest checkpoint; 0 where there is none."""
        return max(map(update_of, list_checkpoints(self.config.ckpt_dir)), default=0)

    def _last_good(self) -> str:
        found = list_checkpoints(self.config.ckpt_dir)
        return f". The last checkpoint is {found[-1]}" if found else ""

    def _account_of(self, attempt: _Attempt) -> account.Start | None:
        """What a start has kept of where its time went, and how it has ended."""
        number = int(attempt.folder.name) if attempt.folder is not None else 0
        with contextlib.suppress(UserError):
            return next((s for s in account.read(Path(self.config.ckpt_dir)) if s.number == number), None)
        return None

    def _how_it_ended(self, attempt: _Attempt) -> str:
        """In its own words; empty where it had none."""
        self._look(attempt)
        start = self._account_of(attempt)
        told = [start.ended if start is not None else "", str(attempt.status.get("ended", ""))]
        return next((words for words in told if words not in ("", "ended", "failed")), "")

    # -------------------------------------------------------- signals and words

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a killed launcher leaves is ours
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _frame: Any) -> None:
        if not self.wish:
            self.wish, self._wished_at = f"{signal.Signals(number).name} on {socket.gethostname()}", time.monotonic()
        elif time.monotonic() - self._wished_at > _SECOND_WISH_SECONDS:
            self._at_once = number

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(text, flush=True)

    def _descendants(self) -> list[psutil.Process]:
        """Of this process, those that live; what a killed launcher has left to it is buried."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, ChildProcessError):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
                elif process.ppid() == os.getpid() and process.pid != self._child:
                    os.waitpid(process.pid, os.WNOHANG)
        return found


def _size(hosts: Hosts) -> str:
    return f"{len(hosts)} hosts ({sum(map(len, hosts.values()))} ranks)"


def _end_with_parent() -> None:
    """Of a child: SIGTERM when the supervisor is no more."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
