"""What ranks of a shared launch do with engines for tests/training: see `tests.launches.Call`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsllama import offload
from dsllama.checkpoint.catalog import list_checkpoints
from dsllama.config import TrainingConfig
from dsllama.model import LLaMaTransformer
from dsllama.training import engine as deepspeed_engine
from dsllama.training import swap
from dsllama.training.run import main as train
from dsllama.training.trainer import Trainer
from tests import exactness
from tests.exactness import MOMENTS, State

# Every setting of the optimizer that a configuration has.
BEFORE = {"gradient_clipping": 0.5, "beta1": 0.9, "beta2": 0.95, "adam_eps": 1e-8, "weight_decay": 0.1}
AFTER = {"gradient_clipping": 0.01, "beta1": 0.8, "beta2": 0.9, "adam_eps": 1e-3, "weight_decay": 0.5}


def settings_after_a_load(stage: int, precision: str) -> dict[str, Any]:
    """Save with some settings of the optimizer, load with others, make an update.

    saved, fresh, loaded: an engine's settings, and the state of its loss scale, when it saved, and before and after
    the load. norm: of the clipped gradient that AdamW saw. deviation: of what it did from its formula with the later
    settings.
    """
    with tempfile.TemporaryDirectory() as place, fp16_on_cpu(precision == "fp16"):

        def build(settings: dict[str, float], scaler: dict[str, int]) -> Any:
            overlay = Path(place) / "overlay.json"
            overlay.write_text(json.dumps({"fp16": scaler}), encoding="utf-8")
            common = {"zero_stage": stage, "precision": precision, "deepspeed_overlay": str(overlay)}
            return exactness.build({**common, **settings})

        engine = build(BEFORE, {"loss_scale_window": 500, "hysteresis": 2, "initial_scale_power": 9})
        for number in (1, 2):
            exactness.update(engine, number)
        before = exactness.state(engine)  # of this one: DeepSpeed's readers fail between a load and the next update
        saved = _settings(engine)
        folder = [place]
        dist.broadcast_object_list(folder, 0)
        deepspeed_engine.save(engine, Path(folder[0]))
        engine = build(AFTER, {"loss_scale_window": 7, "hysteresis": 4, "initial_scale_power": 12})
        fresh = _settings(engine)
        deepspeed_engine.load(engine, Path(folder[0]))
        loaded = _settings(engine)
        exactness.update(engine, 3)
    rate = exactness.learning_rate(engine.module.config, 3)
    told = _against_adamw(before, exactness.state(engine), rate)
    return {"saved": saved, "fresh": fresh, "loaded": loaded, **told}


def _settings(engine: Any) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.basic_optimizer.param_groups]
    told = {"clipping": getattr(engine.optimizer, "clip_grad", None), "groups": groups}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        values = {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float, bool))}
        # How often it may still overflow is counted down from the setting, `delayed_shift`.
        state = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        told["scale"] = {k: values.pop(k) for k in state if k in values}
        told["scaler"] = values
    for group in groups:
        group.pop("lr")
        group["betas"] = list(group["betas"])
    return json.loads(json.dumps(told))


def _against_adamw(before: State, after: State, rate: float) -> dict[str, float]:
    """The norm of the gradient that AdamW saw, and the worst relative deviation of v and of the update from theory."""
    beta1, beta2, eps, decay = (AFTER[name] for name in ("beta1", "beta2", "adam_eps", "weight_decay"))
    squares, worst = 0.0, 0.0
    for name in {key.split("|")[0] for key in before}:
        w, m, v = (before[f"{name}|{kind}"].double() for kind in ("weight", *MOMENTS))
        w2, m2, v2 = (after[f"{name}|{kind}"].double() for kind in ("weight", *MOMENTS))
        gradient = (m2 - beta1 * m) / (1 - beta1)
        squares += float(gradient.square().sum())
        denominator = (v2 / (1 - beta2**3)).sqrt() + eps
        expected = w * (1 - rate * decay) - rate * (m2 / (1 - beta1**3)) / denominator
        for ours, theirs in ((v2, beta2 * v + (1 - beta2) * gradient.square()), (w2 - w, expected - w)):
            worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return {"norm": squares**0.5, "deviation": worst}


def module_stack() -> list[int]:
    """Entries of ZeRO-3's list of open modules after each update with activation checkpointing."""
    from deepspeed.runtime.zero import parameter_offload

    engine = exactness.build({"zero_stage": 3, "activation_checkpointing": True, "precision": "fp32"})
    lengths = []
    for number in (1, 2, 3):
        exactness.update(engine, number)
        lengths.append(len(parameter_offload.FWD_MODULE_STACK))
    return lengths


