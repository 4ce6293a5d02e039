"""What loading costs: `python -m benchmarks.loader` writes benchmarks/results/loader.json and prints a table.

    synthetic uint16 shards -> per shape, in turn and several times over: copy | textbook | in order | shuffled

All ways give int64 x and y of the same tokens, warm (the shards lie in the page cache). `copy` moves the bytes of
one ready batch in memory, x and y: no loader that delivers them can do less. `textbook` is the loader that the
tutorial describes: a whole shard in memory, one slice per batch, cast twice; measured within one shard, its
change of shard apart. `no thread` is our reading in the calling thread, as validation_batches does it. `in order`
and `shuffled` are get_batch with its thread, without any pause between the calls: nothing is hidden behind a
step, and each batch costs a change of threads. Ratios are taken within each round.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.machine import save
from dsllama.data.loader import DatasetLoader

VOCAB_SIZE = 8192
MODEL_FLOPS_PER_TOKEN = 6 * 125e6  # the 125M model: 12 layers, n_embd 768; forward and backward
GPU_FLOPS = 400e12  # assumed: about what one H100 sustains in bf16
SHAPES = [(8, 1024), (8, 2048), (64, 1024), (64, 2048)]
OURS = ("no thread", "in order", "shuffled")
WAYS = ("copy", "textbook", *OURS)

Step = Callable[[], Any]


class TextbookLoader:
    """The tutorial's loader, written from its description; one rank."""

    def __init__(self, batch: int, seq_len: int, folder: Path):
        self.batch, self.seq_len = batch, seq_len
        self.paths = sorted(folder.iterdir())
        self.tokens: npt.NDArray[np.uint16] = np.load(self.paths[0])
        self.position = 0

    def get_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.batch * self.seq_len
        piece = self.tokens[self.position : self.position + size + 1]
        self.position += size
        if self.position + size + 1 >= len(self.tokens):
            self.position = 0
        x, y = piece[:-1].reshape(self.batch, self.seq_len), piece[1:].reshape(self.batch, self.seq_len)
        return torch.from_numpy(x.astype(np.int32)).long(), torch.from_numpy(y.astype(np.int32)).long()


def measure(shards: int = 3, tokens_per_shard: int = 100_000_000, rounds: int = 7) -> dict[str, Any]:
    """Every figure, as plain values. Needs 2 bytes of temporary disk per token, given back at the end."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder, shards, tokens_per_shard)
        cpu_flops = matmul_flops()
        torch.set_num_threads(1)  # several copying threads only disturb each other, and a rank has few cores
        shapes = [measure_shape(folder, *shape, tokens_per_shard // 2, rounds, cpu_flops) for shape in SHAPES]
        start = measure_start(folder, rounds)
    return {
        "data": {"shards": shards, "tokens_per_shard": tokens_per_shard, "dtype": "uint16", "rounds": rounds},
        "assumed": {"flops_per_token": MODEL_FLOPS_PER_TOKEN, "gpu_flops": GPU_FLOPS, "cpu_matmul_flops": cpu_flops},
        "shapes": shapes,
        "start_ms": start,
    }


def measure_shape(folder: Path, batch: int, seq_len: int, tokens: int, rounds: int, cpu_flops: float) -> dict[str, Any]:
    """Tokens per second of each way, their ratios to our own, and the share of a step, for one (B, T)."""
    with (
        DatasetLoader(batch, seq_len, 0, 1, folder, "cpu", vocab_size=VOCAB_SIZE) as in_order,
        DatasetLoader(batch, seq_len, 0, 1, folder, "cpu", vocab_size=VOCAB_SIZE, shuffle=True) as shuffled,
    ):
        held_out = in_order.tokens - 2
        unthreaded = DatasetLoader(
            batch,
            seq_len,
            0,
            1,
            folder,
            "cpu",
            vocab_size=VOCAB_SIZE,
            validation_tokens=held_out,
            split="validation",
        )
        passes = chain.from_iterable(unthreaded.validation_batches() for _ in repeat(None))
        ready = torch.randint(VOCAB_SIZE, (2, batch, seq_len))
        target = torch.empty_like(ready)
        ways: dict[str, Step] = {
            "copy": lambda: target.copy_(ready),
            "textbook": TextbookLoader(batch, seq_len, folder).get_batch,
            "no thread": lambda: next(passes),
            "in order": in_order.get_batch,
            "shuffled": shuffled.get_batch,
        }
        steps = max(20, tokens // (batch * seq_len))
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, step in ways.items():
                speeds[name].append(batch * seq_len / seconds_per_call(step, steps))
        step_seconds = MODEL_FLOPS_PER_TOKEN * batch * seq_len / GPU_FLOPS
        wait = waiting_time(shuffled, step_seconds)
    result: dict[str, Any] = {"batch": batch, "seq_len": seq_len, "wait_us": wait * 1e6}
    result["wait, % of GPU step"] = 100 * wait / step_seconds
    result["tokens_per_second"] = {name: spread(values) for name, values in speeds.items()}
    for name in OURS:
        result[f"{name} / copy"] = spread(_ratios(speeds[name], speeds["copy"]))
        result[f"{name} / textbook"] = spread(_ratios(speeds[name], speeds["textbook"]))
        seconds_per_token = 1 / median(speeds[name])
        result[f"{name}, % of GPU step"] = 100 * seconds_per_token * GPU_FLOPS / MODEL_FLOPS_PER_TOKEN
        result[f"{name}, % of CPU step"] = 100 * seconds_per_token * cpu_flops / MODEL_FLOPS_PER_TOKEN
    return result


def measure_start(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds to open, resume nine tenths through the third epoch, and have the first batch; and the
    textbook's change of shard."""

    def resume() -> None:
        with DatasetLoader(8, 1024, 0, 1, folder, "cpu", vocab_size=VOCAB_SIZE, shuffle=True) as loader:
            position = int(2.9 * loader.samples_per_epoch)
            loader.load_state_dict({**loader.state_dict(), "consumed_samples": position})
            loader.get_batch()

    path = min(folder.iterdir())
    return {
        "open, resume, first batch": spread([1e3 * seconds_per_call(resume, 1) for _ in range(rounds)]),
        "textbook's change of shard": spread([1e3 * seconds_per_call(lambda: np.load(path), 1) for _ in range(rounds)]),
    }


