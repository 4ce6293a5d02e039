"""An engine, as dsllama configures it, beside a plain loop with the roundings that the engine is entitled to.

Those are: masters that begin as the low-precision weights (DeepSpeed casts the module before it copies the masters),
forward and backward on the low-precision copy. Everything else is fp32: sums over micro-steps and ranks, clipping by
the norm of that sum, AdamW on the masters, which are then cast down.

    python -m tests.exactness      the table: every stage and precision, 1 and 2 ranks, after one update and after six
"""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsllama.config import TrainingConfig
from dsllama.deepspeed_config import deepspeed_config
from dsllama.derived import derive
from dsllama.model import LLaMaTransformer
from dsllama.training import engine as deepspeed_engine

VOCABULARY = 101  # odd, so that ZeRO cuts unevenly
MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, torch.Tensor]
SETTINGS: dict[str, Any] = {
    "batch_size": 2,
    "max_seq_len": 32,
    "tokens_per_update": 16 * 32,
    "n_embd": 64,
    "n_heads": 4,
    "n_layers": 2,
    "multiple_of": 32,
    "vocab_size": VOCABULARY,
    "max_lr": 0.01,
    "min_lr": 0.001,
    "warmup_iterations": 2,
    "training_tokens": 20 * 16 * 32,
}
CLIPPING = 0.2  # active: the norms are about 0.5


def rows(update: int, sequence: int, config: TrainingConfig) -> torch.Tensor:
    """Sequence `sequence` of an update: max_seq_len + 1 tokens, int64."""
    generator = torch.Generator().manual_seed(100_000 * update + sequence)
    return torch.randint(0, VOCABULARY, (config.max_seq_len + 1,), generator=generator)


def batch(update: int, micro_step: int, rank: int, ranks: int, config: TrainingConfig) -> torch.Tensor:
    """The micro-batch of a rank, (batch_size, max_seq_len + 1)."""
    first = (micro_step * ranks + rank) * config.batch_size
    return torch.stack([rows(update, first + number, config) for number in range(config.batch_size)])


# ---------------------------------------------------------------- in a rank


def build(settings: dict[str, Any]) -> Any:
    """An engine of this rank's world, with all that dsllama configures."""
    rank, ranks = deepspeed_engine.world_from_environment()
    deepspeed_engine.start(rank, ranks)
    config = TrainingConfig(**{**SETTINGS, **settings})
    ds_json = deepspeed_config(config, derive(config, ranks, VOCABULARY), "cpu")
    torch.manual_seed(config.seed)
    engine, _ = deepspeed_engine.build(lambda: LLaMaTransformer(config, None), ds_json)
    return engine


def update(engine: Any, number: int) -> tuple[float, float]:
    """Make one update; its mean loss over micro-steps and ranks, and the gradient norm before clipping."""
    config, ranks = engine.module.config, dist.get_world_size()
    engine.lr_scheduler.step(number)
    steps, total, norm = engine.gradient_accumulation_steps(), torch.zeros(1, dtype=torch.float64), None
    for micro_step in range(steps):
        tokens = batch(number, micro_step, dist.get_rank(), ranks, config)
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        total += loss.detach().double() / steps / ranks
        if micro_step == steps - 1 and engine.zero_optimization_stage() == 0:
            norm = deepspeed_engine.plain_gradient_norm(engine)
        deepspeed_engine.step(engine)
    dist.all_reduce(total)
    norm = deepspeed_engine.gradient_norm(engine) if norm is None else norm
    return total.item(), float("nan") if norm is None else norm


def state(engine: Any) -> State:
    """The fp32 weights and both moments by name, whole on every rank, read by DeepSpeed's own means. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    held: State = {}
    for name, weight in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 0:
            moments = engine.optimizer.state[weight]
            found = [weight.detach(), *(moments[key] for key in MOMENTS)]
        else:
            moments = [safe_get_full_optimizer_state(weight, key) for key in MOMENTS]
            found = [safe_get_full_fp32_param(weight), *moments]
        for key, tensor in zip(("weight", *MOMENTS), found, strict=True):
            held[f"{name}|{key}"] = tensor.detach().float().reshape(-1).clone()
    return held


def trained(settings: dict[str, Any], folder: str, snapshots: list[int]) -> dict[str, Any]:
    """Train; losses and norms, and in `folder` the state after each update of `snapshots`."""
    engine = build(settings)
    told: dict[str, Any] = {"loss": [], "norm": []}
    for number in range(1, max(snapshots) + 1):
        loss, norm = update(engine, number)
        told["loss"].append(loss)
        told["norm"].append(norm)
        if number in snapshots:
            held = state(engine)
            if dist.get_rank() == 0:
                Path(folder).mkdir(parents=True, exist_ok=True)
                torch.save(held, Path(folder) / f"{number}.pt")
    return told


# ---------------------------------------------------------------- the plain loop


def learning_rate(config: TrainingConfig, number: int) -> float:
    """The textbook's cosine."""
    warmup = config.warmup_iterations
    updates = config.training_tokens // config.tokens_per_update
    if number < warmup:
        return config.max_lr * number / warmup
    angle = math.pi * (number - warmup) / (updates - warmup)
    return config.min_lr + (config.max_lr - config.min_lr) * (1 + math.cos(angle)) / 2


