"""The suite's way to launch: one start of N ranks does many small things and hands each result to its test.

Starting ranks costs seconds (torch and DeepSpeed are imported by the launcher and by every rank), a tiny training
costs a tenth of that. So a launch gets work by name, trainings and calls, and does it one after the other; each piece
keeps its own exit code and its own words:

    launch = Launch(folder, 2, {"run": run.words(), "rates": Call("tests.applied_rates:rates", {"stage": 2})})
    assert "finished" in launch["run"].said and launch["rates"].value == [...]

It starts when a test first looks, and only once for all files and both workers of the suite that look at the same
folder. A call that raises ends a launch of several ranks (the others might wait for this one) and every test that
looks at it. Work that hangs or kills a rank on purpose needs a launch of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Words = list[str]


@dataclass(frozen=True)
class Call:
    """A function "module:name" that every rank calls with the same arguments; what it returns must fit JSON."""

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How one piece of work ended. code: the largest of all ranks'; said: rank 0's standard output; complained: all
    ranks' standard error; values: what the call returned on each rank (None for a training)."""

    code: int
    said: str
    complained: str
    values: list[Any]

    @property
    def value(self) -> Any:
        """What the call returned on rank 0."""
        return self.values[0]


class Launch:
    """Work by name, done in one launch of `ranks` processes on CPUs when the first result is asked for.

    work: a training's command-line words (it may end with any exit code), or a Call. folder: keeps the words of every
    rank. after: launches that must have been made before. Asking fails with the launcher's output if a rank did not
    come to its end.
    """

    def __init__(
        self, folder: Path, ranks: int, work: Mapping[str, Words | Call], after: Sequence[Launch] = ()
    ) -> None:
        self.folder, self.ranks, self.work, self.after = folder, ranks, dict(work), after

    def __getitem__(self, name: str) -> Ended:
        number = list(self.work).index(name)
        self.make()
        return _ended(self.folder, number, self.ranks)

    def make(self) -> None:
        """Start it, if nobody has done so yet, and wait for its end."""
        for earlier in self.after:
            earlier.make()
        once(self.folder, self._launch)

    def _launch(self, folder: Path) -> None:
        from tests.conftest import started_ranks

        folder.mkdir(parents=True)
        pieces = self.work.values()
        plan = [{"call": p.function, "arguments": p.arguments} if isinstance(p, Call) else {"train": p} for p in pieces]
        (folder / "work.json").write_text(json.dumps(plan), encoding="utf-8")
        result = started_ranks(self.ranks, "-m", "tests.launches", folder)
        for number, name in enumerate(self.work):
            places = [f"{number}.rank_{rank}" for rank in range(self.ranks)]
            if not all((folder / f"{place}.json").exists() for place in places):
                told = [file for place in places for file in sorted(folder.glob(f"{place}.[oe]*"))]
                words = "\n".join(f"{file.name}: {file.read_text(errors='replace')[-3000:]}" for file in told)
                output = (result.stdout + result.stderr)[-3000:]
                raise AssertionError(f"{folder}: exit code {result.returncode}; {name}:\n{words}\n{output}")
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, filled by `make(folder)` in whichever process comes first; the others wait for it."""
    done = folder.with_name(f"{folder.name}.done")
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
            make(folder)
            done.touch()
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _ended(folder: Path, number: int, ranks: int) -> Ended:
    results = [json.loads((folder / f"{number}.rank_{rank}.json").read_text()) for rank in range(ranks)]
    errors = [(folder / f"{number}.rank_{rank}.err").read_text(errors="replace") for rank in range(ranks)]
    said = (folder / f"{number}.rank_0.out").read_text(errors="replace")
    return Ended(max(r["code"] for r in results), said, "".join(errors), [r["value"] for r in results])


# ---------------------------------------------------------------- in every rank


def _work(folder: Path) -> None:
    from dsllama.training.run import exit_process

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for number, piece in enumerate(json.loads((folder / "work.json").read_text(encoding="utf-8"))):
        place = folder / f"{number}.rank_{rank}"
        with _words_into(place):
            try:
                code, value = _do(piece)
            except Exception:
                traceback.print_exc()
                if ranks > 1:
                    exit_process(1)
                code, value = 1, None
        Path(f"{place}.json").write_text(json.dumps({"code": code, "value": value}), encoding="utf-8")
    exit_process(0)


def _do(piece: dict[str, Any]) -> tuple[int, Any]:
    from dsllama.training.run import main

    if "train" in piece:
        return main(piece["train"]), None
    module, name = piece["call"].split(":")
    return 0, getattr(importlib.import_module(module), name)(**piece["arguments"])


@contextlib.contextmanager
def _words_into(place: Path) -> Iterator[None]:
    """What the process writes to its standard output and error, from whatever library, goes to files of this work."""
    kept = {number: os.dup(number) for number in (1, 2)}
    for number, suffix in ((1, "out"), (2, "err")):
        file = os.open(f"{place}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


if __name__ == "__main__":
    _work(Path(sys.argv[-1]))