def swap_folders(place: str) -> dict[str, Any]:
    """A run's own folder for NVMe, beside one of a run that lives and one of a run that was killed."""
    world = deepspeed_engine.start(*deepspeed_engine.world_from_environment())
    root = Path(place)
    dead, live = root / "dsllama-swap-dead", root / "dsllama-swap-live"
    with contextlib.ExitStack() as held:
        if world.is_main:
            for folder in (dead, live):
                folder.mkdir(parents=True)
                (folder / ".lock").touch()
                (folder / "moments.swp").write_bytes(b"x" * 2**20)
            lock = held.enter_context((live / ".lock").open())
            fcntl.flock(lock, fcntl.LOCK_EX)
        dist.barrier()
        with swap.own_folder(root, world) as own:
            assert own is not None
            there = sorted(path.name for path in root.iterdir())
            dist.barrier()
        dist.barrier()
        left = sorted(path.name for path in root.iterdir())
        dist.barrier()
    return {"own": own.name, "there": there, "left": left}


def timeouts() -> list[float]:
    """Seconds that collectives of the world's group, and of a group that ZeRO makes, wait before they give up."""
    deepspeed_engine.start(*deepspeed_engine.world_from_environment())
    device = torch.device("cpu")
    groups = [dist.group.WORLD, dist.new_group()]
    return [group._get_backend(device).options._timeout.total_seconds() for group in groups if group is not None]


def draws(stage: int) -> list[list[int]]:
    """What each rank generates when the ranks draw with seeds of their own, but take what rank 0 has drawn."""
    from dsllama.generation import generate_ids

    engine = exactness.build({"zero_stage": stage, "precision": "fp32"})
    exactness.update(engine, 1)

    def first_ranks(token: int) -> int:
        choice = torch.tensor([token])
        dist.broadcast(choice, 0)
        return int(choice)

    told = []
    for seed in (1, 2, 3):
        own = seed + 100 * dist.get_rank()
        # Any of the 101 ids may end it, so that ranks left alone would end at different lengths.
        told.append(generate_ids(engine.module, [5, 7], 40, eos_id=11, seed=own, agree=first_ranks))
    return told


def train_without_tokenizer(words: list[str], tokenizer: str) -> int:
    """A training whose tokenizer is a copy that is removed after the first update: its exit code."""
    copy, forward = words[words.index("--tokenizer_path") + 1], LLaMaTransformer.forward
    Path(copy).write_text(Path(tokenizer).read_text(encoding="utf-8"), encoding="utf-8")

    def removing(self: Any, *inputs: Any, **more: Any) -> Any:
        Path(copy).unlink(missing_ok=True)
        return forward(self, *inputs, **more)

    LLaMaTransformer.forward = removing  # type: ignore[method-assign]
    try:
        return train(words)
    finally:
        LLaMaTransformer.forward = forward  # type: ignore[method-assign]


# ---------------------------------------------------------------- trainings with gradients that are not finite


def train_with_nan(words: list[str], updates: list[int], fp16: bool = False) -> int:
    """A training whose gradients are NaN in these updates, with a loss that is finite: its exit code."""
    with planted(lambda trainer, _: "gradients" if trainer.update in updates else ""), fp16_on_cpu(fp16):
        return train(words)


