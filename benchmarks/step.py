"""What a training step costs: `python -m benchmarks.step` writes benchmarks/results/step.json and prints a table.

    one process per contender, all on one core with one thread -> in turn, round after round: a window of updates

`bare` is a plain PyTorch loop round the same model: fused AdamW, clipping, accumulation. No engine can do less.
`ours` is the Trainer's own update: the DeepSpeed engine, the gradient norm, the all-reduce of the loss.
`huggingface` is transformers' Trainer with DeepSpeed and a LlamaForCausalLM of the same shape, without logging,
saving and evaluation. Shape, precision, micro-batch, optimizer and clipping are the same for all, and so is the
number of parameters, which is checked. What our engine asks of glibc on a CPU is set for all of them.

All processes live at once and only one trains at a time, each round in the other direction. Ratios are taken within
a round, of wall time and of processor time: on a quiet machine both say the same, on a busy one the second
leaves out the waiting for others. One update's boundary (clipping, optimizer and whatever an engine adds) follows
from accumulation 1 and 8, with t linear in the accumulation: t(1) - (t(8) - t(1)) / 7.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS, MICRO_BATCH, SHAPE, TOKENS_PER_MICRO_STEP, Case
from benchmarks.machine import save
from dsllama.training.engine import free_port

ACCUMULATIONS = (1, 8)
UPDATES_PER_WINDOW = {1: 2, 8: 1}
CLOCKS = ("wall", "processor")


def cases(precision: str, stages: tuple[int, ...]) -> list[Case]:
    """Every contender of one table; those that are compared with each other stand, and train, side by side."""
    ways = [("bare", 0), *((name, stage) for stage in stages for name in ("ours", "huggingface"))]
    return [Case(name, precision, stage, number) for number in ACCUMULATIONS for name, stage in ways]


Seconds = dict[Case, list[dict[str, float]]]
"""Per case and round: seconds per update, of each clock."""


def measure(precision: str, stages: tuple[int, ...], rounds: int) -> tuple[Seconds, int]:
    """All windows of one table, and how many parameters each model has."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], 2_000_000, dtype=np.uint16)
        np.save(folder / "shard.npy", tokens)
        contenders: list[Contender] = []
        try:
            contenders += [Contender(case, folder) for case in cases(precision, stages)]
            sizes = {contender.case: int(contender.answer("READY")[0]) for contender in contenders}
            assert len(set(sizes.values())) == 1, f"the models differ: {sizes}"
            seconds: Seconds = {contender.case: [] for contender in contenders}
            for number in range(rounds):
                for contender in contenders if number % 2 == 0 else reversed(contenders):
                    seconds[contender.case].append(contender.train())
        finally:
            for contender in contenders:
                contender.end()
    return seconds, sizes[contenders[0].case]


class Contender:
    """A process that trains when it is told to and says how long that took."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self._errors = folder / ("-".join(map(str, case)) + ".log")
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            # What our engine asks of glibc on a CPU (13 % of a step), for all of them alike.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
            "MALLOC_TOP_PAD_": str(2**26),
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, "-m", "benchmarks.contenders", *map(str, case), str(folder)]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )

    def train(self) -> dict[str, float]:
        """Seconds per update of one window."""
        updates = UPDATES_PER_WINDOW[self.case.accumulation]
        assert self._process.stdin is not None
        self._process.stdin.write(f"{updates}\n")
        self._process.stdin.flush()
        return {clock: float(value) / updates for clock, value in zip(CLOCKS, self.answer("SECONDS"), strict=True)}

    def answer(self, word: str) -> list[str]:
        """What the process says after this word; whatever the libraries print is passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word + " "):
                return line.split()[1:]
        raise RuntimeError(f"{self.case} ended too early:\n{self._errors.read_text()[-2000:]}")

    def end(self) -> None:
        """End the process; it holds nothing that is worth saving."""
        self._process.kill()
        self._process.wait()


# ------------------------------------------------------------ from seconds to figures


def figures(seconds: Seconds, precision: str, stages: tuple[int, ...]) -> dict[str, Any]:
    """What the table shows, of each clock: [median, least, greatest] over the rounds."""
    return {
        "updates": [
            _update(seconds, precision, stage, accumulation) for stage in stages for accumulation in ACCUMULATIONS
        ],
        "boundaries_ms": [_boundary(seconds, precision, stage) for stage in stages],
    }


