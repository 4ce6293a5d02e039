"""Which fp32 tensor of an engine's optimizer holds which range of which parameter.

The one place that knows how DeepSpeed (0.19) keeps its state; saving and loading by name are both built on it.

    optimizer                       when                                    its fp32 tensors
    AdamW (torch's)                 ZeRO-0                                  each parameter, the same on every rank
    FP16_UnfusedOptimizer           ZeRO-0 in bf16 (wrong: the self-test)   fp32_groups, the same on every rank
    BF16_Optimizer                  ZeRO-1 in bf16 without offload          fp32_groups_flat_partition
    DeepSpeedZeroOptimizer          ZeRO-1 and 2 otherwise                  single_partition_of_fp32_groups
    DeepSpeedZeroOptimizer_Stage3   ZeRO-3                                  fp32_partitioned_groups_flat
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsllama.checkpoint.fragments import MOMENTS

_FLAT = {
    "DeepSpeedZeroOptimizer": ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    "BF16_Optimizer": ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
}
_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"


@dataclass(frozen=True)
class Piece:
    """Elements start ... start + numel of a flattened parameter, which lie at offset ... of a holder."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Holder:
    """An fp32 tensor that torch's optimizer updates (flat: as 1-D), under which key its state holds the moments."""

    flat: Tensor
    key: Tensor
    pieces: list[Piece]
    group: int = 0


def replicated(engine: Any) -> bool:
    """Whether every rank holds all of the state."""
    return _kind(engine) not in _FLAT and _kind(engine) != _STAGE_3


def holders(engine: Any) -> Iterator[Holder]:
    """What this rank holds. Raises TypeError for an optimizer that is not known here."""
    optimizer = engine.optimizer
    # The engine's own table of names is stale once it has cast the model.
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    kind = _kind(engine)
    if kind == _STAGE_3:
        for group, parameters in enumerate(optimizer.fp16_groups):
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield Holder(flat, flat, list(_partitions(optimizer, parameters, names)), group)
    elif kind in _FLAT:
        groups, low_precision, flats = (getattr(optimizer, name) for name in _FLAT[kind])
        for group, (parameters, low, flat) in enumerate(zip(groups, low_precision, flats, strict=True)):
            rank = dist.get_rank(group=optimizer.real_dp_process_group[group])
            yield Holder(flat, flat, list(_cuts(parameters, low, rank * flat.numel(), flat.numel(), names)), group)
    elif kind == "FP16_UnfusedOptimizer" or isinstance(optimizer, torch.optim.Optimizer):
        masters = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
        used = masters if optimizer is engine.basic_optimizer else chain(*optimizer.fp16_groups)
        for parameter, master in zip(used, masters, strict=True):
            piece = Piece(names[parameter], tuple(parameter.shape), 0, parameter.numel(), 0)
            yield Holder(master.detach().view(-1), master, [piece])
    else:
        raise TypeError(f"{kind} keeps its state in a way that is not known here")


def _partitions(optimizer: Any, parameters: list[Any], names: dict[Any, str]) -> Iterator[Piece]:
    """ZeRO-3: each rank has one part of each parameter, the last ones padded."""
    offset = 0
    for parameter in parameters:
        size = parameter.partition_numel()
        start = optimizer._get_param_partition_rank(parameter) * size
        numel = max(0, min(size, parameter.ds_numel - start))
        if numel:
            yield Piece(names[parameter], tuple(parameter.ds_shape), start, numel, offset)
        offset += size


def _cuts(parameters: list[Tensor], flat: Tensor, low: int, size: int, names: dict[Any, str]) -> Iterator[Piece]:
    """ZeRO-1 and 2: all parameters of a group lie in one tensor, of which a rank has one range. Where, their addresses
    say: DeepSpeed's own table (`_hp_mapping`) is wrong under round_robin_gradients."""
    for parameter in parameters:
        at = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        first, last = max(at, low), min(at + parameter.numel(), low + size)
        if first < last:
            yield Piece(names[parameter], tuple(parameter.shape), first - at, last - first, first - low)


def on_nvme(engine: Any, holder: Holder) -> bool:
    """Whether a holder's tensors lie on NVMe between the updates."""
    return _kind(engine) == _STAGE_3 and engine.optimizer._swappable_optimizer_subgroup(holder.group)


@contextlib.contextmanager
def resident(engine: Any, holder: Holder, changed: bool = False) -> Iterator[Holder]:
    """The holder with its tensors in memory (ZeRO-3 may keep them on NVMe); `changed` writes them back at the end."""
    optimizer = engine.optimizer
    if not on_nvme(engine, holder):
        yield holder
        return
    optimizer._optimizer_states_and_gradient_swap_in(holder.group)
    flat = optimizer.fp32_partitioned_groups_flat[holder.group]
    yield Holder(flat, flat, holder.pieces, holder.group)
    if changed:
        optimizer._reassign_or_swap_out_partitioned_parameters(holder.group)
        optimizer._optimizer_states_and_gradient_swap_out(holder.group)
    else:
        optimizer._release_swap_buffers(holder.group)


def tensors(engine: Any, holder: Holder, create: bool = False) -> dict[str, Tensor]:
    """Kind -> 1-D fp32 tensors as long as the holder. Without `create`, moments that do not exist yet are left out:
    the first updates may all have been skipped."""
    optimizer = engine.basic_optimizer
    state = optimizer.state[holder.key]
    if create and "exp_avg" not in state:
        if isinstance(optimizer, torch.optim.Optimizer) and "fused" in optimizer.defaults:  # torch's own
            on_device = optimizer.defaults["fused"] or optimizer.defaults.get("capturable")
            device = holder.flat.device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        else:
            state["step"] = 0
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(holder.key, dtype=torch.float32, requires_grad=False)
    found = {"weight": holder.flat.detach()}
    return found | {kind: state[kind].detach().view(-1) for kind in MOMENTS if kind in state}


def adam_step(engine: Any, holder: Holder) -> int:
    """How many updates the optimizer itself has made: not the engine's count, which has those that were skipped."""
    return int(engine.basic_optimizer.state[holder.key].get("step", 0))


def set_adam_step(engine: Any, holder: Holder, step: int) -> None:
    """Set it, after `tensors(create=True)`."""
    state = engine.basic_optimizer.state[holder.key]
    if torch.is_tensor(state["step"]):
        state["step"].fill_(step)
    else:
        state["step"] = step


@contextlib.contextmanager
def loading(engine: Any) -> Iterator[None]:
    """Within it the holders are filled; at its end the model's own weights follow them. Collective."""
    optimizer, kind = engine.optimizer, _kind(engine)
    if kind == _STAGE_3:
        optimizer.checkpoint_event_prologue()  # drops what is gathered
    yield
    if kind == _STAGE_3:
        for holder in holders(engine):
            if not on_nvme(engine, holder):
                optimizer._reassign_or_swap_out_partitioned_parameters(holder.group)
        optimizer.checkpoint_event_epilogue()  # gathers the persistent ones
    elif kind in _FLAT:
        optimizer.update_lp_params()


def _kind(engine: Any) -> str:
    return type(engine.optimizer).__name__