def plain(
    settings: dict[str, Any], ranks: int, snapshots: list[int]
) -> tuple[dict[str, list[float]], dict[int, State]]:
    """The same updates without DeepSpeed: losses and norms, and the state after each update of `snapshots`."""
    config = TrainingConfig(**{**SETTINGS, **settings})
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    torch.manual_seed(config.seed)
    model = LLaMaTransformer(config, None)
    names = [name for name, _ in model.named_parameters()]
    masters = [weight.detach().to(dtype).float().requires_grad_() for weight in model.parameters()]
    model = model.to(dtype)
    copies = list(model.parameters())
    betas = (config.beta1, config.beta2)
    adam = torch.optim.AdamW(masters, lr=1.0, betas=betas, eps=config.adam_eps, weight_decay=config.weight_decay)
    told: dict[str, list[float]] = {"loss": [], "norm": []}
    states: dict[int, State] = {}
    micro_steps = config.tokens_per_update // config.max_seq_len // config.batch_size // ranks
    for number in range(1, max(snapshots) + 1):
        for group in adam.param_groups:
            group["lr"] = learning_rate(config, number)
        sums, total = [torch.zeros_like(master) for master in masters], 0.0
        for micro_step, rank in itertools.product(range(micro_steps), range(ranks)):
            tokens = batch(number, micro_step, rank, ranks, config)
            loss = model(tokens[:, :-1], tokens[:, 1:])
            (loss / micro_steps).backward()
            total += loss.item() / micro_steps / ranks
            for summed, copy in zip(sums, copies, strict=True):
                summed += copy.grad.float() / ranks
                copy.grad = None
        for master, summed in zip(masters, sums, strict=True):
            master.grad = summed
        told["loss"].append(total)
        told["norm"].append(float(torch.nn.utils.get_total_norm([master.grad for master in masters])))
        if config.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(masters, config.gradient_clipping)
        adam.step()
        with torch.no_grad():
            for copy, master in zip(copies, masters, strict=True):
                copy.copy_(master)
        if number in snapshots:
            states[number] = {
                f"{name}|{key}": tensor.detach().reshape(-1).clone()
                for name, master in zip(names, masters, strict=True)
                for key, tensor in (("weight", master), *((k, adam.state[master][k]) for k in MOMENTS))
            }
    return told, states


def differences(ours: State, theirs: State) -> dict[str, float]:
    """The worst parameter's relative difference (norm of the difference / norm), by weight and moments."""
    worst: dict[str, float] = {}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        kind = name.split("|")[1]
        other = theirs[name].double()
        relative = float((tensor.double() - other).norm() / other.norm())
        worst[kind] = max(worst.get(kind, 0.0), relative)
    return worst


def main() -> None:
    """Print the table."""
    from tests.launches import Call, Launch

    torch.set_num_threads(1)
    cases = list(itertools.product(("fp32", "bf16"), (0.0, CLIPPING), (0, 1, 2, 3)))
    print("precision  clipping  stage  ranks | loss | after 1: weight exp_avg exp_avg_sq | after 6")
    with tempfile.TemporaryDirectory() as place:
        for ranks in (1, 2):
            settings = {
                f"{precision} {clipping} {stage}": {
                    "precision": precision, "zero_stage": stage, "gradient_clipping": clipping,
                }
                for precision, clipping, stage in cases
            }  # fmt: skip
            folder = Path(place) / str(ranks)
            work = {
                name: Call(
                    "tests.exactness:trained", {"settings": s, "folder": str(folder / name), "snapshots": [1, 6]}
                )
                for name, s in settings.items()
            }
            launch = Launch(folder, ranks, work)
            for name, values in settings.items():
                ended = launch[name]
                assert ended.code == 0, ended.complained
                told, states = plain(values, ranks, [1, 6])
                loss = max(abs(a / b - 1) for a, b in zip(ended.value["loss"], told["loss"], strict=True))
                row = [differences(torch.load(folder / name / f"{n}.pt"), states[n]) for n in (1, 6)]
                cells = [" ".join(f"{value:.0e}" for value in cell.values()) for cell in row]
                print(f"{name:14} {ranks} | {loss:.0e} | {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
