"""What a checkpoint costs a run: `python -m benchmarks.checkpoint` writes benchmarks/results/checkpoint.json.

    one launch per case -> round after round: updates, DeepSpeed's save, the bare disk, ours with updates meanwhile

A model of 100M parameters in fp32 under ZeRO-1. `plain` is engine.save_checkpoint, then fsync and sha256 of its files,
which is what it takes to know that they are on the disk and as they were. `disk` writes as many bytes as our save has
from memory, in 4 MiB blocks, with one fsync and no digest. The stall is all that the training stands still for: the
copy, the loss that proves a load, and the manifest. `lost` is what updates take more while the thread writes.
A rank has one core and one thread. With one rank on two cores the writer finds a spare core, which a GPU's host
has; with two ranks it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import save
from dsllama.training.engine import free_port

SHAPE = {"n_embd": 640, "n_heads": 10, "n_layers": 16, "multiple_of": 64, "max_seq_len": 128, "vocab_size": 16384}
CASES = {
    "two ranks, no spare core": (2, False),
    "one rank, a spare core": (1, True),
    "one rank, no spare core": (1, False),
}


def in_a_rank(out: Path, rounds: int, spare: bool) -> None:
    """Measure one case; rank 0 writes what it saw."""
    import torch
    import torch.distributed as dist

    from dsllama.checkpoint import state
    from dsllama.checkpoint.catalog import Checkpoint
    from dsllama.checkpoint.fragments import Source, write_all
    from dsllama.config import TrainingConfig
    from dsllama.deepspeed_config import deepspeed_config
    from dsllama.derived import derive
    from dsllama.files import sha256
    from dsllama.model import LLaMaTransformer
    from dsllama.training import engine as deepspeed_engine
    from dsllama.training.saving import Saver

    world = deepspeed_engine.start(*deepspeed_engine.world_from_environment())
    cores = sorted(os.sched_getaffinity(0))
    if not spare:
        os.sched_setaffinity(0, {cores[0]})
    torch.set_num_threads(1)
    tokens = world.size * SHAPE["max_seq_len"]
    config = TrainingConfig(
        **SHAPE, precision="fp32", batch_size=1, tokens_per_update=tokens, training_tokens=10**4 * tokens
    )
    ds_json = deepspeed_config(config, derive(config, world.size, SHAPE["vocab_size"]), "cpu")
    engine, scheduler = deepspeed_engine.build(lambda: LLaMaTransformer(config, None), ds_json)
    x = torch.randint(0, SHAPE["vocab_size"], (1, SHAPE["max_seq_len"]), generator=torch.Generator().manual_seed(1))
    place = out.parent / "checkpoints"
    place.mkdir(exist_ok=True)
    saver = Saver(place, world, engine)
    assert not saver.foreground, saver.foreground

    def update() -> bool:
        """One update, with the all-reduce that tells of the save."""
        scheduler.step(1)
        engine.backward(engine(x, x))
        deepspeed_engine.step(engine)
        told = torch.tensor(saver.progress(), dtype=torch.float64)
        dist.all_reduce(told)
        return int(told.sum()) == world.size

    def load(into: Any, source: Checkpoint) -> None:
        with Source(source.path, source.manifest) as opened:
            state.load(into, opened, source.manifest)

    def timed(work: Any) -> float:
        dist.barrier()
        begun = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - begun

    def plain() -> None:
        engine.save_checkpoint(str(out.parent / "plain"), tag="engine", save_latest=False)

    def flush() -> None:
        files = sorted((out.parent / "plain" / "engine").iterdir())[world.rank :: world.size]
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            sha256(file)

    def disk() -> None:
        with (out.parent / f"disk_{world.rank}").open("wb", buffering=0) as file:
            data = memoryview(saver._memory.numpy())  # type: ignore[union-attr]
            for at in range(0, len(data), 2**22):
                write_all(file.fileno(), data[at : at + 2**22])
            os.fsync(file.fileno())

    manifest = {
        "tokens": 0,
        "data": {},
        "parallel_layout": {"ranks": world.size, "precision": "fp32"},
        "vocab_size": SHAPE["vocab_size"],
        "schedule": {},
        "seed": 1,
        "saved_at": "",
    }
    for _ in range(2):
        update()
    told: list[dict[str, float]] = []
    for number in range(rounds):
        row = {"update": timed(lambda: [update() for _ in range(4)]) / 4}
        row["plain"], row["flush"] = timed(plain), timed(flush)
        shutil.rmtree(out.parent / "plain", ignore_errors=True)
        row["disk"] = timed(disk)
        dist.barrier()
        saver.begin(number, dict(manifest), {}, (x, x))
        begun, updates = time.perf_counter(), 1
        while not update():
            updates += 1
        row["meanwhile"], row["updates"] = time.perf_counter() - begun, updates
        saved = saver.settle()
        row["stall"], row["seconds"], row["bytes"] = saved.stall, saved.seconds, saved.checkpoint.bytes
        read = bytes_read()
        row["load"] = timed(lambda source=saved.checkpoint: load(engine, source))
        row["read"] = bytes_read() - read
        told.append(row)
        shutil.rmtree(saved.checkpoint.path, ignore_errors=True)
    if world.is_main:
        parameters = sum(parameter.numel() for parameter in engine.module.parameters())
        out.write_text(json.dumps({"parameters": parameters, "rounds": told}), encoding="utf-8")
    dist.barrier()


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


def figures(told: dict[str, Any]) -> dict[str, Any]:
    """Median, least and greatest over the rounds."""
    rows = told["rounds"]

    def over(value: Any) -> list[float]:
        values = [value(row) for row in rows]
        return [round(each, 3) for each in (median(values), min(values), max(values))]

    return {
        "stall": over(lambda r: r["stall"]),
        "plain save": over(lambda r: r["plain"] + r["flush"]),
        "plain save, no fsync or digest": over(lambda r: r["plain"]),
        "stall / plain save": over(lambda r: r["stall"] / (r["plain"] + r["flush"])),
        "update": over(lambda r: r["update"]),
        "update meanwhile / update": over(lambda r: r["meanwhile"] / r["updates"] / r["update"]),
        "lost": over(lambda r: r["meanwhile"] - r["updates"] * r["update"]),
        "seconds": over(lambda r: r["seconds"]),
        "MB/s": over(lambda r: r["bytes"] / r["seconds"] / 1e6),
        "rate / disk's": over(lambda r: r["disk"] / r["seconds"]),
        "bytes per parameter": over(lambda r: r["bytes"] / told["parameters"]),
        "load": over(lambda r: r["load"]),
        "read by rank 0 / checkpoint": over(lambda r: r["read"] / r["bytes"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a checkpoint costs a run.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--spare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:
        from dsllama.training.run import exit_process

        in_a_rank(options.out, options.rounds, options.spare)
        exit_process(0)
    launcher = Path(sys.executable).with_name("deepspeed")
    results = {}
    for name, (ranks, spare) in CASES.items():
        with tempfile.TemporaryDirectory(dir=".") as place:  # on the disk, which /tmp may not be
            out = Path(place).resolve() / "told.json"
            start = (
                [launcher, "-q", "--num_gpus", ranks, "--master_port", free_port()] if ranks > 1 else [sys.executable]
            )
            module = ["--module" if ranks > 1 else "-m", "benchmarks.checkpoint"]
            words = [*start, *module, "--out", out, "--rounds", options.rounds, *(["--spare"] if spare else [])]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            subprocess.run([str(word) for word in words], check=True, env=environment)
            results[name] = figures(json.loads(out.read_text(encoding="utf-8")))
        print(name)
        for what, (middle, least, greatest) in results[name].items():
            print(f"  {what:32} {middle:9.3f} ({least:.3f} to {greatest:.3f})")
    save("checkpoint", {"shape": SHAPE, "rounds": options.rounds, "cases": results})


if __name__ == "__main__":
    main()
