"""Where every rank is, and whether it still is: each tells the first one, which acts for all.

    Link, a thread of each other rank -- "update 57, micro-step 3, forward", once a second --> Hub, a thread of rank 0
                                      <-- "end" | "show your stack" | "I am still here" --

A process that dies closes its connection, which is known at once. A host that is frozen or cut off is silent, and a
rank may say that it lives and yet go nowhere, while all others wait for it in a collective: both are named after
`stuck_after` seconds. The hub keeps what it knows in a file, for `dsllama status`. Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import secrets
import selectors
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

STATUS = "status.json"
# What a run returns when it was stopped and has saved: "try again later" in sysexits.h, for a scheduler to requeue.
EXIT_STOPPED = 75
GONE = "has gone"  # how a rank has ended of which nobody knows more
_UPDATE = ("update", "data", "forward", "backward", "step", "loss")
_DOING = {
    "update": "in update {0}", "data": "waiting for the data of update {0}, micro-step {1}",
    "forward": "in the forward pass of update {0}, micro-step {1}",
    "backward": "in the backward pass of update {0}, micro-step {1}",
    "step": "in the optimizer's step of update {0}, micro-step {1}", "loss": "sharing the loss of update {0}",
    "start-up": "starting", "self-test": "in the self-test", "engine": "building the engine",
    "restore": "loading a checkpoint", "evaluation": "evaluating after update {0}", "saves": "saving after update {0}",
    "rest": "between update {0} and the next",
}  # fmt: skip
_BEAT_SECONDS, _TICK_SECONDS = 1.0, 0.2
# From the first sign of a death, or an error, to what is said of it: what explains it may be on its way, and this rank
# may be about to come to the same error.
_DEATH_SECONDS, _ERROR_SECONDS, _LAST_WORDS_SECONDS = 1.0, 6.0, 10.0
OWN_END_SECONDS = 30.0  # for a rank that has most likely come to the same end by itself
_SILENT_SECONDS = 15.0  # until it is said that a rank is silent
_UNUSUAL = 5  # times what has been the longest so far
_STRAGGLER, _WINDOW_SECONDS, _WINDOW_UPDATES = 1.2, 30.0, 8


class Progress:
    """Where this process is: the main thread writes it, others read it. forward, data: seconds so far on this rank's
    own work, where it waits for no other rank."""

    def __init__(self) -> None:
        self.update = self.micro_step = self.changes = 0
        self.phase = "start-up"
        self.forward = self.data = 0.0

    def at(self, phase: str, micro_step: int | None = None) -> None:
        """What is done from now on."""
        self.phase = phase
        if micro_step is not None:
            self.micro_step = micro_step
        self.changes += 1

    def place(self) -> list[Any]:
        """All of it, to be told."""
        return [self.update, self.micro_step, self.phase, self.changes, self.forward, self.data]


def doing(update: int, micro_step: int, phase: str) -> str:
    """A place in words."""
    return _DOING.get(phase, phase).format(update, micro_step)


@dataclass
class Peer:
    """A rank as the hub knows it; heard, moved: when, on this process's clock."""

    rank: int
    host: str
    pid: int
    address: str = ""
    connection: socket.socket | None = None
    place: list[Any] = field(default_factory=lambda: Progress().place())
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    has_left: bool = False
    received: bytes = b""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def told(self, place: list[Any]) -> float:
        """It is there now; returns for how long it had been where it was before, 0 where it still is."""
        now, stayed = time.monotonic(), 0.0
        if place[3] != self.place[3]:
            stayed, self.moved = now - self.moved, now
        self.place, self.heard = place, now
        return stayed

    @property
    def doing(self) -> str:
        """For people."""
        return doing(*self.place[:3])

    @property
    def trains(self) -> bool:
        """Whether it is past its first update, so that it is known how long things take."""
        return bool(self.place[0]) and self.place[2] in _UPDATE

    @property
    def how_far(self) -> tuple[int, int, int, int]:
        """To be compared: all ranks do the same things in the same order."""
        update, micro_step, phase = self.place[:3]
        if phase in _UPDATE:
            return update, 0, micro_step, _UPDATE.index(phase)
        return update, 1, 0, 0


