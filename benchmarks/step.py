"""Training tokens per second beside (a) a bare PyTorch loop and (b) Hugging Face Trainer with DeepSpeed.

    python -m benchmarks.step [--quick]

Each contender is a process of its own, on one core, with one thread. They stay alive side by side and train a
window of updates in turn, so that whatever else the machine does meets all of them alike; what counts is the
ratio within a round. Same shape, precision, optimizer, clipping, micro-batch and accumulation for all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import save

SHAPE = {"n_embd": 256, "n_heads": 4, "n_layers": 4, "multiple_of": 64, "max_seq_len": 256, "vocab_size": 8192}
MICRO_BATCH = 4
TOKENS_PER_MICRO_STEP = MICRO_BATCH * SHAPE["max_seq_len"]
MANY = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--contender", nargs=3, metavar=("NAME", "STAGE", "ACCUMULATION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, stage, accumulation = options.contender
        _CONTENDERS[name](int(stage), int(accumulation))
        return
    rounds = 3 if options.quick else 7
    cases = [compare(stage, accumulation, rounds) for stage in (0, 1) for accumulation in (1, 8)]
    boundaries = {stage: boundary(cases, stage) for stage in (0, 1)}
    for stage, cost in boundaries.items():
        print(
            f"ZeRO-{stage}: an update's boundary costs {cost['ours']:.1f} ms, in the bare loop {cost['bare']:.1f} ms"
        )
    save("step", {"shape": SHAPE, "cases": cases, "boundary_ms": boundaries})


def compare(stage: int, accumulation: int, rounds: int) -> dict[str, Any]:
    """Seconds per update of every contender, round by round, and the ratios of their speeds."""
    updates = 8 if accumulation == 1 else 1
    contenders = {name: Contender(name, stage, accumulation) for name in _CONTENDERS}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for number in range(rounds + 1):
            for name, contender in contenders.items():
                taken = contender.train(updates) / updates
                if number > 0:  # the first round warms up
                    seconds[name].append(taken)
    finally:
        for contender in contenders.values():
            contender.end()
    tokens = accumulation * TOKENS_PER_MICRO_STEP
    rates = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    ratios = {
        f"ours/{other}": sorted(b / a for a, b in zip(seconds["ours"], seconds[other], strict=True))
        for other in ("bare", "huggingface")
    }
    spread = {name: [r[0], statistics.median(r), r[-1]] for name, r in ratios.items()}
    listing = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    told = ", ".join(f"{name} {low:.3f} {middle:.3f} {high:.3f}" for name, (low, middle, high) in spread.items())
    print(
        f"ZeRO-{stage}, accumulation {accumulation}: tokens/s {listing}; ratios (min, median, max) {told}", flush=True
    )
    return {
        "stage": stage,
        "accumulation": accumulation,
        "tokens_per_second": rates,
        "ratios": spread,
        "seconds_per_update": seconds,
    }


def boundary(cases: list[dict[str, Any]], stage: int) -> dict[str, float]:
    """Milliseconds per update beyond its micro-steps: t(1) - (t(8) - t(1)) / 7 with t linear in the accumulation."""
    by_accumulation = {case["accumulation"]: case["seconds_per_update"] for case in cases if case["stage"] == stage}
    cost = {}
    for name in ("ours", "bare"):
        one, eight = (statistics.median(by_accumulation[n][name]) for n in (1, 8))
        cost[name] = 1000 * (one - (eight - one) / 7)
    return cost


class Contender:
    """A process that trains when it is told to and says how long that took."""

    def __init__(self, name: str, stage: int, accumulation: int) -> None:
        self.name = name
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
            "PYTHONWARNINGS": "ignore",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "benchmarks.step", "--contender", name, str(stage), str(accumulation)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def train(self, updates: int) -> float:
        """Seconds for so many updates."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("SECONDS "):
                return float(line.split()[1])
        raise RuntimeError(f"{self.name} ended before it had trained")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def _obey(train: Callable[[], None]) -> None:
    """Train as many updates as each line on standard input says."""
    for line in sys.stdin:
        begun = time.perf_counter()
        for _ in range(int(line)):
            train()
        print(f"SECONDS {time.perf_counter() - begun}", flush=True)


