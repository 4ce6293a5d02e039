"""What sums of gradients over ranks in fp32 cost beside DeepSpeed's default, bf16: `python -m benchmarks.sums`.

    one launch of two ranks -> per ZeRO stage and accumulation two engines that train in turn, round after round

Writes benchmarks/results/sums.json. On one host ranks talk over loopback, with no network to fill: what twice the
bytes cost on a slow network follows from its speed, 2 more bytes per parameter and reduction. A CPU without bf16 units
computes slowly in bf16, so the micro-steps are short: with longer ones the share of the sums is smaller.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import save
from dsllama.training.engine import free_port

SHAPE = {"n_embd": 256, "n_heads": 4, "n_layers": 4, "multiple_of": 64, "max_seq_len": 64, "vocab_size": 8192}
MICRO_BATCH = 1
RANKS = 2
STAGES = (1, 2, 3)
ACCUMULATIONS = (1, 4)
TYPES = ("fp32", "bf16")


def engine(stage: int, accumulation: int, sums: str, folder: Path) -> Any:
    """A bf16 engine of this rank's world that sums gradients in the given type."""
    from dsllama.config import TrainingConfig
    from dsllama.deepspeed_config import deepspeed_config
    from dsllama.derived import derive
    from dsllama.model import LLaMaTransformer
    from dsllama.training import engine as deepspeed_engine

    tokens = RANKS * accumulation * MICRO_BATCH * SHAPE["max_seq_len"]
    config = TrainingConfig(
        **SHAPE,
        batch_size=MICRO_BATCH,
        tokens_per_update=tokens,
        training_tokens=10_000 * tokens,
        zero_stage=stage,
        warmup_iterations=10,
        deepspeed_overlay=str(folder / f"{sums}.json"),
    )
    ds_json = deepspeed_config(config, derive(config, RANKS, SHAPE["vocab_size"]), deepspeed_engine.accelerator())
    return deepspeed_engine.build(lambda: LLaMaTransformer(config, None), ds_json)[0]


def seconds(trained: Any, updates: int) -> float:
    """Seconds per update, of the slowest rank."""
    import torch
    import torch.distributed as dist

    from dsllama.training.engine import step

    x = torch.randint(0, SHAPE["vocab_size"], (MICRO_BATCH, SHAPE["max_seq_len"]))
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(updates * trained.gradient_accumulation_steps()):
        loss = trained(x, x)
        trained.backward(loss)
        step(trained)
    dist.barrier()
    return (time.perf_counter() - begun) / updates


def in_a_rank(out: Path, rounds: int) -> None:
    """Measure all cases; rank 0 writes the seconds per update of each round."""
    from dsllama.training import engine as deepspeed_engine

    world = deepspeed_engine.start(*deepspeed_engine.world_from_environment())
    told = []
    for stage in STAGES:
        for accumulation in ACCUMULATIONS:
            engines = {sums: engine(stage, accumulation, sums, out.parent) for sums in TYPES}
            taken: dict[str, list[float]] = {sums: [] for sums in TYPES}
            for trained in engines.values():
                seconds(trained, 1)
            for number in range(rounds):
                for sums in TYPES if number % 2 == 0 else reversed(TYPES):
                    taken[sums].append(seconds(engines[sums], 1))
            told.append({"stage": stage, "accumulation": accumulation, "seconds": taken})
    if world.is_main:
        out.write_text(json.dumps(told), encoding="utf-8")
    deepspeed_engine.dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description="fp32 sums of gradients over ranks, beside bf16.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:
        from dsllama.training.run import exit_process

        in_a_rank(options.out, options.rounds)
        exit_process(0)
    launcher = Path(sys.executable).with_name("deepspeed")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "sums.json"
        for sums in TYPES:
            overlay = json.dumps({"communication_data_type": sums})
            (Path(place) / f"{sums}.json").write_text(overlay, encoding="utf-8")
        command = [launcher, "-q", "--num_gpus", RANKS, "--master_port", free_port(), "--module", "benchmarks.sums"]
        subprocess.run([*map(str, command), "--out", str(out), "--rounds", str(options.rounds)], check=True)
        told = json.loads(out.read_text(encoding="utf-8"))
    for row in told:
        ratios = [fp32 / bf16 for fp32, bf16 in zip(*(row["seconds"][sums] for sums in TYPES), strict=True)]
        row["fp32/bf16"] = [round(value, 3) for value in (median(ratios), min(ratios), max(ratios))]
        middle, least, greatest = row["fp32/bf16"]
        milliseconds = {sums: f"{1000 * median(row['seconds'][sums]):.0f} ms" for sums in TYPES}
        print(
            f"ZeRO-{row['stage']} x{row['accumulation']}: {middle} ({least}-{greatest}) of bf16's time; {milliseconds}"
        )
    save(
        "sums", {"ranks": RANKS, "shape": {**SHAPE, "micro_batch": MICRO_BATCH}, "rounds": options.rounds, "rows": told}
    )


if __name__ == "__main__":
    main()
