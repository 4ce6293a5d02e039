"""Whether an engine of these very settings trains as plain PyTorch does: a proof, before anything long begins.

    a reduced model of the run (2 layers, narrow), the run's own DeepSpeed JSON
      -> 3 updates, each beside the plain loop (training/plain.py) that begins with the engine's own state before it
      -> saved, loaded into a fresh engine, a 4th update (compiled, where the run is)
      -> what deviates by more than the limit, by part; then which setting is to blame

    dsllama selftest --config c.yaml                                one rank
    deepspeed --num_gpus 2 --module dsllama.selftest --config c.yaml     several

Each update begins with the engine's state, so no chaos builds up and the limit follows from roundings alone. Both sides
compute the same products in the same precision; what is left is fp32 arithmetic on the engine's side: a sum over
micro-steps and ranks, the clipping's factor, AdamW's handful of operations. Each of these n roundings is worth 2**-24,
so (norm of the difference / norm) stays near sqrt(n) 2**-24, 1e-7 to 1e-6; every fault that DeepSpeed is known for
moves some part by 1e-3 or more. The limit, 1e-5, lies in the middle of the two. Beside it:

    weights      follow from the engine's moments; what counts is their change, so the weight's own rounding comes on
                 top, 2**-19 of it
    reduction    in bf16 or fp16 (communication_data_type): each gradient is rounded once or twice, 2**-9 or 2**-12
    compilation  keeps in fp32 what the model rounds between its operations, and sums in another order: a gradient
                 differs like its last bits do. Only the 4th update is compiled; the other three hold the limit above
    a device     that computes the same gradient twice and gets two, gets ten times that difference

Exact, without any limit: the first weights, the low-precision copy of the weights, and the state after loading.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsllama import arguments, console
from dsllama.checkpoint import state as states
from dsllama.checkpoint.catalog import timestamp
from dsllama.checkpoint.fragments import MOMENTS, DamagedFile
from dsllama.checkpoint.retention import SELF_TEST
from dsllama.checkpoint.state import State
from dsllama.config import TrainingConfig
from dsllama.deepspeed_config import ZeroSettings, binding, deepspeed_config, engine_lines
from dsllama.derived import Derived, derive
from dsllama.errors import EXIT_USER_ERROR, Problem, UserError
from dsllama.files import write_atomically
from dsllama.machine import versions
from dsllama.model import LLaMaTransformer, parameter_count
from dsllama.overlay import merge
from dsllama.scheduler import learning_rate
from dsllama.training import checkpoint as checkpoints
from dsllama.training import engine as deepspeed_engine
from dsllama.training import run
from dsllama.training.engine import World
from dsllama.training.plain import DTYPES, PlainLoop
from dsllama.training.saving import Saver, all_or_none

Json = dict[str, Any]
_UPDATES = 3
# An fp16 run begins with a search for its loss scale, in updates that are skipped.
_MOST_SKIPPED = 40
_LIMIT = 1e-5
_OF_A_WEIGHT = 2.0**-19
_REDUCED_IN = {"bf16": 2.0**-6, "bfp16": 2.0**-6, "fp16": 2.0**-9}
# Of loss and norm, which are means of many roundings, and of a tensor.
_COMPILED = {"fp32": (1e-4, 1e-4), "bf16": (2.0**-9, 2.0**-4), "fp16": (2.0**-12, 2.0**-7)}
_NOISES = 10
# At the rate of a real run the change of a weight lies near the rounding of its fp32; clipping has to act.
_RATE, _CLIPPING = 0.01, 0.05
_WIDTH, _VOCABULARY, _POSITIONS, _SEQUENCES, _MICRO_STEPS = 512, 264, 32, 2, 4
# DeepSpeed swaps nothing smaller than 1 MiB to NVMe: parameters for each rank.
_SWAPPED = 400_000
# Time for the search for the setting that is to blame.
_SEARCH_SECONDS = 120.0
_PARTS = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "feed-forward", "norm": "norms"}
_MODEL = ("n_layers", "n_embd", "n_heads", "n_kv_heads", "multiple_of", "eps", "theta", "tie_embeddings", "vocab_size")
_HOW = ("max_seq_len", "use_flash_attention", "activation_checkpointing", "enable_compilation", "checkpoint_format")


# ---------------------------------------------------------------- what is tested


@dataclass(frozen=True)
class Subject:
    """A reduced run. config: of the reduced model; base: the run's DeepSpeed JSON, from which `json` makes its own."""

    config: TrainingConfig
    base: Json
    derived: Derived

    @property
    def json(self) -> Json:
        """For an engine of the reduced model."""
        config, base = self.config, copy.deepcopy(self.base)
        devices = {"offload_optimizer": config.offload_optimizer, "offload_param": config.offload_params}
        for name, device in devices.items():
            if device in (None, "none"):
                base["zero_optimization"].pop(name, None)
        stage = config.zero_stage or 0
        offload, params = (device or "none" for device in devices.values())
        zero = ZeroSettings(stage, stage, offload, params, config.nvme_path)
        return merge(base, binding(config, self.derived, zero))

    def but(self, **changes: Any) -> Subject:
        """Another one, with some of the configuration's fields changed."""
        return dataclasses.replace(self, config=self.config.model_copy(update=changes))

    def switches(self) -> Iterator[tuple[str, Subject]]:
        """Each setting that can be switched off, and the run without it."""
        c = self.config
        simpler: Json = {
            "enable_compilation": False,
            "activation_checkpointing": False,
            "use_flash_attention": False,
            "tie_embeddings": False,
            "n_kv_heads": None,
            "gradient_clipping": 0.0,
            "weight_decay": 0.0,
            "offload_params": "none",
            "offload_optimizer": "none",
            "precision": "fp32",
        }
        if self.derived.gradient_accumulation_steps > 1:
            yield "gradient accumulation", dataclasses.replace(self, derived=_with_micro_steps(self.derived, c, 1))
        for name, value in simpler.items():
            if getattr(c, name) != value:
                changes = {name: value}
                if name == "offload_optimizer":
                    changes["offload_params"] = "none"
                yield f"{name} {getattr(c, name)}", self.but(**changes)
        if c.deepspeed_overlay is not None:
            without = c.model_copy(update={"deepspeed_overlay": None})
            base = deepspeed_config(without, self.derived, deepspeed_engine.accelerator())
            yield f"deepspeed_overlay {c.deepspeed_overlay}", dataclasses.replace(self, base=base)
        if (c.zero_stage or 0) > 1:
            yield f"zero_stage {c.zero_stage}", self.but(zero_stage=1, offload_params="none", offload_optimizer="none")


