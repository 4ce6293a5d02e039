"""Where the wall clock of a run went, over all its starts.

    launcher | start-up | self-test | engine | restore | compilation || data | steps | evaluation | saves | rest
    what it takes to begin                                              work, until somebody kills it

Every moment of a start is in one part, so the parts add up. The first rank keeps them in ckpt_dir/starts/NNNN, anew
every half second at first and at least every half minute, for a start that is killed says nothing any more. Each
checkpoint has in its manifest what its start had done so far: work beyond the checkpoint that a later start goes on
from is lost. Between two starts the run is down. Neither torch nor a process group is needed to read it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from dsllama import console
from dsllama.cluster.liveness import Progress
from dsllama.errors import Problem, UserError
from dsllama.sizes import readable_duration

ACCOUNT = "account.json"
# Taken by every start, whatever becomes of its work.
BEGINNINGS = ("launcher", "start-up", "self-test", "engine", "restore", "compilation")
# Of an update's own, what is waited for, and what is done between updates (rows, plots, comparing replicas).
WORK = ("data", "steps", "evaluation", "saves", "rest")
PARTS = (*BEGINNINGS, *WORK, "lost", "down")
_FIRST = "first update"  # which compiles: what it takes beyond the others
_SHORTEST_BEAT, _LONGEST_BEAT, _BEATS = 0.5, 30.0, 1000
_KEYS = {"began", "seconds", "kept", "updates", "update", "resumed_from", "until_the_first", "ended"}
R = TypeVar("R")


class Account:
    """The seconds of one start, by part. Other threads may read it.

    launcher: the process that was started first, where this one has begun with it; else it begins now.
    """

    def __init__(self, launcher: int | None = None) -> None:
        now = time.time()
        created = psutil.Process().create_time() if launcher is not None else now
        self.began = created
        with contextlib.suppress(psutil.Error):
            self.began = min(created, psutil.Process(launcher).create_time()) if launcher else created
        self._seconds = defaultdict(float, {"launcher": created - self.began, "start-up": max(0.0, now - created)})
        self._lost = defaultdict[str, float](float)  # of those, to rollbacks
        self._part, self._since = "start-up", time.perf_counter()
        self.progress = Progress()
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._file: Path | None = None
        self._beats: threading.Thread | None = None
        self._ended = threading.Event()
        self.updates = self.update = 0  # made by this start, the last one's number
        self._resumed_from: dict[str, Any] | None = None
        self._until_the_first: dict[str, float] | None = None

    def enter(self, part: str) -> str:
        """What is done from now on; returns what was done until now."""
        self.progress.at("update" if part in ("steps", _FIRST) else part)
        with self._lock:
            now = time.perf_counter()
            self._seconds[self._part] += now - self._since
            self._since = now
            before, self._part = self._part, part
            return before

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens within is that; afterwards it is what it was."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def timing(self, name: str, function: Callable[[], R]) -> Callable[[], R]:
        """The function, whose calls are that part."""

        def timed() -> R:
            with self.part(name):
                return function()

        return timed

    @contextlib.contextmanager
    def one_update(self) -> Iterator[None]:
        """What happens within makes an update."""
        with self.part("steps" if self.updates else _FIRST):
            yield

    def made(self, update: int) -> None:
        """An update has been made."""
        self.updates, self.update = self.updates + 1, update
        if self._until_the_first is None:
            self._until_the_first = self.seconds()

    def seconds(self) -> dict[str, float]:
        """So far, by part."""
        with self._lock:
            return {**self._seconds, self._part: self._seconds[self._part] + time.perf_counter() - self._since}

    def spent(self, *parts: str) -> float:
        """On these parts, so far."""
        seconds = self.seconds()
        return sum(seconds.get(part, 0.0) for part in parts)

    def snapshot(self) -> dict[str, Any]:
        """For a checkpoint's manifest: what of this start is in it."""
        kept = self._kept()
        self.write()  # or a kill that follows would leave an account with less than that
        return {"began": self.began, "kept": kept}

    def _kept(self) -> dict[str, float]:
        seconds = self.seconds()
        return {part: seconds.get(part, 0.0) - self._lost[part] for part in (*WORK, _FIRST)}

    def resumed(self, update: int, snapshot: dict[str, Any] | None) -> None:
        """It goes on from a checkpoint; at a rollback what was done since is lost."""
        own = snapshot is not None and snapshot["began"] == self.began
        kept = snapshot["kept"] if own and snapshot else {}
        for part, seconds in self._kept().items():
            self._lost[part] += seconds - kept.get(part, 0.0)
        if not own:
            self._resumed_from = {"update": update, **(snapshot or {})}

    def keep(self, folder: Path) -> None:
        """Write it there from now on, again and again."""
        self._file = folder / ACCOUNT
        self.write()
        self._beats = threading.Thread(target=self._beat, name="account", daemon=True)
        self._beats.start()

    def _beat(self) -> None:
        while not self._ended.wait(min(_LONGEST_BEAT, max(_SHORTEST_BEAT, sum(self.seconds().values()) / _BEATS))):
            self.write()

    def write(self, ended: str = "") -> None:
        """Write it now. A disk that is full, or gone, is said elsewhere."""
        if self._file is None:
            return
        told = {
            "began": self.began, "seconds": self.seconds(), "kept": self._kept(), "updates": self.updates,
            "update": self.update, "resumed_from": self._resumed_from, "until_the_first": self._until_the_first,
            "ended": ended,
        }  # fmt: skip
        temporary = self._file.with_name(f".{ACCOUNT}.tmp")
        # Not flushed: nobody asks for the last seconds before a power cut.
        with self._writing, contextlib.suppress(OSError):
            temporary.write_text(json.dumps(told), encoding="utf-8")
            temporary.replace(self._file)

    def close(self, ended: str) -> None:
        """Write it for the last time. ended: how. A second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._beats is not None:
            self._beats.join()
        self.write(ended)


# ---------------------------------------------------------------- reading


@dataclass
class Start:
    """One start of a run. seconds: all of its wall clock by part, what was lost later on, and what it was down before.
    recovery: from the end of the start before it to its own first update, by part; None if there was no update."""

    number: int
    began: float
    wall: float
    update: int
    updates: int
    resumed_from: int
    ended: str
    seconds: dict[str, float] = field(default_factory=dict)
    recovery: dict[str, float] | None = None


def read(ckpt_dir: Path) -> list[Start]:
    """All starts of a run, in order. Raises UserError where there is none that has kept an account."""
    told = []
    found = [path for path in (ckpt_dir / "starts").glob(f"*/{ACCOUNT}") if path.parent.name.isdecimal()]
    for path in sorted(found, key=lambda path: int(path.parent.name)):
        with contextlib.suppress(OSError, ValueError):  # the machine has crashed while it was written
            one = json.loads(path.read_text(encoding="utf-8"))
            told += [(int(path.parent.name), one)] if _is_sound(one) else []
    if not told:
        rule = "holds no account of a run (starts/NNNN/account.json)" if ckpt_dir.exists() else "does not exist"
        raise UserError(Problem("ckpt_dir", rule, "name the ckpt_dir of a run", str(ckpt_dir)))
    kept = _survivors([start for _, start in told])
    starts: list[Start] = []
    ends = None
    for (number, one), work in zip(told, kept, strict=True):
        wall, down = sum(one["seconds"].values()), 0.0 if ends is None else max(0.0, one["began"] - ends)
        source = (one["resumed_from"] or {}).get("update", 0)
        start = Start(number, one["began"], wall, one["update"], one["updates"], source, one["ended"])
        start.seconds = {**_of(one, work), "down": down}
        if one["until_the_first"] is not None:
            start.recovery = {"down": down, **one["until_the_first"]}
        starts.append(start)
        ends = one["began"] + wall
    return starts


def _is_sound(one: Any) -> bool:
    """Whether a start's account is one."""
    return (
        isinstance(one, dict)
        and one.keys() >= _KEYS
        and all(isinstance(one[name], dict) for name in ("seconds", "kept"))
        and all(isinstance(value, int | float) for name in ("seconds", "kept") for value in one[name].values())
    )


