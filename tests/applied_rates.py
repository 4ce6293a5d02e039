"""Writes down, in a rank of its own, the rate of each optimizer step that a DeepSpeed engine really makes."""

import tempfile
from pathlib import Path

import torch

from dsllama.config import TrainingConfig
from dsllama.deepspeed_config import deepspeed_config
from dsllama.derived import derive
from dsllama.training import engine as deepspeed_engine

CONFIG = dict(
    batch_size=1,
    max_seq_len=8,
    tokens_per_update=24,
    n_embd=8,
    n_heads=2,
    n_layers=1,
    training_tokens=24 * 10,
    warmup_iterations=3,
    max_lr=0.5,
    min_lr=0.05,
    schedule="linear",
    precision="fp32",
)


def build(stage: int):
    config = TrainingConfig(**CONFIG, zero_stage=stage)
    ds_json = deepspeed_config(config, derive(config, 1, 16), "cpu")
    engine, _ = deepspeed_engine.build(lambda: torch.nn.Linear(4, 4), ds_json)
    return engine


def updates(engine, count: int, rates: list[float]) -> None:
    """Make `count` updates of three micro-steps, as DeepSpeed alone would: nobody sets the rate but its scheduler."""
    inner = engine.lr_scheduler.optimizer
    hook = inner.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    for _ in range(3 * count):
        loss = engine(torch.ones(2, 4)).square().mean()
        engine.backward(loss)
        engine.step()
    hook.remove()


def rates(stage: int) -> list[float]:
    """The rates of 12 updates, with a save and a load after the 7th."""
    deepspeed_engine.start(*deepspeed_engine.world_from_environment())
    told: list[float] = []
    engine = build(stage)
    updates(engine, 7, told)
    with tempfile.TemporaryDirectory() as folder:
        deepspeed_engine.save(engine, Path(folder))
        engine = build(stage)
        deepspeed_engine.load(engine, Path(folder))
    updates(engine, 5, told)
    return told
