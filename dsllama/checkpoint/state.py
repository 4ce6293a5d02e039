"""An engine's state by name: written by any topology, taken up by any other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsllama.checkpoint import holders
from dsllama.checkpoint.fragments import KINDS, MOMENTS, DamagedFile, Fragment, Source, Writer, file_names
from dsllama.checkpoint.holders import Holder, Piece
from dsllama.generation import uncompiled

# What a dynamic loss scaler has come to, as against how it was set up.
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# (parameter, kind) -> all of its elements, 1-D.
State = dict[tuple[str, str], Tensor]
# Two of (1, T), int64: what the model is fed and what it is to predict.
Pinned = tuple[Tensor, Tensor]
# (parameter, kind, first element, 1-D tensor to fill)
ReadInto = Callable[[str, str, int, Tensor], None]
# Tokens of the pinned sequence that count. They pass through all layers; more would only make each save take longer.
_PINNED = 16
# How far its loss may come out otherwise, relatively: another device sums in another order (a GPU in TF32), half
# precision rounds weights and activations. On one CPU it is the same to the bit, and 4e-5 between fp32 and bf16.
_TOLERANCE = {"fp32": 5e-4, "bf16": 5e-3, "fp16": 5e-3}


def save(engine: Any, folder: Path, own: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write what this rank is to write; returns its files' entries for the manifest. Raises OSError.

    own: U8 tensors that belong to this rank alone. Where every rank holds everything, each writes its share of it.
    """
    return _write(folder, _pieces(engine), own, ((kind, data) for _, kind, data in _data(engine)))