def _survivors(told: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What of each start's work the last one builds on: all of its own, and from there back from checkpoint to
    checkpoint. Nothing of a start that no later one goes on from."""
    kept: list[dict[str, float]] = [{} for _ in told]
    place, work = len(told) - 1, told[-1]["kept"]
    while True:
        kept[place] = work
        source = told[place]["resumed_from"] or {}
        earlier = [at for at in range(place) if told[at]["began"] == source.get("began")]
        if not earlier:  # it began anew, or with a checkpoint of another run
            return kept
        place, work = earlier[-1], source["kept"]


def _of(one: dict[str, Any], kept: Mapping[str, float]) -> dict[str, float]:
    """The parts of a start, of whose work so much was kept."""
    seconds = one["seconds"]
    first = seconds.get(_FIRST, 0.0)
    usual = seconds.get("steps", 0.0) / (one["updates"] - 1) if one["updates"] > 1 else first
    compilation = max(0.0, first - usual)
    parts = {part: seconds.get(part, 0.0) for part in BEGINNINGS} | {part: kept.get(part, 0.0) for part in WORK}
    parts["compilation"] = compilation
    parts["steps"] += max(0.0, kept.get(_FIRST, 0.0) - compilation)
    return {**parts, "lost": max(0.0, sum(seconds.values()) - sum(parts.values()))}


def total(starts: list[Start]) -> dict[str, float]:
    """The seconds of all starts, by part, and what was down between them."""
    return {part: sum(start.seconds[part] for start in starts) for part in PARTS}


def goodput(seconds: Mapping[str, float]) -> float:
    """The share of the wall clock that was spent on updates that count."""
    return seconds["steps"] / max(sum(seconds.values()), 1e-9)


def summary(ckpt_dir: Path) -> list[str]:
    """What a run says at its end: where its wall clock went, and that of all its starts."""
    try:
        starts = read(ckpt_dir)
    except UserError:  # nothing could be written
        return []
    told = {"account": {**starts[-1].seconds, "down": 0.0}}
    told |= {f"{len(starts)} starts": total(starts)} if len(starts) > 1 else {}
    return [line for title, seconds in told.items() for line in _in_words(title, seconds)]


def _in_words(title: str, seconds: Mapping[str, float]) -> list[str]:
    wall = sum(seconds.values())
    shares = ", ".join(f"{part} {value / wall:.1%}" for part, value in seconds.items() if value / wall >= 5e-4)
    return [f"{title:12} {readable_duration(wall)}, goodput {goodput(seconds):.1%}", f"{'':12} {shares}"]


def tables(starts: list[Start]) -> list[str]:
    """What `dsllama account` shows: a line for each start, the total by part, the mean recovery by part."""
    columns = ("down", "launcher", "start-up", "self-test", "engine", "restore", _FIRST)
    head = ["start", "began", "ran", "updates", *columns, "= recovery", "steps", "lost", "ended"]
    rows = [head]
    for start in starts:
        ended = start.ended or ("killed" if start is not starts[-1] else "killed, or runs")
        way = start.recovery and {part: start.recovery.get(part, 0.0) for part in columns}
        if way and start.recovery:  # what of the first update was waiting for data
            way[_FIRST] += sum(start.recovery.values()) - sum(way.values())
        rows.append([
            str(start.number), time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.began)), _s(start.wall),
            f"{start.resumed_from} -> {start.update}" if start.updates else "none",
            *(_s(way[part]) if way else "" for part in columns), _s(sum(way.values())) if way else "",
            _s(start.seconds["steps"]), _s(start.seconds["lost"]), ended[:70],
        ])  # fmt: skip
    seconds = total(starts)
    wall = sum(seconds.values())
    parts = [[part, _s(value), f"{value / wall:.2%}"] for part, value in seconds.items()]
    parts += [["wall clock", _s(wall), f"goodput {goodput(seconds):.2%}"]]
    shown = [*console.table(rows), "", *console.table(parts)]
    recoveries = [start.recovery for start in starts[1:] if start.recovery]
    if recoveries:
        mean = {part: sum(each.get(part, 0.0) for each in recoveries) / len(recoveries) for part in recoveries[0]}
        told = ", ".join(f"{part} {_s(value)}" for part, value in mean.items() if value >= 0.05)
        shown += ["", f"recovery, mean of {len(recoveries)}: {_s(sum(mean.values()))} ({told})"]
    return shown


def _s(seconds: float) -> str:
    return f"{seconds:,.1f} s"