def _update(seconds: Seconds, precision: str, stage: int, accumulation: int) -> dict[str, Any]:
    found: dict[str, Any] = {"stage": stage, "accumulation": accumulation}
    cases = {name: Case(name, precision, stage if name != "bare" else 0, accumulation) for name in CONTENDERS}
    for clock in CLOCKS:
        taken = {name: np.array([window[clock] for window in seconds[case]]) for name, case in cases.items()}
        tokens = accumulation * TOKENS_PER_MICRO_STEP
        found[clock] = {
            "tokens_per_second": {name: _spread(tokens / values) for name, values in taken.items()},
            "ours/bare": _spread(taken["bare"] / taken["ours"]),
            "ours/huggingface": _spread(taken["huggingface"] / taken["ours"]),
            "huggingface/bare": _spread(taken["bare"] / taken["huggingface"]),
        }
    return found


def _boundary(seconds: Seconds, precision: str, stage: int) -> dict[str, Any]:
    """Milliseconds per update beyond its micro-steps, and how many of ours are not in the bare loop.

    A difference of large numbers, so it is taken from the least times of all rounds too: others on the machine
    only ever add to a time.
    """
    found: dict[str, Any] = {"stage": stage}
    for clock in CLOCKS:
        rounds, least = {}, {}
        for name in CONTENDERS:
            pair = [Case(name, precision, stage if name != "bare" else 0, number) for number in ACCUMULATIONS]
            taken = [np.array([window[clock] for window in seconds[case]]) for case in pair]
            rounds[name] = _beyond_micro_steps(*taken)
            least[name] = float(_beyond_micro_steps(*(times.min() for times in taken)))
        rounds["ours-bare"] = rounds["ours"] - rounds["bare"]
        least["ours-bare"] = least["ours"] - least["bare"]
        found[clock] = {
            name: {"of_least_times": round(least[name], 1), "of_rounds": _spread(rounds[name])} for name in rounds
        }
    return found


def _beyond_micro_steps(few: Any, many: Any) -> Any:
    """From seconds per update at the two accumulations: milliseconds per update that its micro-steps do not take."""
    first, second = ACCUMULATIONS
    return 1000 * (few - first * (many - few) / (second - first))


def _spread(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in (median(values), min(values), max(values))]


def render(tables: dict[str, Any], rounds: int) -> str:
    """The tables that people read."""
    lines = []
    for precision, table in tables.items():
        millions = table["parameters"] / 1e6
        lines += [
            f"{precision}, {millions:.1f}M parameters, {TOKENS_PER_MICRO_STEP} tokens per micro-step, one core; "
            f"median (least-greatest) of {rounds} rounds",
            f"{'':>24} {'tokens/s: bare':>14} {'ours':>7} {'HF':>7} {'ours / bare':>22} {'ours / HF':>22}",
        ]
        for row in table["updates"]:
            for clock in CLOCKS:
                rates = {name: rate[0] for name, rate in row[clock]["tokens_per_second"].items()}
                lines.append(
                    f"ZeRO-{row['stage']} x{row['accumulation']} {clock + ' time':>15} {rates['bare']:>14,.0f} "
                    f"{rates['ours']:>7,.0f} {rates['huggingface']:>7,.0f} "
                    f"{_range(row[clock]['ours/bare'], 3):>22} {_range(row[clock]['ours/huggingface'], 3):>22}"
                )
        lines.append("an update's boundary, ms of processor time: from the least times, and median (least-greatest)")
        for row in table["boundaries_ms"]:
            costs = row["processor"]
            told = [
                f"{name} {cost['of_least_times']:.0f}, {_range(cost['of_rounds'], 0)}" for name, cost in costs.items()
            ]
            lines.append(f"ZeRO-{row['stage']}: " + "; ".join(told))
        lines.append("")
    return "\n".join(lines)


def _range(values: list[float], digits: int) -> str:
    middle, least, greatest = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({least}-{greatest})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Training beside a bare loop and Hugging Face Trainer with DeepSpeed.")
    parser.add_argument("--quick", action="store_true", help="ZeRO-1 only, fewer rounds")
    parser.add_argument("--all", action="store_true", help="bf16 too")
    options = parser.parse_args()
    stages, rounds = ((1,), 4) if options.quick else ((0, 1), 9)
    tables = {}
    for precision in ("fp32", "bf16") if options.all else ("fp32",):
        seconds, parameters = measure(precision, stages, rounds)
        tables[precision] = {"parameters": parameters, **figures(seconds, precision, stages)}
    print(render(tables, rounds))
    beside = {package: version(package) for package in ("transformers", "accelerate")}
    shape = {**SHAPE, "micro_batch": MICRO_BATCH}
    save("step", {"beside": beside, "shape": shape, "rounds": rounds, "precisions": tables})


if __name__ == "__main__":
    main()
