"""One update of a DeepSpeed engine in plain PyTorch: with the roundings that the engine is entitled to, and no others.

Those are: fp32 masters that begin as the low-precision weights, forward and backward on a low-precision copy of them.
All else, the sums over micro-steps and ranks, the norm, clipping and AdamW, is computed in fp64, so what an engine
deviates by is its own. Nothing of DeepSpeed is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dsllama.checkpoint.fragments import KINDS, MOMENTS
from dsllama.checkpoint.state import State
from dsllama.config import TrainingConfig
from dsllama.model import LLaMaTransformer
from dsllama.training.engine import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class After:
    """What an update should come to. loss: the mean over micro-steps and ranks; norm: of the averaged gradients, before
    clipping; moments: in fp64; applied: false where gradients are not finite, so that nothing may change."""

    loss: float
    norm: float
    moments: State
    applied: bool


class PlainLoop:
    """The samples of update `number` are drawn from its number and theirs, so no rank needs another's."""

    def __init__(self, config: TrainingConfig, world: World, micro_steps: int) -> None:
        """config: of a model small enough to be held whole by every rank; its dropout must be 0."""
        self.config, self.world, self.micro_steps = config, world, micro_steps
        torch.manual_seed(config.seed)
        eager = config.model_copy(update={"activation_checkpointing": False})
        model = LLaMaTransformer(eager, None, device=world.device)
        self.dtype = DTYPES[config.precision]
        self.decays = config.beta1, config.beta2
        self.initial: State = {}
        for name, weight in model.named_parameters():
            self.initial[name, "weight"] = weight.detach().to(self.dtype).double().view(-1)
            for kind in KINDS[1:]:
                self.initial[name, kind] = torch.zeros_like(self.initial[name, "weight"])
        self.model = model.to(self.dtype)

    def batch(self, number: int, micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a rank's micro-batch, each (batch_size, max_seq_len) int64."""
        config = self.config
        generator, shape = torch.Generator(), (config.batch_size, config.max_seq_len + 1)
        generator.manual_seed(1_000_003 * number + micro_step * self.world.size + rank)
        drawn = torch.randint(0, self.model.vocab_size, shape, generator=generator).to(self.world.device)
        return drawn[:, :-1], drawn[:, 1:]

    def noise(self) -> float:
        """The relative difference of two computations of one gradient on this device, the worst parameter's, on the
        worst rank: 0 where its sums have an order. Collective."""
        tokens, targets = self.batch(1, 0, self.world.rank)
        parameters = list(self.model.parameters())
        both = [torch.autograd.grad(self.model(tokens, targets), parameters) for _ in range(2)]
        pairs = [(a.double(), b.double()) for a, b in zip(*both, strict=True)]
        noise = torch.stack([(a - b).norm() / a.norm().clamp_min(1e-30) for a, b in pairs]).max()
        dist.all_reduce(noise, dist.ReduceOp.MAX)
        return float(noise)

    def update(self, before: State, number: int, loss_scale: float = 1.0) -> After:
        """What update `number` makes of the state `before` (fp32, whole); the weights follow by `weight`. Collective. A
        rank computes the next one's samples: one that computes wrongly, or sees other data, cannot agree with itself.
        """
        config, parameters = self.config, dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name, "weight"].view_as(parameter))
        sums = {name: torch.zeros(p.numel(), dtype=torch.float64, device=p.device) for name, p in parameters.items()}
        losses = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        for micro_step in range(self.micro_steps):
            tokens, targets = self.batch(number, micro_step, (self.world.rank + 1) % self.world.size)
            loss = self.model(tokens, targets)
            (loss / self.micro_steps * loss_scale).backward()
            losses += loss.detach().double() / self.micro_steps / self.world.size
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                sums[name] += parameter.grad.double().view(-1) / loss_scale / self.world.size
                parameter.grad = None
        together = torch.cat([losses, *sums.values()])
        dist.all_reduce(together)
        losses, *gradients = together.split([1, *(gradient.numel() for gradient in sums.values())])
        norm = float(torch.cat(gradients).norm())
        if not math.isfinite(norm):
            unchanged = {key: tensor.double() for key, tensor in before.items() if key[1] != "weight"}
            return After(float(losses), norm, unchanged, applied=False)
        clip = min(1.0, config.gradient_clipping / (norm + 1e-6)) if config.gradient_clipping else 1.0
        moments: State = {}
        for name, gradient in zip(sums, gradients, strict=True):
            gradient = gradient * clip
            for kind, decay, term in zip(MOMENTS, self.decays, (gradient, gradient**2), strict=True):
                moments[name, kind] = decay * before[name, kind].double() + (1 - decay) * term
        return After(float(losses), norm, moments, applied=True)

    def weight(self, old: Tensor, average: Tensor, square: Tensor, step: int, rate: float) -> Tensor:
        """A weight after AdamW's step number `step` (Loshchilov and Hutter 2019, algorithm 2), from its moments; fp64.

        For the engine's own moments: from a gradient near zero the first step takes little more than the sign, so
        that weights would tell of roundings what moments tell of the gradient.
        """
        config, old, average, square = self.config, old.double(), average.double(), square.double()
        first, second = (1 - decay**step for decay in self.decays)
        denominator = (square / second).sqrt() + config.adam_eps
        return old * (1 - rate * config.weight_decay) - rate * average / first / denominator