def _config(stage: int, accumulation: int, folder: Path) -> Any:
    import numpy as np

    from dsllama.config import TrainingConfig

    tokens = accumulation * TOKENS_PER_MICRO_STEP
    np.save(folder / "shard.npy", np.random.default_rng(0).integers(0, 8192, 2_000_000, dtype=np.uint16))
    return TrainingConfig(
        **SHAPE,
        dataset_dir=str(folder),
        batch_size=MICRO_BATCH,
        tokens_per_update=tokens,
        training_tokens=MANY * tokens,
        precision="fp32",
        zero_stage=stage,
        warmup_iterations=10,
    )


def _one_core() -> None:
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _bare(_stage: int, accumulation: int) -> None:
    """The same model in a plain loop: the limit that an engine can only approach."""
    import torch

    from dsllama.data.loader import DatasetLoader
    from dsllama.model import LLaMaTransformer

    _one_core()
    folder = tempfile.TemporaryDirectory()
    config = _config(0, accumulation, Path(folder.name))
    model = LLaMaTransformer(config, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loader = DatasetLoader(MICRO_BATCH, config.max_seq_len, 0, 1, folder.name, "cpu")

    def train() -> None:
        total = 0.0
        for _ in range(accumulation):
            loss = model(*loader.get_batch()) / accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    _obey(train)


def _ours(stage: int, accumulation: int) -> None:
    """The trainer's own update, through the DeepSpeed engine."""
    from dsllama.data.loader import DatasetLoader
    from dsllama.deepspeed_config import deepspeed_config
    from dsllama.derived import derive
    from dsllama.training import engine
    from dsllama.training.stopping import StopRequest
    from dsllama.training.trainer import Job, Trainer

    _one_core()
    folder = tempfile.TemporaryDirectory()
    config = _config(stage, accumulation, Path(folder.name))
    derived = derive(config, 1, 8192)
    loader = DatasetLoader(MICRO_BATCH, config.max_seq_len, 0, 1, folder.name, "cpu")
    job = Job(config, derived, deepspeed_config(config, derived, "cpu"), None, loader, None, None)  # type: ignore[arg-type]
    trainer = Trainer(job, engine.start(0, 1), StopRequest())

    def train() -> None:
        trainer.update += 1
        trainer.scheduler.step(trainer.update)
        trainer.train_one_update()

    _obey(train)


def _huggingface(stage: int, accumulation: int) -> None:
    """transformers' Trainer with DeepSpeed and a LlamaForCausalLM of the same shape."""
    import torch
    import transformers

    from dsllama.model import ffn_hidden_size

    _one_core()
    length = SHAPE["max_seq_len"]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8192,
            hidden_size=SHAPE["n_embd"],
            num_hidden_layers=SHAPE["n_layers"],
            intermediate_size=ffn_hidden_size(SHAPE["n_embd"], SHAPE["multiple_of"]),
            num_attention_heads=SHAPE["n_heads"],
            max_position_embeddings=length,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    rows = torch.randint(0, 8192, (4096, length), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    ds_json = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": MICRO_BATCH * accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": MANY,
    }
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=accumulation,
        max_steps=MANY,
        learning_rate=3e-4,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        deepspeed=ds_json,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        optim="adamw_torch_fused",
    )

    class OnCommand(transformers.TrainerCallback):
        """Waits for a command before an update, and answers after the last one that it asked for."""

        left = 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self.left == 0:
                self.left = int(sys.stdin.readline())
                self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.left -= 1
            if self.left == 0:
                print(f"SECONDS {time.perf_counter() - self.begun}", flush=True)

    transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[OnCommand()]).train()


_CONTENDERS: dict[str, Callable[[int, int], None]] = {"bare": _bare, "ours": _ours, "huggingface": _huggingface}


def _free_port() -> str:
    from dsllama.training.engine import free_port

    return free_port()


if __name__ == "__main__":
    main()
