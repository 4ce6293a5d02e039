"""The crash campaign: a run of two ranks is killed again and again, at random instants, and goes on each time.

    make campaign KILLS=200 SEED=1      or  python -m tests.crashes --kills 200 --seed 1 --folder runs/crashes
    make campaign KILLS=12 EVERY=60     the same, killed about a minute after each start: for the account

Each start is drawn from the seed alone: topology (every second one another than the first), who is killed, when. A run
that never dies is the measure of the losses, the loader that of the samples. At the end, and after each kill, what is
there is held against them; the account of the run against the wall clock.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dsllama.checkpoint.catalog import list_checkpoints, open_checkpoint
from dsllama.training import account
from tests.conftest import REPOSITORY, Run, TinyData, deepspeed_command, environment

KEPT, MOST_SECONDS = 3, 1800.0
# (ranks, ZeRO stage); the first is that of the measure.
TOPOLOGIES = [(2, 1), (1, 0), (2, 0), (1, 1), (2, 2), (1, 2), (2, 3), (1, 3)]
# A high rate learns by heart, which magnifies what topologies round otherwise.
SETTINGS = {"shuffle": True, "log_interval": 1, "max_lr": 1e-4, "min_lr": 1e-5}
WHO = ("rank 0", "rank 1", "ranks", "launcher", "deepspeed", "all")
WHEN = ("resuming", "training", "saving", "publishing", "pruning")


@dataclass
class Kill:
    """One start and its end."""

    number: int
    topology: tuple[int, int]
    who: str
    when: str
    after: float  # seconds, from the start or from what `when` names
    update: int = 0  # of the log, when it was killed
    seconds_to_end: float = 0.0  # from the kill until the last process had gone
    said: str = ""


@dataclass
class Campaign:
    """A run in a folder, and what its kills have shown."""

    folder: Path
    data: TinyData
    updates: int
    seed: int
    each_save: int = 20  # updates
    every: float = 0.0  # seconds from a start to its kill, about; 0 for the instants that `WHEN` names
    pace: float = 0.0  # seconds that each update takes longer
    kills: list[Kill] = field(default_factory=list)
    reported: set[Path] = field(default_factory=set)
    began: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        return {
            **self.data.settings, "training_tokens": self.updates * 256, "token_ckpt": self.each_save * 256,
            "keep_last": KEPT, "load_ckpt": "auto", **SETTINGS,
        }  # fmt: skip

    def measure(self) -> dict[int, float]:
        """The losses of the run that never dies; one that is there already is taken."""
        run = Run(self.folder / "measure", self.settings | {"zero_stage": TOPOLOGIES[0][1], "token_ckpt": "1G"})
        if len(_rows(run)) < self.updates:
            self._start(run, TOPOLOGIES[0][0]).wait(MOST_SECONDS)
        return run.losses()

    def draw(self, number: int) -> Kill:
        """Who is killed, and when, by the seed and the number of the kill."""
        drawn = random.Random(f"{self.seed} {number}")
        if self.every:
            who, after = drawn.choice(WHO), drawn.uniform(0.75, 1.25) * self.every
            return Kill(number, TOPOLOGIES[0], who, "training", after)
        topology = TOPOLOGIES[0] if number % 2 == 0 else drawn.choice(TOPOLOGIES[1:])
        when = drawn.choice(WHEN)
        after = drawn.uniform(0, 12) if when == "resuming" else drawn.uniform(0, 2 if when == "training" else 0.05)
        return Kill(number, topology, drawn.choice(WHO), when, after)

    def kill(self, kill: Kill) -> bool:
        """Start, kill, wait for all to be gone; returns whether it came to its end before."""
        run = Run(self.folder / "run", self.settings | {"zero_stage": kill.topology[1]})
        before = len(_rows(run))
        self.began = self.began or time.time()
        console = self.folder / f"console_{kill.number:04d}.txt"
        process = self._start(run, kill.topology[0], console)
        self._wait_for(kill, run, process, before)
        everyone = _family(process)
        if process.poll() is None:
            for each in _chosen(kill.who, everyone):
                with contextlib.suppress(psutil.Error):
                    each.kill()
        killed_at = time.monotonic()
        process.wait(MOST_SECONDS)
        _, alive = psutil.wait_procs([each for _, each in everyone], timeout=MOST_SECONDS)
        assert not alive, f"{alive} live on after {kill}"
        kill.seconds_to_end = time.monotonic() - killed_at
        said = console.read_text(errors="replace")
        kill.said = next(
            (line for line in said.splitlines() if line.startswith(("training stopped", "stopped by"))), ""
        )
        kill.update = max((int(row["update"]) for row in _rows(run)), default=0)
        self.reported |= {Path(path) for path in re.findall(r"^saved (\S+) \(", said, re.MULTILINE)}
        self.kills.append(kill)
        return f"update {self.updates} of {self.updates}" in said or "nothing is left to train" in said

    def check(self) -> None:
        """No checkpoint that was reported has gone, but by retention; the newest one is whole."""
        there = list_checkpoints(self.folder / "run" / "checkpoints")
        newer = {path: sum(other > path for other in there) for path in self.reported}
        lost = [path for path, count in newer.items() if path not in there and count < KEPT]
        assert not lost, f"{lost} had been reported; there are {there}"
        if there:
            assert not list(open_checkpoint(there[-1]).damages())

    def finish(self, expected: dict[int, float]) -> dict[str, Any]:
        """Train to the end; the surviving path held against the run that never died."""
        run = Run(self.folder / "run", self.settings | {"zero_stage": TOPOLOGIES[0][1]})
        console = self.folder / "console_last.txt"
        assert self._start(run, TOPOLOGIES[0][0], console).wait(MOST_SECONDS) == 0, console.read_text()[-3000:]
        wall = time.time() - self.began  # before all that is compared here, which is no part of the run
        losses = run.losses()
        assert losses.keys() == expected.keys()
        worst = max(abs(losses[update] / loss - 1) for update, loss in expected.items())
        assert worst < 1e-6, f"a loss deviates by {worst:.1e}"
        assert _samples(run) == self._expected_samples(), "an update has seen other samples than it should"
        return {
            "seed": self.seed, "kills": len(self.kills), "updates": self.updates, "worst": worst,
            "same_to_the_bit": sum(losses[update] == loss for update, loss in expected.items()),
            "by": {name: Counter(getattr(kill, name) for kill in self.kills) for name in ("who", "when")},
            "slowest_end": max((kill.seconds_to_end for kill in self.kills), default=0.0),
            **self._account(run, wall),
        }  # fmt: skip

    def _account(self, run: Run, wall: float) -> dict[str, Any]:
        """That of the run, whose parts must add up to the wall clock."""
        starts = account.read(run.folder / "checkpoints")
        seconds = account.total(starts)
        # The last launcher looks for the end of its ranks once a second; ranks that outlive theirs overlap.
        assert abs(sum(seconds.values()) - wall) < wall / 100 + 5, f"{seconds} are not {wall:.1f} s"
        print("\n".join(account.tables(starts)), flush=True)
        return {"wall": wall, "seconds": seconds, "goodput": account.goodput(seconds)}

    def _expected_samples(self) -> dict[int, list[str]]:
        """Of each update, by the loader of a single rank."""
        from dsllama.data.loader import DatasetLoader

        settings, found = self.settings, {}
        shape = settings["batch_size"], settings["max_seq_len"], 0, 1, settings["dataset_dir"], "cpu"
        with DatasetLoader(*shape, shuffle=True, seed=1337) as loader:
            steps = settings["tokens_per_update"] // (settings["batch_size"] * settings["max_seq_len"])
            for update in range(1, self.updates + 1):
                found[update] = sorted(digest for _ in range(steps) for digest in _digests(*loader.get_batch()))
        return found

    def _start(self, run: Run, ranks: int, console: Path | None = None) -> subprocess.Popen[Any]:
        out = (console or self.folder / "console_measure.txt").open("w")
        command = deepspeed_command(ranks, "--module", "tests.crashes", *run.words())
        numbered = {**environment(), "CAMPAIGN_START": str(len(self.kills)), "CAMPAIGN_PACE": str(self.pace)}
        return subprocess.Popen(command, cwd=REPOSITORY, env=numbered, stdout=out, stderr=out, start_new_session=True)

    def _wait_for(self, kill: Kill, run: Run, process: subprocess.Popen[Any], rows: int) -> None:
        if self.every:
            deadline = time.monotonic() + kill.after
            while time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.05)
            return
        deadline, folder = time.monotonic() + MOST_SECONDS, run.folder / "checkpoints"

        def until(holds: Any) -> None:
            while not holds() and process.poll() is None:
                assert time.monotonic() < deadline, f"hangs before {kill}"
                time.sleep(0.001)

        def log_grows() -> bool:
            time.sleep(0.05)
            return len(_rows(run)) != rows

        def names(start: str) -> set[str]:
            with contextlib.suppress(FileNotFoundError):
                return {path.name for path in folder.iterdir() if path.name.startswith(start)}
            return set()

        if kill.when != "resuming":
            until(log_grows)
        if kill.when in ("saving", "publishing"):
            until(lambda: names(".writing"))
        if kill.when == "publishing":
            until(lambda: not names(".writing"))
        if kill.when == "pruning":
            seen: set[str] = set()

            def one_has_gone() -> bool:
                seen.update(there := names("update"))
                return bool(seen - there)

            until(one_has_gone)
        time.sleep(kill.after)


def _rows(run: Run) -> list[dict[str, str]]:
    """Of its log so far; a run may be killed before there is one, or while it is moved."""
    with contextlib.suppress(FileNotFoundError):
        return run.rows()
    return []


def _samples(run: Run) -> dict[int, list[str]]:
    """The digests of the sequences that each update of the surviving path has seen, over all ranks, sorted."""
    seen: dict[int, tuple[int, list[str]]] = {}
    for file in sorted(run.folder.glob("samples_*.jsonl")):
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # one that was cut short was of an update that is made anew
                start, update, digests = json.loads(line)
                last, others = seen.get(update, (start, []))
                if start >= last:
                    seen[update] = start, [*(others if start == last else []), *digests]
    return {update: sorted(digests) for update, (_, digests) in seen.items()}


def _family(process: subprocess.Popen[Any]) -> list[tuple[str, psutil.Process]]:
    """(what it is, process) of all that the launcher has started."""
    with contextlib.suppress(psutil.Error):
        typed = psutil.Process(process.pid)
        found = [("deepspeed", typed)]
        for child in typed.children(recursive=True):
            words = child.cmdline()
            ranks = [word.partition("=")[2] for word in words if word.startswith("--local_rank=")]
            is_launcher = any("deepspeed.launcher" in word for word in words)
            found.append((f"rank {ranks[0]}" if ranks else "launcher" if is_launcher else "helper", child))
        return found
    return []


def _chosen(who: str, everyone: list[tuple[str, psutil.Process]]) -> list[psutil.Process]:
    wanted = {"ranks": ("rank 0", "rank 1"), "all": tuple(name for name, _ in everyone)}.get(who, (who,))
    chosen = [process for name, process in everyone if name in wanted]
    return chosen or [process for _, process in everyone]  # a rank that this topology, or this moment, lacks


def campaign(made: Campaign, kills: int, expected: dict[int, float] | None = None) -> dict[str, Any]:
    """All of it; raises AssertionError, which names the kill, where something is not as it must be. expected: the
    losses of the run that never dies, where they are known."""
    made.folder.mkdir(parents=True, exist_ok=True)
    expected = expected or made.measure()
    for number in range(kills):
        kill = made.draw(number)
        print(f"{number + 1}/{kills}  {kill.topology} {kill.who} killed while {kill.when}", end=" ", flush=True)
        ended = made.kill(kill)
        made.check()
        print(f"-> update {kill.update}, gone in {kill.seconds_to_end:.1f} s  {kill.said[:90]}", flush=True)
        if ended:
            break
    told = made.finish(expected)
    (made.folder / "told.json").write_text(json.dumps(told, indent=1))
    return told


# ---------------------------------------------------------------- in a rank


def _digests(x: Any, y: Any) -> list[str]:
    """By which each sequence of a batch is known again."""
    import torch

    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in torch.cat([x, y], 1)]


def rank(argv: Sequence[str]) -> None:
    """A training that notes the samples of each update, in the order of starts."""
    from dsllama.training import stopping

    stop = stopping.StopRequest()  # before anything is imported that takes seconds
    from dsllama.data.loader import DatasetLoader
    from dsllama.training import trainer
    from dsllama.training.run import exit_process, main

    train, start = trainer.Trainer.train_one_update, int(os.environ["CAMPAIGN_START"])
    pace = float(os.environ["CAMPAIGN_PACE"])
    digests: list[str] = []

    def noting(self: trainer.Trainer) -> Any:
        time.sleep(pace)
        told = train(self)
        file = Path(self.config.log_file).with_name(f"samples_{self.world.rank}.jsonl")
        with file.open("a") as notes:
            notes.write(json.dumps([start, self.update, digests]) + "\n")
        digests.clear()
        return told

    get_batch = DatasetLoader.get_batch

    def digesting(self: DatasetLoader) -> Any:
        x, y = get_batch(self)
        digests.extend(_digests(x, y))
        return x, y

    DatasetLoader.get_batch = digesting  # type: ignore[method-assign]
    trainer.Trainer.train_one_update = noting  # type: ignore[method-assign]
    exit_process(main(argv, stop))


if __name__ == "__main__":
    if any(word.startswith("--local_rank") for word in sys.argv):
        rank(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--updates", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, default=0.0, help="seconds from a start to its kill")
    parser.add_argument("--folder", type=Path, default=Path("runs/crashes"))
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    data, each_save = TinyData.made(asked.folder), 200 if asked.every else 20
    made = Campaign(asked.folder, data, asked.updates, asked.seed, each_save, asked.every)
    print(json.dumps(campaign(made, asked.kills), indent=1))
