"""The one module that knows DeepSpeed's quirks: start-up, the engine, its gradient norm, its checkpoints.

Each work-round says which behaviour of DeepSpeed (0.19) makes it necessary.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import math
import os
import shutil
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsllama.checkpoint.state import SCALER_STATE, raise_together
from dsllama.cluster import join
from dsllama.cluster.liveness import Progress
from dsllama.config import TrainingConfig
from dsllama.errors import Problem, UserError
from dsllama.machine import missing_compiler, unusable_gpu
from dsllama.model import IGNORE_INDEX
from dsllama.optimizer import parameter_groups, settings_of
from dsllama.scheduler import DEEPSPEED_NAME, Scheduler
from dsllama.training import disk

Json = dict[str, Any]
TAG = "engine"
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HAS_PROC = os.path.exists("/proc/self/ns/pid")
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Whether it is a CPU because torch has found no GPU, and not because somebody said so.
_fell_back = False


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def tell(self, value: Any) -> Any:
        """The first rank's value, on every rank. Collective."""
        told = [value]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def siblings(self) -> dict[int, int]:
        """Process numbers of the other ranks of this host, or of this container, by rank. Collective."""
        here = socket.gethostname(), os.getppid(), os.stat("/proc/self/ns/pid").st_ino if _HAS_PROC else 0
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, (*here, self.rank, os.getpid()))
        return {rank: process for *place, rank, process in everyone if tuple(place) == here and rank != self.rank}

    def say(self, text: str) -> None:
        """Print it once, on the first rank."""
        if self.is_main:
            print(text, flush=True)

    def ask_main(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """What a call comes to on the first rank, on every rank: its value, or the UserError raised. Collective."""
        try:
            found = question(*arguments) if self.is_main else None
        except UserError as error:
            found = error
        found = self.tell(found)
        if isinstance(found, UserError):
            raise found
        return found


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as a launcher set them; (0, 1) without one. Needs no DeepSpeed."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """Processes on this host, as DeepSpeed's launcher or torchrun says; 1 without either."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1)))


def start(rank: int, world_size: int, offer: str = "", met: Callable[[str], None] = lambda _: None) -> World:
    """Join the process group and settle this process's device and threads. offer: what the first rank has to tell; met:
    told that on each, when all have come. Raises UserError where the port is taken, or a rank does not come."""
    _quieten()
    import deepspeed

    number = local_rank()
    if "RANK" not in os.environ:  # plain `python launch/train.py`: a world of one, on a free port
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    on_gpu = accelerator() == "cuda"
    _share_cores(number, bind=not on_gpu)
    if on_gpu:
        torch.cuda.set_device(number)
        # TF32 where a matrix product is still fp32: the optimizer's precision is not touched by it.
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        _keep_freed_memory()
        # Shared-memory all-reduce would be compiled at every first start (40 s) and is no faster than gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _set_default_timeout()
    disk.install()
    backend = "nccl" if on_gpu else "gloo"
    device = torch.device("cuda", number) if on_gpu else torch.device("cpu")
    try:
        if not dist.is_initialized():
            store, offer = join.meet(rank, world_size, offer)
            met(offer)
            # As DeepSpeed would, which takes it as it is.
            bound = device if on_gpu and world_size > 1 else None
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=_COLLECTIVE_TIMEOUT, device_id=bound
            )
            deepspeed.init_distributed(dist_backend=backend, timeout=_COLLECTIVE_TIMEOUT, verbose=False)
        else:  # one more run in this process
            offers = [offer]
            dist.broadcast_object_list(offers, 0)
            met(offers[0])
    except dist.DistNetworkError as error:
        port = os.environ.get("MASTER_PORT")
        if "EADDRINUSE" in str(error):
            remedy = f"give the launcher another one, such as --master_port {free_port()}"
            raise UserError(Problem("the port", f"{port} is taken, by another run perhaps", remedy)) from None
        rule = f"{os.environ.get('MASTER_ADDR')}:{port} cannot be reached from {socket.gethostname()}"
        raise UserError(Problem("the first rank", rule, "`dsllama doctor` looks for what is in the way")) from None
    except join.NobodyCame as error:
        raise UserError(Problem("the ranks", str(error), "see what it said, or `dsllama doctor`")) from None
    return World(rank, number, world_size, device)