class _Liveness:
    """What both ends have in common. on_end: ends this process, with these words and this code. last_words: what the
    user does next."""

    def __init__(self, rank: int, progress: Progress, stuck_after: float) -> None:
        self.rank, self.progress, self.stuck_after = rank, progress, stuck_after
        self.folder: Path | None = None
        self.on_end: Callable[[str, int], NoReturn] = _exit
        self.last_words: Callable[[], str] = str
        self._left = threading.Event()

    def keep(self, folder: Path) -> None:
        """Where this start's files go from now on."""
        self.folder = folder


class Hub(_Liveness):
    """The first rank's. interrupt: has this run stop for that cause. describe: what else is known of the run. own_time:
    forward and backward passes, in forward passes; 0 where a forward pass waits for other ranks."""

    def __init__(
        self, size: int, progress: Progress, stuck_after: float = 60.0, stuck_timeout: float | None = 600.0
    ) -> None:
        super().__init__(0, progress, stuck_after)
        self.size, self.stuck_timeout, self.own_time = size, stuck_timeout, 3.0
        self.interrupt: Callable[[str], None] = lambda _: None
        self.describe: Callable[[], dict[str, Any]] = dict
        self._address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        self._secret = secrets.token_hex(16)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a connection for each rank
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, size + 4096)), hard))
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=family != 2)
        self._listener.setblocking(False)
        self.offer = json.dumps({"port": self._listener.getsockname()[1], "secret": self._secret})
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self.peers = {0: Peer(0, socket.gethostname(), os.getpid())}
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # by other threads
        self._within = 0.0  # in so many seconds all will have ended
        self.wish = ""  # of another rank's
        self._deaths: dict[int, str] = {}
        self._since = 0.0  # the first sign that something is wrong
        self._error: tuple[str, int] | None = None
        self._patience = _ERROR_SECONDS
        self._longest = 0.0  # that a rank has stayed at one place while it trained
        self._first_update: int | None = None
        self._silent: set[int] = set()
        self._stuck: tuple[int, int, int, int] | None = None
        self._window: tuple[float, int, dict[int, float]] | None = None
        self._straggler: int | None = None
        self._next_look = self._next_beat = self._next_file = 0.0
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    # -------------------------------------------------------- called by other threads

    def died(self, rank: int, how: str) -> bool:
        """A rank of this host has died; True, for it will be said here."""
        self._calls.put(lambda: self._dead(rank, how))
        return True

    def end(self, text: str, code: int, within: float = 0.0) -> None:
        """Say it, and have all others end too; those that have not by themselves, after so many seconds."""
        say(text, code)  # first: the launcher ends this one as soon as another has gone
        self._take_leave({"end": code, "within": within})
        self._within = within
        self.write(text.partition(". ")[0] or "ended")

    def wishes(self, cause: str) -> None:
        """This rank is asked to stop."""

    def leave(self) -> None:
        """It goes in peace, and the others may too."""
        if not self._left.is_set():
            self._take_leave({"over": True})
            self.write("ended")
            self._listener.close()

    def _take_leave(self, words: dict[str, Any]) -> None:
        self._left.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * _TICK_SECONDS)
        for peer in list(self.peers.values()):
            self._send(peer, words)

    # -------------------------------------------------------- the thread

    def _run(self) -> None:
        while not self._left.is_set():
            for key, _ in self._selector.select(_TICK_SECONDS):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)
            with contextlib.suppress(queue.Empty):
                while True:
                    self._calls.get_nowait()()
            now = time.monotonic()
            self._longest = max(self._longest, self._moved(self.peers[0], self.progress.place()))
            if self._deaths and now - self._since > _DEATH_SECONDS:
                self.on_end(f"training stopped: {self._obituary()}. {self.last_words()}", 1)
            elif self._error and not self._deaths and now - self._since > self._patience:
                self.on_end(*self._error)
            if now >= self._next_beat:
                self._next_beat = now + max(self.stuck_after / 8, self.size / 500)
                for peer in list(self.peers.values()):
                    self._send(peer, {"beat": True})
            if now >= self._next_look:
                self._next_look = now + _BEAT_SECONDS
                self._look_for_the_silent(now)
                self._look_for_the_stuck(now)
                self._look_for_stragglers(now)
            if now >= self._next_file:
                self._next_file = now + max(2.0, self.size / 500)
                self.write()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, (address, *_) = self._listener.accept()
            connection.setblocking(False)
            guest = Peer(-1, "", 0, address.removeprefix("::ffff:"), connection)
            self._selector.register(connection, selectors.EVENT_READ, guest)

    def _hear(self, peer: Peer) -> None:
        assert peer.connection is not None
        try:
            got = peer.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            got = b""
        if not got:
            self._selector.unregister(peer.connection)
            peer.connection.close()
            peer.connection = None
            if peer.rank >= 0 and not peer.has_left:
                self._dead(peer.rank, "")
            return
        *lines, peer.received = (peer.received + got).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._obey(peer, json.loads(line))

    def _obey(self, peer: Peer, told: dict[str, Any]) -> None:
        if peer.rank < 0:  # nothing counts before the secret has been told
            if not secrets.compare_digest(str(told["secret"]), self._secret):
                return
            if "stop" in told:
                self.interrupt(str(told["stop"]))
                return
            peer.rank, peer.host, peer.pid = int(told["rank"]), str(told["host"]), int(told["pid"])
            self.peers[peer.rank] = peer
            if len(self.peers) == self.size:
                self._appoint_a_deputy()
        if "at" in told:
            self._longest = max(self._longest, self._moved(peer, told["at"]))
        if "wishes" in told:
            self.wish = self.wish or f"{told['wishes']} (rank {peer.rank} on {peer.host})"
        if "died" in told:
            self._dead(*told["died"])
        if "left" in told:
            peer.has_left = True
        if "failed" in told:
            peer.has_left = True
            self._since = self._since or time.monotonic()
            self._error = self._error or (told["failed"][0], told["failed"][1])
            self._patience = 0.0 if self._error[1] == EXIT_STOPPED else _ERROR_SECONDS
        if "stack" in told:
            self._show_stack(peer, told["stack"])

    def _appoint_a_deputy(self) -> None:
        """Who says it if this process dies: the first one of another host, for those of this one see it themselves."""
        deputy = min((rank for rank, peer in self.peers.items() if peer.host != self.peers[0].host), default=None)
        for rank, peer in self.peers.items():
            self._send(peer, {"speaks": rank == deputy})

    def _moved(self, peer: Peer, place: list[Any]) -> float:
        """Take notice of a place; for how long a rank that trains had been at the one before."""
        before, trained = peer.place[0], peer.trains
        stayed = peer.told(place)
        if self._first_update is None and place[0]:
            self._first_update = place[0]
        return stayed if trained and before != self._first_update else 0.0

    def _dead(self, rank: int, how: str) -> None:
        self._since = self._since or time.monotonic()
        self._deaths[rank] = self._deaths.get(rank) or how  # a launcher may have buried it since

    def _obituary(self) -> str:
        """Who has died, where and of what."""
        first = [self.peers[rank] for rank in sorted(self._deaths) if rank in self.peers]
        if not first:
            return f"rank {min(self._deaths)} {self._deaths[min(self._deaths)] or GONE}"
        told = [f"{peer}, {peer.doing}, {self._deaths[peer.rank] or GONE}" for peer in first[:3]]
        if len(first) > 3:
            told.append(f"and {len(first) - 3} more on {', '.join(sorted({peer.host for peer in first}))}")
        if not any(how not in ("", GONE) for how in self._deaths.values()):  # nobody was there to see it
            told[-1] += f": killed (by somebody, or for want of memory, says dmesg), or {first[0].host} went down"
        return "; ".join(told)

    # -------------------------------------------------------- what is wrong

    def _look_for_the_silent(self, now: float) -> None:
        limit = min(_SILENT_SECONDS, self.stuck_after / 2)
        for peer in list(self.peers.values()):
            silence = now - peer.heard
            if peer.connection is None or peer.has_left:
                continue
            if silence < limit:
                if peer.rank in self._silent:
                    self._silent.discard(peer.rank)
                    self._say(f"heard of     {peer} again")
                continue
            if peer.rank not in self._silent:
                self._silent.add(peer.rank)
                why = self._why_silent(peer)
                self._say(f"silent       {peer}, {peer.doing}, has not been heard of for {silence:.0f} s: {why}")
            elif silence > self.stuck_after:
                what = f"{peer}, {peer.doing}, has not been heard of for {silence:.0f} s (stuck_after)"
                self.on_end(f"training stopped: {what}: {self._why_silent(peer)}. {self.last_words()}", 1)

    def _why_silent(self, peer: Peer) -> str:
        if peer.host == self.peers[0].host:
            with contextlib.suppress(OSError, IndexError):
                state = Path(f"/proc/{peer.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
                return f"its process is {'stopped' if state in 'Tt' else f'frozen (state {state})'}"
        others = [p for p in self.peers.values() if p.host == peer.host and p is not peer]
        if any(time.monotonic() - p.heard < _SILENT_SECONDS for p in others):
            return "its process is stopped or frozen; other ranks of its host are well"
        if answers(peer.address):
            return f"its process is stopped or frozen; {peer.host} answers"
        return f"{peer.host} does not answer: it is down or frozen, or its network is"

    def _look_for_the_stuck(self, now: float) -> None:
        there = [peer for peer in self.peers.values() if not peer.has_left]
        if len(self.peers) < self.size or self._silent or not there:
            return
        behind = min(peer.how_far for peer in there)
        those = [peer for peer in there if peer.how_far == behind]
        since = min(now - peer.moved for peer in those)
        trains = all(peer.trains and peer.place[0] != self._first_update for peer in those)
        usual = max(_UNUSUAL * self._longest, self.stuck_after if trains else _UNUSUAL * self.stuck_after)
        if self._stuck is not None and self._stuck != behind:
            self._stuck = None
            self._say("goes on      no rank is stuck any more")
        if self._stuck is None and since > usual:
            self._stuck = behind
            self._say(f"stuck        {self._who_is_stuck(those, there, since)}")
            for peer in [*those[:8], *[peer for peer in there if peer not in those][:1]]:
                self._show_stack(peer, stack()) if peer.rank == 0 else self._send(peer, {"stack": True})
        elif trains and self.stuck_timeout and since > max(self.stuck_timeout, 2 * _UNUSUAL * self._longest):
            who = self._who_is_stuck(those, there, since)
            self.on_end(f"training stopped: {who} (stuck_timeout). {self.last_words()}", 1)

    def _who_is_stuck(self, those: list[Peer], everybody: list[Peer], since: float) -> str:
        if len(those) == len(everybody):
            where = f"is {those[0].doing} for {since:.0f} s"
            if len(those) == 1:
                return f"{those[0]} {where}"
            return f"each of {len(those)} ranks {where}: the network between them, or a GPU, does not answer"
        names = ", ".join(map(str, those[:4])) + (f" and {len(those) - 4} more" if len(those) > 4 else "")
        farther = next(peer for peer in everybody if peer not in those)
        others = f"the other {len(everybody) - len(those)} wait ({farther.doing})"
        return f"{names}: {those[0].doing} for {since:.0f} s; {others}"

    def _show_stack(self, peer: Peer, frames: list[str]) -> None:
        kept = ""
        if self.folder is not None:
            path = self.folder / f"stack_of_rank_{peer.rank}.txt"
            with contextlib.suppress(OSError):
                path.write_text("".join(frames), encoding="utf-8")
                kept = f"; all of it in {path}"
        inner = [line.strip().splitlines()[0] for line in frames if line.startswith("  File")][-3:]
        self._say(f"stack        {peer}: {' > '.join(inner)}{kept}")

    def _look_for_stragglers(self, now: float) -> None:
        """Over half a minute: whose own work takes so long that the others wait for it."""
        peers = [peer for peer in self.peers.values() if not peer.has_left]
        update = min(peer.place[0] for peer in peers)
        if len(peers) < max(2, self.size) or self._first_update is None or update <= self._first_update:
            return
        own = {p.rank: self.own_time * p.place[4] + p.place[5] for p in peers}
        if self._window is None or not self._window[2].keys() >= own.keys():
            self._window = now, update, own
        began, first, before = self._window
        made = update - first
        if now - began < _WINDOW_SECONDS or made < _WINDOW_UPDATES:
            return
        self._window = now, update, own
        seconds = {rank: (own[rank] - before[rank]) / made for rank in own}
        slowest = max(seconds, key=lambda rank: seconds[rank])
        usual, whole = statistics.median_low(seconds.values()), (now - began) / made
        cost = (seconds[slowest] - usual) / whole
        if seconds[slowest] < _STRAGGLER * usual or cost < 0.05:
            self._straggler = None
        elif self._straggler != slowest:
            self._straggler = slowest
            peer = self.peers[slowest]
            waits = (peer.place[5] / max(own[slowest], 1e-9)) > 0.5
            what = "waits for its data" if waits else "computes"
            self._say(
                f"straggler    {peer} {what} {seconds[slowest] * 1e3:.0f} ms of each update, the others "
                f"{usual * 1e3:.0f} ms: all wait for it, {cost:.0%} of the time"
            )

    # -------------------------------------------------------- telling

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(text, flush=True)

    def _send(self, peer: Peer, told: dict[str, Any]) -> None:
        if peer.connection is not None:
            with contextlib.suppress(OSError):
                peer.connection.send(json.dumps(told).encode() + b"\n")

    def write(self, ended: str = "") -> None:
        """What is known of the run, for `dsllama status`; nobody but its owner may stop it by that."""
        if self.folder is None:
            return
        now = time.monotonic()
        ranks = [
            [p.rank, p.host, p.pid, *p.place[:3], now - p.moved, now - p.heard if p.rank else 0.0]
            for p in sorted(self.peers.values(), key=lambda p: p.rank)
        ]
        told = {
            "written": time.time(), "ended": ended, "size": self.size, "ranks": ranks, "address": self._address,
            "offer": json.loads(self.offer), "every": max(2.0, self.size / 500),
            "within": self._within, **self.describe(),
        }  # fmt: skip
        temporary = self.folder / f".{STATUS}.tmp"
        with contextlib.suppress(OSError):
            temporary.touch(0o600)
            temporary.write_text(json.dumps(told), encoding="utf-8")
            temporary.replace(self.folder / STATUS)


class Link(_Liveness):
    """Each other rank's. Raises OSError where the first rank cannot be reached."""

    def __init__(self, rank: int, size: int, offer: str, progress: Progress, stuck_after: float = 60.0) -> None:
        super().__init__(rank, progress, stuck_after)
        place = json.loads(offer)
        self._socket = socket.create_connection((os.environ["MASTER_ADDR"], place["port"]), 60.0)
        self._interval = max(min(_BEAT_SECONDS, stuck_after / 8), size / 1000)
        self._told_to_end = threading.Event()
        self._sending = threading.Lock()
        self._speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        hello = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._tell({"secret": place["secret"], **hello, "at": progress.place()})
        threading.Thread(target=self._run, name="liveness", daemon=True).start()

    def died(self, rank: int, how: str) -> bool:
        """A rank of this host has died; whether the first one will say so."""
        return rank != 0 and not self._told_to_end.is_set() and self._tell({"died": [rank, how]})

    def end(self, text: str, code: int, within: float = 0.0) -> None:
        """Have the first rank say it and all others end; where there is none, say it here."""
        self._left.set()
        told = self._tell({"failed": [text, code]} if text else {"left": True})
        if not (self._told_to_end.wait(_LAST_WORDS_SECONDS) and told):
            say(text, code)

    def wishes(self, cause: str) -> None:
        """This rank is asked to stop: the first one says by what."""
        self._tell({"wishes": cause})

    def leave(self) -> None:
        """It goes in peace."""
        if not self._left.is_set():
            self._left.set()
            self._tell({"left": True})

    def _tell(self, what: dict[str, Any]) -> bool:
        try:
            with self._sending:
                self._socket.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            return False
        return True

    def _run(self) -> None:
        received, heard, next_beat = b"", time.monotonic(), 0.0
        self._socket.settimeout(_TICK_SECONDS)
        while True:
            now = time.monotonic()
            if now >= next_beat and not self._left.is_set():
                next_beat = now + self._interval
                self._tell({"at": self.progress.place()})
            try:
                got = self._socket.recv(1 << 14)
            except TimeoutError:
                if now - heard > self.stuck_after and not self._left.is_set():
                    self._is_alone(f"has not been heard of for {now - heard:.0f} s (stuck_after)")
                continue
            except OSError:
                got = b""
            if not got:
                self._told_to_end.set()
                if not self._left.is_set():
                    self._is_alone("has gone")
                return
            heard = now
            *lines, received = (received + got).split(b"\n")
            for told in map(json.loads, lines):
                if "over" in told:
                    self._left.set()
                if "end" in told:
                    self._told_to_end.set()
                    if not self._left.wait(told["within"]):
                        self.on_end("", told["end"])
                    return
                self._speaks = told.get("speaks", self._speaks)
                if "stack" in told:
                    self._tell({"stack": stack()})

    def _is_alone(self, how: str) -> None:
        """The first rank is no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # what is still to be said is said here
        self._told_to_end.set()
        time.sleep(_DEATH_SECONDS if self._speaks else _LAST_WORDS_SECONDS / 2)
        told = f"training stopped: rank 0, on {os.environ['MASTER_ADDR']}, {how}. {self.last_words()}"
        self.on_end(told if self._speaks else "", 1)


def stack() -> list[str]:
    """The main thread's, outermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return traceback.format_stack(frame) if frame is not None else []


def answers(address: str) -> bool:
    """Whether a host does: accepting a connection or refusing it, both are an answer."""
    try:
        socket.create_connection((address, 22), 3.0).close()
    except ConnectionRefusedError:
        pass
    except OSError:
        return False
    return True


def interrupt(folder: Path, cause: str) -> bool:
    """Have the run whose start's folder that is stop and save; whether it was told. From any host."""
    try:
        told = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        with socket.create_connection((told["address"], told["offer"]["port"]), 5.0) as connection:
            connection.sendall(json.dumps({"secret": told["offer"]["secret"], "stop": cause}).encode() + b"\n")
            time.sleep(2 * _TICK_SECONDS)
    except (OSError, ValueError, KeyError):
        return False
    return True


def say(text: str, code: int) -> None:
    """Last words; a run that was stopped has not failed."""
    with contextlib.suppress(OSError, ValueError):
        if text:
            print(text, file=sys.stdout if code == EXIT_STOPPED else sys.stderr, flush=True)


def _exit(text: str, code: int) -> NoReturn:
    say(text, code)
    os._exit(code)