def _write(
    folder: Path, pieces: list[Piece], own: dict[str, Tensor], parts: Iterable[tuple[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """parts: what the pieces hold, the weights in their order and the moments in theirs, each with its kind."""
    names = file_names(dist.get_rank())
    with (
        Writer(folder / names[0], _fragments(pieces, KINDS[:1])) as weights,
        Writer(folder / names[1], _fragments(pieces, MOMENTS), own) as moments,
    ):
        for kind, data in parts:
            (weights if kind == "weight" else moments).add(data)
        entries = weights.finish(), moments.finish()
    del entries[1]["fragments"]  # they are those of the weights
    return dict(zip(names, entries, strict=True))


def copy_bytes(engine: Any) -> int | None:
    """What `copy` needs on this rank; None where the state lies on NVMe, no quicker to read than a disk to write."""
    if any(holders.on_nvme(engine, holder) for holder in holders.holders(engine)):
        return None
    return 4 * len(KINDS) * sum(piece.numel for piece in _pieces(engine))


@dataclass(frozen=True)
class Copy:
    """What this rank is to write, apart from the engine. memory: all weights, then all moments, in the files' order."""

    pieces: list[Piece]
    memory: Tensor
    own: dict[str, Tensor]

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """As `save`; needs no engine and no other rank."""
        weights = 4 * sum(piece.numel for piece in self.pieces)
        parts = ("weight", self.memory[:weights]), ("moments", self.memory[weights : len(KINDS) * weights])
        return _write(folder, self.pieces, self.own, parts)


@torch.no_grad()
def copy(engine: Any, memory: Tensor, own: dict[str, Tensor]) -> Copy:
    """Copy this rank's share to memory (U8, `copy_bytes` long, pinned where the engine is on a GPU)."""
    at = 0
    for kinds in (KINDS[:1], MOMENTS):
        for _, _, data in _data(engine, kinds):
            memory[at : at + 4 * data.numel()].view(torch.float32).copy_(data, non_blocking=True)
            at += 4 * data.numel()
    if memory.is_pinned():
        torch.cuda.synchronize()
    return Copy(_pieces(engine), memory, own)


def _fragments(pieces: list[Piece], kinds: Sequence[str]) -> list[Fragment]:
    return [Fragment(piece.name, kind, piece.shape, piece.start, piece.numel) for piece in pieces for kind in kinds]


def _data(engine: Any, kinds: Sequence[str] = KINDS) -> Iterator[tuple[Piece, str, Tensor]]:
    """What this rank is to write, in order; what lies on NVMe comes into memory group by group."""
    for holder in holders.holders(engine):
        with holders.resident(engine, holder) as here:
            found = holders.tensors(engine, here)
            for piece in _share(engine, here):
                for kind in kinds:
                    # Where all updates so far were skipped there are no moments yet.
                    whole = found.get(kind)
                    yield piece, kind, torch.zeros(piece.numel) if whole is None else _part(whole, piece)


@torch.no_grad()
def whole(engine: Any) -> State:
    """All of an engine's state in fp32, on every rank: for a model that fits. Collective."""
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values() for _ in KINDS]
    memory = torch.zeros(sum(sizes), device=engine.device)
    state = dict(zip([(name, kind) for name in shapes for kind in KINDS], memory.split(sizes), strict=True))
    for piece, kind, data in _data(engine):
        state[piece.name, kind][piece.start : piece.start + piece.numel].copy_(data)
    dist.all_reduce(memory)  # each element is some rank's, and zero on the others
    return state


def optimizer_step(engine: Any) -> int:
    """How many updates the optimizer has made, as far as this rank knows."""
    return max((holders.adam_step(engine, holder) for holder in holders.holders(engine)), default=0)


def _pieces(engine: Any) -> list[Piece]:
    """All that this rank is to write."""
    return [piece for holder in holders.holders(engine) for piece in _share(engine, holder)]


def _share(engine: Any, holder: Holder) -> Iterator[Piece]:
    """The pieces that this rank is to write of a holder."""
    rank, ranks, shared_out = dist.get_rank(), dist.get_world_size(), holders.replicated(engine)
    for piece in holder.pieces:
        low, high = 0, piece.numel
        if shared_out:
            low, high = piece.numel * rank // ranks, piece.numel * (rank + 1) // ranks
        if low < high:
            yield Piece(piece.name, piece.shape, piece.start + low, high - low, piece.offset + low)


def _part(whole: Tensor, piece: Piece) -> Tensor:
    return whole[piece.offset : piece.offset + piece.numel]


def description(engine: Any, pinned: Pinned) -> dict[str, Any]:
    """What is the same on all ranks: shapes, counters, loss scale, and the loss of the pinned batch. Collective."""
    parameters = dict(engine.module.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    everything = engine.module.named_parameters(remove_duplicate=False)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {
        "parameters": {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()},
        "shared": {name: names[id(p)] for name, p in everything if names[id(p)] != name},
        "optimizer_step": optimizer_step(engine),
        "engine": {name: int(getattr(engine, name)) for name in _COUNTERS},
        "loss_scaler": {name: getattr(scaler, name) for name in SCALER_STATE if hasattr(scaler, name)},
        "pinned_loss": pinned_loss(engine, pinned),
    }


def load(engine: Any, source: Source, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """Take up a saved state, whatever topology it was saved with. Collective.

    Returns what the rank of this number kept for itself; nothing where it was saved by another number of ranks.
    Raises DamagedFile on every rank; another source may be loaded after that.
    """
    failure = _fill(engine, source.read_into, KINDS, manifest["optimizer_step"])
    own: dict[str, Tensor] = {}
    try:
        if manifest["parallel_layout"]["ranks"] == dist.get_world_size():
            own = dict(source.own(dist.get_rank()))
    except DamagedFile as error:
        failure = failure or str(error)
    raise_together(failure)
    for name, value in manifest["engine"].items():
        setattr(engine, name, value)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic:
        for name, value in manifest["loss_scaler"].items():
            setattr(scaler, name, value)
    return own


def load_weights(engine: Any, read_into: ReadInto) -> None:
    """Take up weights alone, in an engine that has not trained yet. Collective. Raises DamagedFile on every rank."""
    raise_together(_fill(engine, read_into, KINDS[:1], 0))


def raise_together(failure: str, kind: type[Exception] = DamagedFile) -> None:
    """Raise an exception on every rank if any rank has met with a failure, "" for none: one that raised alone would
    leave the others waiting. Collective."""
    failures: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        raise kind("; ".join(dict.fromkeys(filter(None, failures))))


@torch.no_grad()
def _fill(engine: Any, read_into: ReadInto, kinds: Sequence[str], step: int) -> str:
    """Fill the holders' tensors of these kinds and set Adam's step; what was damaged for this rank. Collective."""
    failure = ""
    with holders.loading(engine):  # to its end on every rank: one that left it would leave the others waiting
        for holder in holders.holders(engine):
            with holders.resident(engine, holder, changed=True) as here:
                found = holders.tensors(engine, here, create=True)
                try:
                    for piece in here.pieces if not failure else []:
                        for kind in kinds:
                            read_into(piece.name, kind, piece.start, _part(found[kind], piece))
                except DamagedFile as error:
                    failure = str(error)
                holders.set_adam_step(engine, here, step)
    return failure


# ---------------------------------------------------------------- the proof


@torch.no_grad()
def pinned_loss(engine: Any, pinned: Pinned) -> float:
    """The first rank's loss of a sequence that is the same at every save and load of a run. Collective."""
    tokens, targets = (tensor[:, :_PINNED].to(engine.device) for tensor in pinned)
    engine.eval()
    with uncompiled(engine.is_compiled):
        loss = engine(tokens, targets).detach().double().reshape(1)
    engine.train()
    dist.broadcast(loss, 0)
    return float(loss)


def proof(engine: Any, manifest: dict[str, Any], pinned: Pinned, precision: str) -> str:
    """What is wrong with the state that was loaded: its pinned loss is another; empty where nothing is. Collective."""
    saved, now = manifest["pinned_loss"], pinned_loss(engine, pinned)
    tolerance = max(_TOLERANCE[precision], _TOLERANCE[manifest["parallel_layout"]["precision"]])
    if abs(now - saved) <= tolerance * abs(saved):
        return ""
    return (
        f"the loss of the pinned sequence is {now:.6f} after loading, and was {saved:.6f} when it was saved "
        f"(tolerance {tolerance:g} of it)"
    )