def seconds_per_call(call: Step, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def waiting_time(loader: DatasetLoader, step_seconds: float, steps: int = 30) -> float:
    """Median seconds that get_batch takes when a step, in which this process sleeps, lies between the calls."""
    waits = []
    for _ in range(steps):
        time.sleep(step_seconds)
        waits.append(seconds_per_call(loader.get_batch, 1))
    return median(waits)


def matmul_flops(size: int = 2048) -> float:
    """FLOP/s of this machine's matrix products, the faster of fp32 and bf16: no training step on it is faster."""
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        factor = torch.randn(size, size).to(dtype)
        seconds = min(seconds_per_call(lambda factor=factor: factor @ factor, 1) for _ in range(5))  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
    return best


def write_shards(folder: Path, shards: int, tokens: int) -> None:
    """Random shards, written and so in the page cache."""
    random = np.random.default_rng(0)
    for number in range(shards):
        np.save(folder / f"shard_{number:05}.npy", random.integers(0, VOCAB_SIZE, tokens, dtype=np.uint16))


def spread(values: list[float]) -> list[float]:
    """Median, least and greatest."""
    return [median(values), min(values), max(values)]


def render(results: dict[str, Any]) -> str:
    """The table that people read."""
    lines = ["million tokens per second and process: median (least-greatest), warm", ""]
    lines.append(f"{'B x T':>10} " + " ".join(f"{name:>20}" for name in WAYS))
    for shape in results["shapes"]:
        speeds = [[value / 1e6 for value in values] for values in shape["tokens_per_second"].values()]
        lines.append(f"{_shape(shape)} " + " ".join(f"{_range(values, 0):>20}" for values in speeds))
    ways = [f"{way} / {other}" for other in ("copy", "textbook") for way in OURS]
    lines += ["", f"{'ratio':>10} " + " ".join(f"{name:>20}" for name in ways)]
    for shape in results["shapes"]:
        lines.append(f"{_shape(shape)} " + " ".join(f"{_range(shape[name], 2):>20}" for name in ways))
    shares = [f"{way}, % of {processor} step" for processor in ("GPU", "CPU") for way in ("in order", "shuffled")]
    lines += ["", f"{'B x T':>10} " + " ".join(f"{name:>24}" for name in shares) + "  wait in get_batch"]
    for shape in results["shapes"]:
        values = " ".join(f"{shape[name]:>24.5f}" for name in shares)
        lines.append(f"{_shape(shape)} {values} {shape['wait_us']:>8.0f} us = {shape['wait, % of GPU step']:.2f} %")
    gpu, cpu = results["assumed"]["gpu_flops"], results["assumed"]["cpu_matmul_flops"]
    lines += [
        "",
        f"Step of the 125M model: 6 x 125e6 FLOPs per token, at {gpu / 1e12:.0f} TFLOP/s (a GPU, assumed) or",
        f"{cpu / 1e9:.0f} GFLOP/s (this CPU's matrix products). The shares are as if nothing were read ahead; the wait",
        "is what is left of it with such a GPU step, asleep, between the calls.",
        "",
        *(f"{name}: {_range(values, 1)} ms" for name, values in results["start_ms"].items()),
    ]
    return "\n".join(lines)


def _shape(shape: dict[str, Any]) -> str:
    return f"{shape['batch']:>3} x {shape['seq_len']:>4}"


def _range(values: list[float], digits: int) -> str:
    middle, least, greatest = (f"{value:,.{digits}f}" for value in values)
    return f"{middle} ({least}-{greatest})"


def _ratios(ours: list[float], others: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, others, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="The data loader's speed, beside a copy and the textbook's.")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--tokens_per_shard", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    logging.getLogger("dsllama.data").setLevel(logging.ERROR)  # the rounds go through several epochs
    results = measure(**vars(parser.parse_args()))
    print(render(results))
    save("loader", results)


if __name__ == "__main__":
    main()