def accelerator() -> str:
    """ "cuda" or "cpu": what DeepSpeed trains on here, and is told to."""
    # Left alone, DeepSpeed warns on a machine without a GPU that it could not find one.
    global _fell_back
    if "DS_ACCELERATOR" not in os.environ:
        _fell_back = not torch.cuda.is_available()
        os.environ["DS_ACCELERATOR"] = "cpu" if _fell_back else "cuda"
    return os.environ["DS_ACCELERATOR"]


def unsupported_here(config: TrainingConfig, ds_config: Json) -> list[Problem]:
    """What this machine lacks for a run, found before DeepSpeed finds it deep inside."""
    zero = ds_config["zero_optimization"]
    devices = {zero.get(part, {}).get("device", "none") for part in ("offload_optimizer", "offload_param")}
    on_cpu = accelerator() == "cpu"
    problems = []
    if config.precision == "fp16" and on_cpu:
        problems.append(Problem("precision", "fp16 needs a GPU", "use bf16 or fp32", "fp16"))
    if config.precision == "bf16" and not on_cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(Problem("precision", "this GPU has no bf16", "use fp16", "bf16"))
    if not on_cpu and local_rank() >= torch.cuda.device_count():
        rule = f"is more than the {torch.cuda.device_count()} GPUs of this host"
        problems.append(Problem("ranks", rule, "use --num_gpus with the number of GPUs"))
    if _fell_back and (unusable := unusable_gpu()):
        problems.append(unusable)
    if config.enable_compilation and not on_cpu and (missing := missing_compiler()):
        rule = f"needs {missing} at the start"
        problems.append(Problem("enable_compilation", rule, "install it, or switch compilation off"))
    if config.enable_compilation and on_cpu and shutil.which("c++") is None:
        rule = "compiles code at the start, and g++ cannot be found"
        problems.append(Problem("enable_compilation", rule, "install g++, or switch compilation off"))
    for monitor, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        # Without this, rank 0 would fail to import it and the others would wait for rank 0.
        if ds_config[monitor]["enabled"] and importlib.util.find_spec(package) is None:
            problems.append(Problem(f"{monitor}.enabled", f"needs the package {package}", f"pip install {package}"))
    if "nvme" in devices and config.checkpoint_format == "deepspeed":
        rule = "deepspeed would not bring back the state of a run that offloads to nvme: DeepSpeed's load leaves it out"
        problems.append(Problem("checkpoint_format", rule, "use checkpoint_format portable"))
    return problems


