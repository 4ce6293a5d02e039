"""An engine of a reduced run beside the plain loop: what deviates, by how much, and how much may.

Each update begins with the engine's own state, so no chaos builds up and the limit follows from roundings alone. Both
sides compute the same products in the same precision; what is left is fp32 arithmetic on the engine's side: a sum over
micro-steps and ranks, the clipping's factor, AdamW's handful of operations. Each of these n roundings is worth 2**-24,
so (norm of the difference / norm) stays near sqrt(n) 2**-24, 1e-7 to 1e-6; every fault that DeepSpeed is known for
moves some part by 1e-3 or more. The limit, 1e-5, lies in the middle of the two. Beside it:

    weights      follow from the engine's moments; what counts is their change, so the weight's own rounding comes on
                 top, 2**-19 of it
    reduction    in bf16 or fp16 (communication_data_type): each gradient is rounded once or twice, by 2**-9, or flushed
    nothing      a part whose true gradient is nothing has roundings of the others', 2**-28 of the whole norm
    compilation  keeps in fp32 what the model rounds between its operations, and sums in another order: a gradient
                 differs as its last bits do. Only the last update is compiled; the others hold the limit above
    a device     that computes the same gradient twice and gets two, gets ten times that difference

Exact, without any limit: the first weights, the low-precision copy of the weights, and the state after loading.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsllama.checkpoint import state as states
from dsllama.checkpoint.fragments import MOMENTS, DamagedFile
from dsllama.checkpoint.state import State
from dsllama.model import LLaMaTransformer
from dsllama.scheduler import learning_rate
from dsllama.training import checkpoint as checkpoints
from dsllama.training import engine as deepspeed_engine
from dsllama.training.engine import World
from dsllama.training.plain import DTYPES, PlainLoop
from dsllama.training.reduced import Subject
from dsllama.training.saving import Saver

_UPDATES = 3
# An fp16 run begins with a search for its loss scale, in updates that are skipped.
_MOST_SKIPPED = 40
_LIMIT, _OF_A_WEIGHT, _NOISES = 1e-5, 2.0**-19, 10
_OF_NOTHING, _SMALLEST = 2.0**-28, 2.0**-126  # the latter is fp32's
_REDUCED_IN = {"bf16": 2.0**-5, "bfp16": 2.0**-5, "fp16": 2.0**-5}
# Of loss and norm, which are means of many roundings, and of a tensor.
_COMPILED = {"fp32": (1e-4, 1e-4), "bf16": (2.0**-7, 2.0**-3), "fp16": (2.0**-10, 2.0**-6)}
_PARTS = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "feed-forward", "norm": "norms"}


@dataclass(frozen=True)
class Finding:
    """What one part came to after an update. expected, found: the value, or the norm; factor: of what was expected that
    lies in what was found; deviation: of their difference, relative; parameter: the worst of the part."""

    update: int
    what: str
    part: str
    parameter: str
    expected: float
    found: float
    factor: float
    deviation: float
    limit: float

    @property
    def ratio(self) -> float:
        """The deviation over its limit; beyond 1 is a fault."""
        if self.deviation == 0:
            return 0.0
        ratio = self.deviation / self.limit if self.limit else math.inf
        return math.inf if math.isnan(ratio) else ratio


def examine(subject: Subject, world: World, folder: Path) -> list[Finding]:
    """Three updates, a save, a load into a fresh engine, an update (compiled, where the run is): all that was compared,
    the worst parameter of each part on any rank. Collective.

    folder: an empty one that all ranks see, for the checkpoint. Raises OSError, on every rank, if it cannot be written.
    """
    config = subject.config
    plain = PlainLoop(config, world, subject.derived.gradient_accumulation_steps)
    with contextlib.closing(_Engine(subject, world, plain, config.seed)) as first:
        first.compare_exactly(0, "at the start", plain.initial, 0)
        applied = 0
        for number in range(1, _UPDATES + _MOST_SKIPPED + 1):
            applied += first.update(number, applied)
            if applied == _UPDATES:
                break
        saved = states.whole(first.engine)
        tokens, targets = plain.batch(0, 0, 0)
        pinned = tokens[:1], targets[:1]
        layout = {"ranks": world.size, "zero_stage": config.zero_stage, "precision": config.precision}
        saver = Saver(folder, world, first.engine, config.checkpoint_format)
        saver.begin(number, {"tokens": 0, "seed": config.seed, "parallel_layout": layout}, {}, pinned)
        checkpoint = saver.settle().checkpoint
        del saver
    with contextlib.closing(_Engine(subject, world, plain, config.seed + 1)) as second:
        findings = first.findings
        try:
            checkpoints.load(checkpoint, world, second.engine, pinned, config.precision)
        except (DamagedFile, RuntimeError) as error:  # on every rank
            findings.append(Finding(number, f"loading fails: {error}", "all", "", 0, 0, 0, math.inf, 0.0))
        second.compare_exactly(number, "after loading", saved, applied)
        if config.enable_compilation:
            second.engine.compile()
        second.update(number + 1, applied, config.enable_compilation)
        findings += second.findings
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, _worst_by_part(findings))
    return _worst_by_part(finding for each in everywhere for finding in each)


def _worst_by_part(findings: Iterable[Finding]) -> list[Finding]:
    worst: dict[tuple[int, str, str], Finding] = {}
    for finding in findings:
        key = finding.update, finding.what, finding.part
        if key not in worst or finding.ratio > worst[key].ratio:
            worst[key] = finding
    return list(worst.values())


class _Engine:
    """An engine of the reduced model. Every method is collective."""

    def __init__(self, subject: Subject, world: World, plain: PlainLoop, seed: int) -> None:
        self.subject, self.world, self.plain = subject, world, plain
        self.findings: list[Finding] = []
        self.rates: list[float] = []
        self.noise = plain.noise()
        torch.manual_seed(seed)
        model = functools.partial(LLaMaTransformer, subject.config, None, device=world.device)
        self.engine, self.scheduler = deepspeed_engine.build(model, subject.json)
        self.engine.basic_optimizer.register_step_pre_hook(self._note_rates)

    def _note_rates(self, optimizer: Any, *_: Any) -> None:
        self.rates += [group["lr"] for group in optimizer.param_groups]

    def close(self) -> None:
        """Give its memory back."""
        self.engine.destroy()
        del self.engine
        gc.collect()
        if self.subject.config.enable_compilation:
            torch.compiler.reset()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def update(self, number: int, applied: int, compiled: bool = False) -> bool:
        """Make an update and compare; whether it had to be applied, not skipped. applied: so many before it were."""
        before = states.whole(self.engine)
        scale = deepspeed_engine.skips(self.engine).loss_scale or 1.0
        skipped = self.engine.skipped_steps
        rate = self._set_rate(number)
        plain, ranks = self.plain, self.world.size
        batches = (plain.batch(number, micro_step, self.world.rank) for micro_step in range(plain.micro_steps))
        sums, norm = deepspeed_engine.update(self.engine, lambda: next(batches), plain.micro_steps)
        dist.all_reduce(sums)
        expected, found = plain.update(before, number, scale), states.whole(self.engine)
        limit, of_tensors = self._limits(compiled)
        self._compare(number, "loss", expected.loss, float(sums[0]) / plain.micro_steps / ranks, limit)
        self._compare(number, "updates applied", expected.applied, self.engine.skipped_steps == skipped, 0.0)
        if expected.applied:
            given = max(self.rates, key=lambda each: abs(each - rate), default=math.nan)
            self._compare(number, "gradient norm", expected.norm, math.nan if norm is None else norm, limit)
            self._compare(number, "learning rate", rate, given, 1e-9)
        config = self.subject.config
        # Where a part's true gradient is nothing, what there is of it is roundings of all the others'.
        noise = _OF_NOTHING * min(expected.norm, config.gradient_clipping or math.inf)
        for (name, kind), moment in expected.moments.items():
            power = 2 if kind == "exp_avg_sq" else 1  # of the gradient, whose relative error it multiplies
            floor = noise**power + _SMALLEST
            self._compare_tensor(number, kind, name, moment, found[name, kind], power * of_tensors, floor)
        for name, old in ((name, tensor.double()) for (name, kind), tensor in before.items() if kind == "weight"):
            new, (average, square) = old, (found[name, kind] for kind in MOMENTS)
            if expected.applied:
                new = plain.weight(old, average, square, applied + 1, rate)
            change, rounding = found[name, "weight"].double() - old, _OF_A_WEIGHT * float(new.norm())
            self._compare_tensor(number, "weight's change", name, new - old, change, _LIMIT, rounding)
        self._compare_copy_and_step(number, found, applied + expected.applied)
        return expected.applied

    def compare_exactly(self, number: int, when: str, expected: State, step: int) -> None:
        """The state as it lies there, AdamW's step, and the low-precision copy."""
        found = states.whole(self.engine)
        for (name, kind), tensor in expected.items():
            self._compare_tensor(number, f"{kind} {when}", name, tensor.double(), found[name, kind], 0.0)
        self._compare_copy_and_step(number, found, step)

    def _set_rate(self, number: int) -> float:
        """Of update 1 at the end of the warmup, of later ones amid the schedule: where one update late shows most."""
        config, updates = self.subject.config, self.subject.derived.updates
        warmup = config.warmup_iterations
        wanted = min(updates, max(1, warmup - 1) if number == 1 else (warmup + updates) // 2 + number)
        self.rates.clear()
        self.scheduler.step(wanted)
        return learning_rate(wanted, config.schedule, updates, warmup, config.max_lr, config.min_lr)

    def _limits(self, compiled: bool) -> tuple[float, float]:
        """Of loss and norm, and of a tensor: see the module's docstring."""
        precision = self.subject.config.precision
        # DeepSpeed rounds at the boundary of ZeRO-1 in bf16 on a single rank too.
        rounds = self.world.size > 1 or precision == "bf16"
        reduction = _REDUCED_IN.get(self.subject.base["communication_data_type"], 0.0) if rounds else 0.0
        numbers, tensors = _COMPILED[precision] if compiled else (0.0, 0.0)
        least = max(_LIMIT, reduction, _NOISES * self.noise)
        return max(least, numbers), max(least, tensors)

    def _compare(self, update: int, what: str, expected: float, found: float, limit: float) -> None:
        deviation = abs(found - expected) / (abs(expected) or 1.0)
        factor = _over(found, expected)
        self.findings.append(Finding(update, what, "all", "", expected, found, factor, deviation, limit))

    def _compare_tensor(
        self, update: int, what: str, name: str, expected: Tensor, found: Tensor, limit: float, floor: float = 0.0
    ) -> None:
        """expected: fp64, 1-D. floor: a norm of the difference that is allowed beside `limit`."""
        found = found.double()
        norm, difference = float(expected.norm()), float((found - expected).norm())
        factor, deviation = _over(float(found @ expected), norm**2), _over(difference, norm) if difference else 0.0
        limit += _over(floor, norm) if floor else 0.0
        part = next((part for key, part in _PARTS.items() if key in name), "head")
        self.findings.append(Finding(update, what, part, name, norm, float(found.norm()), factor, deviation, limit))

    def _compare_copy_and_step(self, number: int, masters: State, step: int) -> None:
        """What the model computes with, on each rank, against the masters; and how often AdamW has stepped."""
        import deepspeed

        parameters, dtype = dict(self.engine.module.named_parameters()), DTYPES[self.subject.config.precision]
        partitioned = self.engine.zero_optimization_partition_weights()
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=partitioned), torch.no_grad():
            for name, parameter in parameters.items():
                master = masters[name, "weight"].to(dtype).double()
                self._compare_tensor(number, "weight's copy", name, master, parameter.detach().reshape(-1), 0.0)
        found = torch.tensor([states.optimizer_step(self.engine)], device=self.world.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        self._compare(number, "AdamW's step", step, int(found), 0.0)


def _over(a: float, b: float) -> float:
    return a / b if b else (math.inf if a else 1.0)