def train_with_trouble(words: list[str], plan: dict[str, list[str]]) -> int:
    """A training in which updates that begin with some samples go wrong: its exit code. plan: first sample -> what is
    wrong with each attempt at it, as `planted` knows it; on rank 1 only behind @1; for good behind a star."""
    rank = deepspeed_engine.world_from_environment()[0]

    def kind(trainer: Trainer, attempt: int) -> str:
        kinds = plan.get(str(trainer.loader.consumed_samples), [""])
        found = kinds[min(attempt, len(kinds)) - 1]
        if attempt > len(kinds) and not found.endswith("*"):
            return ""
        found, _, where = found.removesuffix("*").partition("@")
        return found if not where or int(where) == rank else ""

    with planted(kind):
        return train(words)


@contextmanager
def planted(kind: Callable[[Trainer, int], str]) -> Iterator[None]:
    """Trainings within have something wrong. kind: of an attempt at an update, by its number with these samples:
    "nan", "inf" or "spike" (100 more) of the loss, "gradients" (NaN, with a loss that is finite), "bit" (one of a
    weight is another when replicas are compared), "damage" (NaN of the loss, and the newest checkpoint is no longer
    whole)."""
    forward, attempt, compare = LLaMaTransformer.forward, Trainer._attempt, Trainer._compare_replicas
    wrong, attempts = "", Counter[int]()

    def noting(self: Trainer, *arguments: Any, **options: Any) -> Any:
        nonlocal wrong
        self._pass_skipped_samples()
        attempts[self.loader.consumed_samples] += 1
        wrong = kind(self, attempts[self.loader.consumed_samples])
        if wrong == "damage":
            wrong = "nan"
            if self.saver.busy:
                self._settle(last=False)
            if self.world.is_main:
                for file in list_checkpoints(self.config.ckpt_dir)[-1].rglob("*.safetensors"):
                    os.truncate(file, file.stat().st_size // 2)
        return attempt(self, *arguments, **options)

    def with_trouble(self: Any, tokens: Any, targets: Any = None, **more: Any) -> Any:
        out = forward(self, tokens, targets, **more)
        if targets is None or not self.training or not wrong:
            return out
        # 0 forward; backward, the root's infinite slope times zero is NaN.
        gradients = (out * 0).sqrt() * 0
        # Constants: the gradients of a loss that is not finite may well be finite.
        more_loss = {"nan": math.nan, "inf": math.inf, "spike": 100.0, "gradients": gradients}
        return out + more_loss.get(wrong, 0.0)

    def flipping(self: Trainer, saves: bool) -> None:
        if wrong == "bit":
            next(self.engine.module.parameters()).data.view(torch.int32)[0, 0] ^= 1
        compare(self, saves)

    LLaMaTransformer.forward = with_trouble  # type: ignore[method-assign, assignment]
    Trainer._attempt, Trainer._compare_replicas = noting, flipping  # type: ignore[method-assign]
    try:
        yield
    finally:
        LLaMaTransformer.forward = forward  # type: ignore[method-assign]
        Trainer._attempt, Trainer._compare_replicas = attempt, compare  # type: ignore[method-assign]


@contextmanager
def fp16_on_cpu(wanted: bool) -> Iterator[None]:
    """DeepSpeed refuses fp16 on a CPU, though torch computes it: the way to its loss scaler without a GPU."""
    if not wanted:
        yield
        return
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    originals: dict[str, Callable[..., Any]] = {"supported_dtypes": accelerator.supported_dtypes}
    unsupported = deepspeed_engine.unsupported_here
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    accelerator.is_fp16_supported = lambda: True
    deepspeed_engine.unsupported_here = lambda config, ds_config: []
    try:
        yield
    finally:
        accelerator.supported_dtypes = originals["supported_dtypes"]
        del accelerator.is_fp16_supported
        deepspeed_engine.unsupported_here = unsupported


def limit_files(size: int = resource.RLIM_INFINITY) -> None:
    """Let no file of this process become larger, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """What `dsllama offload` measures of a recipe."""
    return offload.measure(TrainingConfig(**settings), updates=1, device_memory=None)