def build(model_factory: Callable[[], torch.nn.Module], ds_config: Json) -> tuple[Any, Scheduler]:
    """The DeepSpeed engine round a model (of which no rank ever holds all, under ZeRO-3), and its scheduler.

    Raises UserError where DeepSpeed refuses settings that only the engine looks at.
    """
    import deepspeed
    from deepspeed.runtime import bf16_optimizer, lr_schedules

    # The wrapper of ZeRO-1 in bf16 prints its memory in twelve lines, past every log level.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None

    def scheduler(optimizer: Any, **parameters: Any) -> Scheduler:
        # With a scheduler named in the JSON, ZeRO hands over its wrapper; the rates live in torch's optimizer.
        return Scheduler(lr_schedules.get_torch_optimizer(optimizer), **parameters)

    setattr(lr_schedules, DEEPSPEED_NAME, scheduler)
    _import_muon_uncompiled()
    partitioned = ds_config["zero_optimization"]["stage"] == 3
    try:
        with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=partitioned):
            model = model_factory()
        engine, *_ = deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=ds_config)
    except (AssertionError, ValueError, NotImplementedError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = " ".join(str(error).split()) or place.line
        rule = f"DeepSpeed builds no engine from it: {why} ({Path(place.filename).name}:{place.lineno})"
        remedy = "see `dsllama config` for all of it; an overlay's keys are the likeliest"
        raise UserError(Problem("the DeepSpeed configuration", rule, remedy)) from None
    scaler = _loss_scaler(engine)
    if scaler is not None and scaler.dynamic:
        scaler.raise_error_at_min_scale = False  # the trainer stops the run, with words
    return engine, engine.lr_scheduler


@dataclass(frozen=True)
class Skips:
    """How many updates an engine has left out because their gradients were not finite; and in fp16 its loss scale,
    whether it searches for that by skipping (a dynamic one), and whether it is at the smallest there is."""

    count: int
    loss_scale: float | None = None
    searches: bool = False
    at_its_end: bool = False

    @property
    def is_searching(self) -> bool:
        """Whether an update that is skipped now is part of the search, and no trouble."""
        return self.searches and not self.at_its_end


def skips(engine: Any) -> Skips:
    """What the engine has skipped so far, over all runs."""
    scaler = _loss_scaler(engine)
    if not engine.fp16_enabled():
        return Skips(engine.skipped_steps)
    at_its_end = scaler.dynamic and scaler.cur_scale <= scaler.min_scale
    return Skips(engine.skipped_steps, scaler.cur_scale, scaler.dynamic, at_its_end)


def weights_are_finite(engine: Any) -> bool:
    """Whether the model's weights are all finite, on all ranks. Collective."""
    parameters = list(engine.module.parameters())
    if not engine.zero_optimization_partition_weights():  # all ranks have all of them
        parameters = parameters[dist.get_rank() :: dist.get_world_size()]
    # Under ZeRO-3 each rank looks at its own part (empty where it lies on NVMe). A sum is finite where all its
    # terms are (short of 1e38), at a twentieth of what it takes to look at each.
    bad = torch.zeros((), device=engine.device)
    for parameter in parameters:
        part = getattr(parameter, "ds_tensor", parameter).detach()
        bad += ~part.sum(dtype=torch.float32).isfinite().to(engine.device)
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    return not bool(bad)


def _loss_scaler(engine: Any) -> Any:
    """ZeRO's, which does not scale (`dynamic` is False) in bf16 and fp32; None where there is no wrapper."""
    return getattr(engine.optimizer, "loss_scaler", None)


def update(
    engine: Any,
    get_batch: Callable[[], tuple[Tensor, Tensor]],
    micro_steps: int,
    after_the_first: Callable[[], None] = lambda: None,
    leave_out: Callable[[Tensor], bool] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, float | None]:
    """One optimizer update: (this rank's sum of losses and number of targets that counted, both fp64; the gradients'
    norm before clipping). after_the_first: called when a micro-step has been made. leave_out: asked before the last
    backward pass, with those sums, whether the weights shall stay as they are; the same on all ranks. progress: told
    where it is."""
    where = progress or Progress()
    where.forward += _seconds_of_last_update(engine)
    sums, norm = torch.zeros(2, dtype=torch.float64, device=engine.device), None
    # DeepSpeed reports no norm for fp32 at stage 0; there it is taken from the gradients themselves.
    is_plain = isinstance(engine.optimizer, torch.optim.Optimizer)
    for micro_step in range(1, micro_steps + 1):
        where.at("data", micro_step)
        began = time.perf_counter()
        x, y = get_batch()
        where.data += time.perf_counter() - began
        where.at("forward")
        loss = _timed_forward(engine, x, y, where)
        sums[0] += loss.detach()
        sums[1] += (y != IGNORE_INDEX).sum()
        is_last = micro_step == micro_steps
        if is_last and leave_out is not None and leave_out(sums):
            loss = loss * math.nan  # gradients that are not finite are what the engine leaves out
        elif is_last:  # a loss that is not finite may have gradients that are; no rank waits for the answer
            loss = loss * torch.where(sums[0].isfinite(), 1.0, math.nan).to(loss.dtype)
        where.at("backward")
        engine.backward(loss)
        where.at("step")
        if is_plain and is_last:
            norm = plain_gradient_norm(engine)
        with _leaving_the_weights(engine) if not math.isfinite(norm or 0.0) else contextlib.nullcontext():
            step(engine)
        if micro_step == 1:
            after_the_first()
    return sums, norm if is_plain else gradient_norm(engine)


def _timed_forward(engine: Any, x: Tensor, y: Tensor, where: Progress) -> Tensor:
    """On a GPU by events, which cost no waiting, and are read when the next update begins."""
    if engine.device.type != "cuda":
        began = time.perf_counter()
        loss = engine(x, y)
        where.forward += time.perf_counter() - began
        return loss
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    loss = engine(x, y)
    ended.record()
    engine.__dict__.setdefault("dsllama_forwards", []).append((began, ended))
    return loss


def _seconds_of_last_update(engine: Any) -> float:
    """What its forward passes took on the GPU: since then the loss has been waited for."""
    events = engine.__dict__.pop("dsllama_forwards", ())
    return sum(began.elapsed_time(ended) for began, ended in events if ended.query()) / 1e3


@contextlib.contextmanager
def _leaving_the_weights(engine: Any) -> Iterator[None]:
    """Skip an update as ZeRO's optimizers do it by themselves: torch's would apply gradients that are not finite."""
    engine.module.zero_grad(set_to_none=False)  # the engine still clips them
    step, engine.optimizer.step = engine.optimizer.step, lambda *_, **__: None
    try:
        yield
    finally:
        engine.optimizer.step = step
    engine.skipped_steps += 1


_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def bookmark(engine: Any) -> dict[str, Any]:
    """What an update that is left out changes in an engine: its counters, and in fp16 the loss scale."""
    scaler = _loss_scaler(engine)
    return {
        **{name: getattr(engine, name) for name in _COUNTERS},
        "scaler": {name: getattr(scaler, name) for name in SCALER_STATE if hasattr(scaler, name)},
    }


def go_back(engine: Any, found: dict[str, Any]) -> None:
    """As if an update that was left out had not been tried: the engine as `bookmark` found it, or some of that."""
    for name in found.keys() - {"scaler"}:
        setattr(engine, name, found[name])
    for name, value in found["scaler"].items():
        setattr(_loss_scaler(engine), name, value)


def step(engine: Any) -> None:
    """End a micro-step: `engine.step()`, and what it leaves behind."""
    engine.step()
    if engine.zero_optimization_partition_weights():
        # Activation checkpointing stops its recomputation early, so ZeRO-3's hooks push modules that they never pop:
        # entries of a list (and their search) that grow with every micro-step.
        from deepspeed.runtime.zero import parameter_offload

        parameter_offload.FWD_MODULE_STACK[:] = [engine.module]


def gradient_norm(engine: Any) -> float | None:
    """The global gradient norm of the update that `engine.step()` has just made, before clipping."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def plain_gradient_norm(engine: Any) -> float:
    """The norm of the averaged gradients that lie in `.grad`, just before the step (fp32 at stage 0)."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def save(engine: Any, folder: Path) -> None:
    """Write the engine's whole state; returns when all ranks have. Collective. Raises OSError on ranks that cannot."""
    failures: list[Exception] = []

    def surviving(method: Callable[..., Any]) -> Callable[..., None]:
        # A rank that raised inside save_checkpoint would leave the others waiting in DeepSpeed's own barriers.
        def call(*arguments: Any, **options: Any) -> None:
            try:
                method(*arguments, **options)
            except Exception as error:
                failures.append(error)

        return call

    writer = engine.checkpoint_engine
    writer.save, writer.makedirs = surviving(writer.save), surviving(writer.makedirs)
    engine._copy_recovery_script = surviving(engine._copy_recovery_script)
    try:
        # `save_latest` writes its pointer before the other ranks have finished, so it is never used here.
        engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    finally:
        del writer.save, writer.makedirs, engine._copy_recovery_script
    dist.barrier()
    if failures:
        raise OSError(str(failures[0]))


def load(engine: Any, folder: Path) -> None:
    """Restore what `save` wrote, but no settings. Collective. Raises RuntimeError on every rank if any failed."""
    failure = ""
    try:
        # Our files: DeepSpeed's own state holds Python objects, which only a full unpickling can read.
        with _keeping_settings(engine):
            loaded, _ = engine.load_checkpoint(str(folder), tag=TAG)
        if loaded is None:
            failure = "DeepSpeed found nothing to load"
    except Exception as error:  # anything may come from a damaged file; one rank's failure must be everyone's
        failure = f"{type(error).__name__}: {error}"
    raise_together(failure and f"rank {dist.get_rank()} could not load {folder}: {failure[:300]}", RuntimeError)


@contextlib.contextmanager
def _keeping_settings(engine: Any) -> Iterator[None]:
    """What a load of DeepSpeed's brings back beside the state, though this run's configuration says otherwise: the
    clipping, the optimizer's hyperparameters, the bounds of the loss scale."""
    clipping, scaler = getattr(engine.optimizer, "clip_grad", None), _loss_scaler(engine)
    groups = [settings_of(group) for group in engine.basic_optimizer.param_groups]
    yield
    if clipping is not None:
        engine.optimizer.clip_grad = clipping
    for group, settings in zip(engine.basic_optimizer.param_groups, groups, strict=True):
        group.update(settings)
    loaded = _loss_scaler(engine)
    if loaded is not scaler:
        if scaler.dynamic and loaded.dynamic:
            for name in SCALER_STATE:
                setattr(scaler, name, getattr(loaded, name))
        engine.optimizer.loss_scaler = scaler
        engine.optimizer.dynamic_loss_scale = scaler.dynamic


def _quieten() -> None:
    """Keep DeepSpeed's and torch's chatter out of the console; warnings and errors stay."""
    accelerator()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    level = logging.getLevelName(os.environ.get("DSLLAMA_DEEPSPEED_LOG", "ERROR").upper())
    from deepspeed.utils import logger

    logger.setLevel(level)


def _import_muon_uncompiled() -> None:
    """Spare each start two seconds: `torch.compile`, which decorates DeepSpeed's Muon, would load all of inductor."""
    from deepspeed.runtime import compiler

    decorate = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with contextlib.suppress(ImportError):  # where another DeepSpeed keeps it elsewhere, nothing is spared
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = decorate


def _share_cores(number: int, bind: bool) -> None:
    """Give each rank of this host its own cores, or as many threads as its share; without it every rank computes on all
    of them at once: on a GPU, offloaded AdamW does."""
    if (ranks := local_size()) > 1:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        share = len(cores) // ranks
        if bind and share:
            os.sched_setaffinity(0, cores[number * share : (number + 1) * share])
        torch.set_num_threads(max(share, 1))


def _keep_freed_memory() -> None:
    """Let glibc reuse the large buffers of each step instead of returning them: 13 % of a CPU step is page faults."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
            libc.mallopt(option, value)


def _set_default_timeout() -> None:
    """ZeRO's own groups are created without a timeout and take torch's default, so that is what is set."""
    from torch.distributed import constants, distributed_c10d

    for module in (constants, distributed_c10d):
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
            if hasattr(module, name):
                setattr(module, name, _COLLECTIVE_TIMEOUT)


def free_port() -> str:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