def reduced(config: TrainingConfig, derived: Derived, ds_config: Json) -> Subject:
    """A run like this one with a model that takes no time: the same kinds of parts, the same engine.

    Narrower, with as many heads to a key-value head and the same head size as far as that goes; buckets, sub-groups
    and thresholds shrink as the model does, so that as many of them are filled.
    """
    zero = ds_config["zero_optimization"]
    offload = {name: zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param")}
    kv = config.n_kv_heads or config.n_heads
    group, kv_heads = min(config.n_heads // kv, 4), min(kv, 2)
    while group * kv_heads * derived.head_size > _WIDTH and (group > 2 or kv_heads > 1):
        group, kv_heads = (group, 1) if kv_heads > 1 else (2, 1)
    width = group * kv_heads * derived.head_size
    vocabulary = min(derived.vocab_size, _VOCABULARY)
    if "nvme" in offload.values():
        vocabulary = min(derived.vocab_size, max(vocabulary, _SWAPPED * derived.world_size // width))
    small = config.model_copy(
        update={
            "n_layers": min(config.n_layers, 2),
            "n_embd": width,
            "n_heads": group * kv_heads,
            "n_kv_heads": kv_heads if config.n_kv_heads is not None else None,
            "multiple_of": min(config.multiple_of, 64),
            "vocab_size": vocabulary,
            "max_seq_len": min(config.max_seq_len, _POSITIONS),
            "batch_size": min(config.batch_size, _SEQUENCES),
            "dropout": 0.0,
            "max_lr": _RATE,
            "min_lr": config.min_lr * _RATE / config.max_lr,
            "gradient_clipping": min(config.gradient_clipping, _CLIPPING),
            "zero_stage": zero["stage"],
            "offload_optimizer": offload["offload_optimizer"],
            "offload_params": offload["offload_param"],
            "nvme_path": zero[name]["nvme_path"]
            if (name := next((name for name, device in offload.items() if device == "nvme"), ""))
            else None,
        }
    )
    parameters, _ = parameter_count(small, vocabulary)
    base = merge(ds_config, {name: {"enabled": False} for name in _REPORTERS if name in ds_config})
    base["zero_optimization"] |= _shrunk(zero, parameters, parameters / derived.parameters, width / config.n_embd)
    derived = dataclasses.replace(derived, parameters=parameters)
    steps = min(derived.gradient_accumulation_steps, _MICRO_STEPS)
    return Subject(small, base, _with_micro_steps(derived, small, steps))


_REPORTERS = ("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "comms_logger")


def _with_micro_steps(derived: Derived, config: TrainingConfig, steps: int) -> Derived:
    sequences = config.batch_size * derived.world_size * steps
    return dataclasses.replace(derived, gradient_accumulation_steps=steps, sequences_per_update=sequences)


def _shrunk(zero: Json, parameters: int, ratio: float, width_ratio: float) -> Json:
    """ZeRO's sizes in elements, for a model with so many parameters, `ratio` of the run's."""
    sizes: Json = {name: zero[name] for name in ("reduce_bucket_size", "allgather_bucket_size") if name in zero}
    if zero["stage"] == 3:
        defaults = {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
        }
        sizes |= {name: zero.get(name, default) for name, default in defaults.items()}
    found: Json = {name: max(1, int(size * ratio)) for name, size in sizes.items()}
    swaps = [zero.get(name, {}) for name in ("offload_optimizer", "offload_param")]
    if any(part.get("device") == "nvme" for part in swaps):
        found["sub_group_size"] = max(found["sub_group_size"], _SWAPPED)
    if zero["stage"] == 3:
        persistent = zero.get("stage3_param_persistence_threshold", 100_000)
        found["stage3_param_persistence_threshold"] = int(persistent * width_ratio**2)
    if swaps[1].get("device") == "nvme":
        found["offload_param"] = {**swaps[1], "buffer_size": parameters}
    return found


def untestable(ds_config: Json) -> str:
    """Why these settings have no expected result; empty where they have one."""
    zero = ds_config["zero_optimization"]
    quantized = [name for name in ("zero_quantized_gradients", "zero_quantized_weights") if zero.get(name)]
    return f"{' and '.join(quantized)} round on purpose, by no rule that could be told apart" if quantized else ""


def limits(subject: Subject, noise: float, compiled: bool) -> tuple[float, float]:
    """Of loss and norm, and of a tensor: see the module's docstring."""
    precision, several = subject.config.precision, subject.derived.world_size > 1
    # DeepSpeed rounds at the boundary of ZeRO-1 in bf16 on a single rank too.
    reduction = subject.base["communication_data_type"] if several or precision == "bf16" else "fp32"
    least = max(_LIMIT, _REDUCED_IN.get(reduction, 0.0), _NOISES * noise)
    numbers, tensors = _COMPILED[precision] if compiled else (0.0, 0.0)
    return max(least, numbers), max(least, tensors)


# ---------------------------------------------------------------- comparing


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


def _part_of(parameter: str) -> str:
    return next((part for name, part in _PARTS.items() if name in parameter), "head")


def _of_numbers(update: int, what: str, expected: float, found: float, limit: float) -> Finding:
    deviation = abs(found - expected) / (abs(expected) or 1.0)
    return Finding(update, what, "all", "", expected, found, _over(found, expected), deviation, limit)


def _of_tensors(update: int, what: str, name: str, expected: Any, found: Any, limit: float, floor: float) -> Finding:
    """floor: an absolute deviation that is allowed beside `limit` (of the norm that is expected)."""
    norm, difference = float(expected.norm()), float((found.double() - expected).norm())
    factor = _over(float(found.double() @ expected), norm**2)
    deviation = _over(difference, norm) if difference or math.isnan(difference) else 0.0
    limit += _over(floor, norm) if floor else 0.0
    return Finding(update, what, _part_of(name), name, norm, float(found.double().norm()), factor, deviation, limit)


def _over(a: float, b: float) -> float:
    return a / b if b else (math.inf if a else 1.0)


def _worst_by_part(findings: Sequence[Finding]) -> list[Finding]:
    worst: dict[tuple[int, str, str], Finding] = {}
    for finding in findings:
        key = finding.update, finding.what, finding.part
        if key not in worst or finding.ratio > worst[key].ratio:
            worst[key] = finding
    return list(worst.values())


class _Engine:
    """An engine of the reduced model beside the plain loop."""

    def __init__(self, subject: Subject, world: World, plain: PlainLoop, seed: int) -> None:
        self.subject, self.world, self.plain = subject, world, plain
        self.findings: list[Finding] = []
        self.rates: list[float] = []
        self.noise = plain.noise()
        checkpoints.seed_everything(seed)
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
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def compare_exactly(self, number: int, what: str, expected: State, step: int) -> None:
        """The state as it lies there, AdamW's step, and the low-precision copy. Collective."""
        found = states.whole(self.engine)
        for (name, kind), tensor in expected.items():
            label = f"{kind} {what}"
            self.findings.append(_of_tensors(number, label, name, tensor.double(), found[name, kind], 0.0, 0.0))
        self._compare_copy(number, found)
        self._compare_step(number, step)

    def update(self, number: int, applied: int, compiled: bool = False) -> bool:
        """Make an update and compare; whether it was applied, and not skipped. Collective.

        applied: updates before this one that were.
        """
        config, derived, world = self.subject.config, self.subject.derived, self.world
        of_numbers, of_tensors = limits(self.subject, self.noise, compiled)
        before = states.whole(self.engine)
        of_schedule = min(max(1, config.warmup_iterations - 1), derived.updates) if number == 1 else 0
        of_schedule = of_schedule or min((config.warmup_iterations + derived.updates) // 2 + number, derived.updates)
        rate = learning_rate(
            of_schedule, config.schedule, derived.updates, config.warmup_iterations, config.max_lr, config.min_lr
        )
        scale = deepspeed_engine.skips(self.engine).loss_scale or 1.0
        skipped = self.engine.skipped_steps
        self.rates.clear()
        self.scheduler.step(of_schedule)
        batches = (self.plain.batch(number, step, world.rank) for step in range(self.plain.micro_steps))
        sums, norm = deepspeed_engine.update(self.engine, lambda: next(batches), self.plain.micro_steps)
        dist.all_reduce(sums)
        expected = self.plain.update(before, number, scale)
        found = states.whole(self.engine)
        loss = float(sums[0]) / self.plain.micro_steps / world.size
        self.findings.append(_of_numbers(number, "loss", expected.loss, loss, of_numbers))
        made = self.engine.skipped_steps == skipped
        self.findings.append(_of_numbers(number, "updates applied", expected.applied, made, 0.0))
        if expected.applied:
            given = max(self.rates, key=lambda found: abs(found - rate), default=math.nan)
            self.findings.append(_of_numbers(number, "gradient norm", expected.norm, norm or math.nan, of_numbers))
            self.findings.append(_of_numbers(number, "learning rate", rate, given, 1e-9))
        for (name, kind), tensor in expected.moments.items():
            self.findings.append(_of_tensors(number, kind, name, tensor, found[name, kind], of_tensors, 0.0))
        for name, old in ((name, tensor.double()) for (name, kind), tensor in before.items() if kind == "weight"):
            average, square, new = found[name, MOMENTS[0]], found[name, MOMENTS[1]], old
            if expected.applied:
                new = self.plain.weight(old, average, square, applied + 1, rate)
            change, floor = found[name, "weight"].double() - old, _OF_A_WEIGHT * float(new.norm())
            self.findings.append(_of_tensors(number, "weight's change", name, new - old, change, _LIMIT, floor))
        self._compare_copy(number, found)
        self._compare_step(number, applied + expected.applied)
        return expected.applied

    def _compare_copy(self, number: int, masters: State) -> None:
        """What the model computes with, on each rank, against the masters."""
        import deepspeed

        parameters, dtype = dict(self.engine.module.named_parameters()), DTYPES[self.subject.config.precision]
        partitioned = self.engine.zero_optimization_partition_weights()
        with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=partitioned), torch.no_grad():
            for name, parameter in parameters.items():
                master, low = masters[name, "weight"].to(dtype).double(), parameter.detach().reshape(-1)
                self.findings.append(_of_tensors(number, "weight's copy", name, master, low, 0.0, 0.0))

    def _compare_step(self, number: int, expected: int) -> None:
        found = torch.tensor([states.optimizer_step(self.engine)], device=self.world.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        self.findings.append(_of_numbers(number, "AdamW's step", expected, int(found), 0.0))


def examine(subject: Subject, world: World, folder: Path) -> list[Finding]:
    """Everything that was compared, the worst parameter of each part on any rank. Collective.

    folder: an empty one that all ranks see, for a checkpoint.
    """
    config, derived = subject.config, subject.derived
    plain = PlainLoop(config, world, derived.gradient_accumulation_steps)
    first = _Engine(subject, world, plain, config.seed)
    applied, findings = 0, first.findings
    try:
        first.compare_exactly(0, "at the start", plain.initial, 0)
        for number in range(1, _UPDATES + _MOST_SKIPPED + 1):
            applied += first.update(number, applied)
            if applied == _UPDATES:
                break
        saved = states.whole(first.engine)
        layout = {"ranks": world.size, "zero_stage": config.zero_stage, "precision": config.precision}
        pinned = plain.batch(0, 0, 0)
        pinned = pinned[0][:1], pinned[1][:1]
        manifest = {"tokens": 0, "seed": config.seed, "parallel_layout": layout}
        saver = Saver(folder, world, first.engine, config.checkpoint_format)
        saver.begin(number, manifest, {}, pinned)
        checkpoint = saver.settle().checkpoint
        del saver
    finally:
        first.close()
    second = _Engine(subject, world, plain, config.seed + 1)
    try:
        try:
            checkpoints.load(checkpoint, world, second.engine, pinned, config.precision)
        except (DamagedFile, RuntimeError) as error:  # on every rank
            findings.append(Finding(number, f"loading fails: {error}", "all", "", 0, 0, 0, math.inf, 0.0))
        second.compare_exactly(number, "after loading", saved, applied)
        if config.enable_compilation:
            second.engine.compile()
        second.update(number + 1, applied, config.enable_compilation)
        findings += second.findings
    finally:
        second.close()
        if config.enable_compilation:
            torch.compiler.reset()
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, _worst_by_part(findings))
    return _worst_by_part([finding for each in everywhere for finding in each])


# ---------------------------------------------------------------- the verdict


def verdict_on(subject: Subject, world: World, ckpt_dir: Path, search: bool = True) -> Json:
    """What the test came to, for a manifest. Collective.

    result: "passed" or "failed"; worst: the finding nearest its limit, or farthest beyond; failed: those beyond, of the
    first update that has any; blame: settings without which it passes; seconds.
    """
    began, seeds = time.perf_counter(), checkpoints.random_state(world)
    findings = _examine_aside(subject, world, ckpt_dir)
    failed = [finding for finding in findings if finding.ratio > 1]
    failed = [finding for finding in failed if finding.update == failed[0].update]
    blame, unsearched = [], []
    for name, simpler in subject.switches() if failed and search else ():
        if world.tell(time.perf_counter() - began > _SEARCH_SECONDS):
            unsearched.append(name)
        else:
            with contextlib.suppress(UserError):  # what DeepSpeed builds no engine from
                if all(finding.ratio <= 1 for finding in _examine_aside(simpler, world, ckpt_dir)):
                    blame.append(name)
    checkpoints.restore_random_state(seeds, world)
    worst = max(findings, key=lambda finding: finding.ratio)
    return {
        "result": "failed" if failed else "passed",
        "model": f"{subject.config.n_layers} layers of {subject.config.n_embd}",
        "key": key_of(subject, world),
        "worst": {**dataclasses.asdict(worst), "ratio": worst.ratio},
        "failed": [dataclasses.asdict(finding) for finding in failed],
        "blame": blame,
        "unsearched": unsearched,
        "seconds": world.tell(time.perf_counter() - began),
        "at": timestamp(),
    }


def _examine_aside(subject: Subject, world: World, ckpt_dir: Path) -> list[Finding]:
    """`examine` with folders of its own. Raises UserError on every rank where they, or a checkpoint, cannot be written."""
    token = world.tell(uuid.uuid4().hex[:8])  # two tests may have one place for NVMe offload
    swap = Path(subject.config.nvme_path) / f"selftest-{token}" if subject.config.nvme_path else None
    if swap is not None:
        subject = subject.but(nvme_path=str(swap))
    on_one_host = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1))) == world.size
    folder = Path(tempfile.gettempdir()) if on_one_host else ckpt_dir
    folder = Path(world.tell(str(folder / f"{SELF_TEST}-{token}")))
    try:
        with all_or_none(world):
            for each in (folder if world.is_main else None, swap):
                if each is not None:
                    each.mkdir(parents=True, exist_ok=True)
        return examine(subject, world, folder)
    except OSError as error:  # on every rank
        remedy = "make room and give permission there (TMPDIR names another place), or switch self_test off"
        raise UserError(Problem("self_test", f"could not write what it needs: {error}", remedy)) from None
    finally:
        for each in (folder if world.is_main else None, swap):
            if each is not None:
                shutil.rmtree(each, ignore_errors=True)


def key_of(subject: Subject, world: World) -> str:
    """What a verdict holds for: these settings, on this kind of device, with these versions and this code."""
    config, ds_config, source = subject.config, subject.json, hashlib.sha256()
    for part in ds_config["zero_optimization"].values():
        if isinstance(part, dict):
            part.pop("nvme_path", None)
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(file.read_bytes())
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    settings = {name: getattr(config, name) for name in (*_MODEL, *_HOW)}
    everything = [settings, ds_config, world.size, device, versions(), source.hexdigest()]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def of_run(
    config: TrainingConfig, derived: Derived, ds_config: Json, world: World, earlier: Json | None = None
) -> tuple[Json, str]:
    """A run's verdict, and what its head says of it; kept ones are not asked for twice. Collective.

    earlier: the verdict in the manifest of the checkpoint that the run goes on from.
    """
    if config.self_test == "off":
        return {"result": "off"}, "self-test    off (self_test): nobody has checked that these settings train rightly"
    if reason := untestable(ds_config):
        return {"result": "none"}, f"self-test    none: {reason}"
    subject = reduced(config, derived, ds_config)
    kept = None
    if world.is_main:
        key = key_of(subject, world)
        kept = earlier if earlier and earlier.get("key") == key else _kept(key)
    kept = world.tell(kept)
    if kept is not None:
        return kept, f"{summary(kept)}; kept from {kept['at']}"
    verdict = verdict_on(subject, world, Path(config.ckpt_dir))
    if world.is_main and verdict["result"] == "passed":
        _keep(verdict)
    return verdict, summary(verdict) + ("" if verdict["failed"] else f"; {verdict['seconds']:.1f} s")


def summary(verdict: Json) -> str:
    """One line where all is well, else a table."""
    worst = verdict["worst"]
    if verdict["result"] == "passed":
        where = f"{worst['what']}, {worst['part']}" if worst["part"] != "all" else worst["what"]
        return (
            f"self-test    passed: a reduced model ({verdict['model']}) trains under these settings as plain PyTorch does "
            f"(largest deviation {worst['deviation']:.1e} in {where}, {worst['ratio']:.2g} of its limit)"
        )
    rows = [["what", "part", "expected", "found", "factor", "deviation", "limit"]]
    for each in verdict["failed"]:
        numbers = [f"{each[name]:.6g}" for name in ("expected", "found", "factor")]
        rows.append([each["what"], each["part"], *numbers, *(f"{each[name]:.1e}" for name in ("deviation", "limit"))])
    lines = ["self-test    FAILED: with these settings DeepSpeed does not train as plain PyTorch does"]
    lines += [f"             {row}" for row in console.table(rows)]
    update = verdict["failed"][0]["update"]
    lines.append(
        f"             at update {update} of a reduced model, which began with the engine's own state before it"
    )
    if verdict["blame"]:
        lines.append(f"to blame     it passes without {', or without '.join(verdict['blame'])}")
    else:
        lines.append("to blame     none of the settings alone")
    if verdict["unsearched"]:
        lines.append(f"             (no time was left to try without {', '.join(verdict['unsearched'])})")
    return "\n".join(lines)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dsllama" / "selftest"


def _kept(key: str) -> Json | None:
    try:
        verdict = json.loads((_cache() / f"{key}.json").read_text(encoding="utf-8"))
        return verdict if verdict["key"] == key and verdict["result"] == "passed" else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the last one: of a user without a home
        return None


def _keep(verdict: Json) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # what cannot be kept is tested again
        _cache().mkdir(parents=True, exist_ok=True)
        write_atomically(_cache() / f"{verdict['key']}.json", json.dumps(verdict))


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str]) -> int:
    """Test a configuration on all ranks of a launch, whatever is kept; returns the exit code."""
    parser = arguments.Parser(prog="deepspeed --module dsllama.selftest", description=__doc__.split("\n")[0])
    arguments.add_config_options(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    console.settle()
    rank, ranks = deepspeed_engine.world_from_environment()
    try:
        return test(arguments.config_from(parser.parse_args(argv)), rank, ranks)
    except UserError as error:
        return run.complain(str(error), rank, EXIT_USER_ERROR)


def test(config: TrainingConfig, rank: int = 0, ranks: int = 1) -> int:
    """The same for a configuration. Raises UserError."""
    vocab_size, _ = run.vocabulary_so_far(config)
    derived = derive(config, ranks, vocab_size)
    ds_config = deepspeed_config(config, derived, deepspeed_engine.accelerator())
    if problems := deepspeed_engine.unsupported_here(config, ds_config):
        raise UserError(problems)
    world = deepspeed_engine.start(rank, ranks)
    if reason := untestable(ds_config):
        told, code = f"self-test    none: {reason}", 0
    else:
        verdict = verdict_on(reduced(config, derived, ds_config), world, Path(config.ckpt_dir))
        told, code = f"{summary(verdict)}; {verdict['seconds']:.1f} s", run.EXIT_FAILED if verdict["failed"] else 0
        if world.is_main and not code:
            _keep(verdict)
    if world.is_main:
        print("\n".join([*engine_lines(config, ds_config), told]), flush=True)
    return code


if __name__ == "__main__":
    run.exit_process(main(sys.argv[1:]))
