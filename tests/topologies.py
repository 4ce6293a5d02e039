"""Checkpoints by name from each topology into each other: what ranks do, and which pairs there are.

A source trains BEFORE updates, saves, and trains on; a target, built with another seed, loads that and trains on too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from dsllama.checkpoint.catalog import Checkpoint, open_checkpoint
from dsllama.checkpoint.fragments import DamagedFile
from dsllama.checkpoint.state import Copy, Pinned, pinned_loss
from dsllama.training import checkpoint as checkpoints
from dsllama.training import engine as deepspeed_engine
from dsllama.training.engine import World
from dsllama.training.saving import Saver
from tests import exactness
from tests.launches import Call, Launch

BEFORE, AFTER = 6, 6
SEQUENCES = 12  # an update's: on 1, 2 and 3 ranks, 2 at a time


@dataclass(frozen=True)
class Topology:
    """ZeRO stage, ranks, precision, and what is offloaded: "", "optimizer" or "all" (parameters too) to the CPU, or
    "nvme" (the optimizer). wide: so that DeepSpeed really swaps, which it does not below 1 MiB."""

    stage: int
    ranks: int
    precision: str = "fp32"
    offload: str = ""
    overlay: str = ""
    wide: bool = False

    def __str__(self) -> str:
        words = f"S{self.stage}", self.precision, f"r{self.ranks}", self.offload, self.overlay, "wide" * self.wide
        return "_".join(filter(None, words))

    def settings(self, root: Path) -> dict[str, Any]:
        """The fields of a configuration."""
        nvme, offloads = self.offload == "nvme", self.offload in ("optimizer", "all")
        found: dict[str, Any] = {
            "tokens_per_update": SEQUENCES * exactness.SETTINGS["max_seq_len"],
            "zero_stage": self.stage,
            "precision": self.precision,
            "offload_optimizer": "nvme" if nvme else "cpu" if offloads else "none",
            "offload_params": "cpu" if self.offload == "all" else "none",
        }
        if nvme:
            found["nvme_path"] = str(root / "nvme")
        if self.overlay:
            file = root / f"{self.overlay}.json"
            file.write_text(OVERLAYS[self.overlay], encoding="utf-8")
            found["deepspeed_overlay"] = str(file)
        return {**found, "n_embd": 256} if self.wide else found


OVERLAYS = {
    "roundrobin": '{"zero_optimization": {"round_robin_gradients": true}}',
    # Of a wide model's about three are swapped and one, which is below 1 MiB, is not.
    "widegroups": '{"zero_optimization": {"sub_group_size": 600000}}',
    "subgroups": '{"zero_optimization": {"sub_group_size": 20000, "stage3_param_persistence_threshold": 0}}',
}
_S0, _S0R2 = Topology(0, 1), Topology(0, 2)
_S1, _S1R2, _S1B, _S1BR2 = Topology(1, 1), Topology(1, 2), Topology(1, 1, "bf16"), Topology(1, 2, "bf16")
_S2, _S2R2 = Topology(2, 1), Topology(2, 2)
_S3, _S3R2, _S3BR2 = Topology(3, 1), Topology(3, 2), Topology(3, 2, "bf16")
_S2O, _S3A, _S1BO = (
    Topology(2, 2, offload="optimizer"),
    Topology(3, 2, offload="all"),
    Topology(1, 1, "bf16", "optimizer"),
)
_ROUND, _GROUPS = Topology(2, 2, overlay="roundrobin"), Topology(3, 2, overlay="subgroups")
PAIRS = [
    (_S0, _S1R2),
    (_S1R2, _S3),
    (_S2R2, _S2O),
    (_S3A, _S1),
    (_S1BR2, _S3BR2),
    (_S1B, _S1R2),
    (_S3BR2, _S1BO),
    (_ROUND, _GROUPS),
]
_PLACES = [
    Topology(stage, ranks, precision, offload)
    for stage, ranks, precision, offload in product((0, 1, 2, 3), (1, 2, 3), ("fp32", "bf16"), ("", "optimizer", "all"))
    if not (stage == 0 and (offload or precision == "bf16")) and not (stage < 3 and offload == "all")
]
# Of 2,025 an eighth, in which each place is a source and a target several times.
_N, _NR2 = Topology(3, 1, "bf16", "nvme"), Topology(3, 2, "bf16", "nvme")
NVME_PAIRS = [(_N, _N), (_NR2, _NR2), (_N, _NR2), (_S1BR2, _N), (_NR2, _S1B), (_S3BR2, _NR2), (_N, _S2O)]
NVME_PAIRS += [(replace(here, wide=True), replace(there, wide=True)) for here, there in NVME_PAIRS]
_WIDE, _WIDER2 = (replace(each, overlay="widegroups", wide=True) for each in (_N, _NR2))
NVME_PAIRS += [(_WIDE, _WIDER2), (_WIDER2, _WIDE), (_WIDER2, replace(_S1B, wide=True))]
LONG_PAIRS = [(_S1R2, _S1), (_S2R2, _S0R2), (_S3BR2, _S1B), (_S0, _S0R2), (_S1R2, _S1B), (_S3R2, _S2), (_GROUPS, _S0)]
LONG_PAIRS += [pair for pair in list(product(_PLACES, _PLACES))[::8] if pair not in [*PAIRS, *LONG_PAIRS]]
FILES = [_S0, _S1R2, _S1BR2]


class Moves:
    """The sources and the pairs, one launch per number of ranks for each, made when somebody first looks."""

    def __init__(self, root: Path, pairs: list[tuple[Topology, Topology]]) -> None:
        root.mkdir(exist_ok=True)
        self.sources = self._launches(root, "from", {str(a): (a, a) for a, _ in pairs})
        self.targets = self._launches(root, "into", {f"{a} {b}": (a, b) for a, b in pairs})

    def _launches(self, root: Path, what: str, work: dict[str, tuple[Topology, Topology]]) -> dict[str, Launch]:
        found: dict[str, Launch] = {}
        earlier = list({id(launch): launch for launch in self.sources.values()}.values()) if what == "into" else []
        for ranks in {there.ranks for _, there in work.values()}:
            calls = {
                name: Call(
                    f"tests.topologies:{'move' if what == 'into' else 'leave'}",
                    {"settings": there.settings(root), "folder": str(root / f"of_{here}")},
                )
                for name, (here, there) in work.items()
                if there.ranks == ranks
            }
            launch = Launch(root / f"{what}_{ranks}", ranks, calls, earlier)
            found |= dict.fromkeys(calls, launch)
        return found

    def source(self, here: Topology) -> dict[str, Any]:
        """What `leave` has told."""
        return self.sources[str(here)][str(here)].value

    def pair(self, here: Topology, there: Topology) -> dict[str, Any]:
        """What `move` has told."""
        name = f"{here} {there}"
        return self.targets[name][name].value


# ---------------------------------------------------------------- in a rank


def _world() -> World:
    return World(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def leave(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train, save, train on; the losses after the save, whose files are written after all of them."""
    engine = exactness.build(settings)
    for number in range(1, BEFORE + 1):
        exactness.update(engine, number)

    def go_on() -> list[float]:
        held = exactness.state(engine)
        if dist.get_rank() == 0:
            torch.save(held, Path(folder) / "state.pt")
        return _losses(engine)

    losses, _ = _save(engine, folder, go_on)
    return {"losses": losses}


def _save(engine: Any, folder: str, meanwhile: Callable[[], Any]) -> tuple[Any, Checkpoint]:
    """Save on a disk that takes nothing before `meanwhile` has ended; what that returned, and the checkpoint."""
    config, ranks = engine.module.config, dist.get_world_size()
    manifest = {
        "tokens": BEFORE * config.tokens_per_update,
        "data": {},
        "parallel_layout": {"ranks": ranks, "precision": config.precision},
        "vocab_size": exactness.VOCABULARY,
        "schedule": engine.lr_scheduler.state_dict(),
        "seed": config.seed,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    saver, write, ready = Saver(Path(folder), _world(), engine), Copy.write, threading.Event()

    def wait_and_write(copy: Copy, aside: Path) -> Any:
        ready.wait()
        return write(copy, aside)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Copy, "write", wait_and_write)
        saver.begin(BEFORE, manifest, {"config.yaml": yaml.safe_dump(config.to_dict())}, _pinned(engine))
        assert saver.foreground or saver.progress() == (0, 0)
        told = meanwhile()
        ready.set()
        return told, saver.settle().checkpoint


def move(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Load what another topology has saved and train on.

    different: what is not what the source's own engine held, to the bit, as DeepSpeed reads it. uncast: parameters of
    the model that are not their fp32 masters, cast down. losses: after that.
    """
    import deepspeed

    engine = exactness.build({**settings, "seed": 4321})
    saved = open_checkpoint(Path(folder) / f"update_{BEFORE:07d}")
    checkpoints.load(saved, _world(), engine, _pinned(engine), engine.module.config.precision)
    engine.lr_scheduler.load_state_dict(saved.manifest["schedule"])
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # as DeepSpeed's readers need before the next update
    held, expected = exactness.state(engine), torch.load(Path(folder) / "state.pt")
    different = [name for name in expected if not torch.equal(expected[name], held[name])]
    uncast = []
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            master = held[f"{name}|weight"].view(parameter.shape).to(parameter.dtype)
            if not torch.equal(master, parameter.detach()):
                uncast.append(name)
    pinned = [saved.manifest["pinned_loss"], pinned_loss(engine, _pinned(engine))]
    return {
        "different": different,
        "uncast": uncast,
        "pinned": pinned,
        "steps": engine.global_steps,
        "losses": _losses(engine),
    }


def _losses(engine: Any) -> list[float]:
    return [exactness.update(engine, number)[0] for number in range(BEFORE + 1, BEFORE + AFTER + 1)]


def refused(folder: str) -> dict[str, Any]:
    """Save; load with another pinned loss, with a bit flipped in the last file, and as it was saved.

    What each load complained of on this rank; "" for nothing.
    """
    engine = exactness.build({"zero_stage": 2, "precision": "bf16"})
    exactness.update(engine, 1)
    _, saved = _save(engine, folder, lambda: None)
    file = saved.path / f"weights_{dist.get_world_size() - 1:05d}.safetensors"
    told = {"untrue": _complaint(engine, Checkpoint(saved.path, {**saved.manifest, "pinned_loss": 7.0}))}
    content = file.read_bytes()
    middle = len(content) // 2
    for name, damaged in {
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "whole": content,
    }.items():
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(damaged)
        dist.barrier()
        told[name] = _complaint(engine, saved)
    return told


def _pinned(engine: Any) -> Pinned:
    tokens = exactness.rows(1, 0, engine.module.config)[None]
    return tokens[:, :-1], tokens[:, 1:]


def _complaint(engine: Any, saved: Checkpoint) -> str:
    try:
        checkpoints.load(saved, _world(), engine, _pinned(engine), "bf16")
    except (RuntimeError, DamagedFile) as error:
        return str(error)
    return ""


def unwritable_script(folder: str) -> str:
    """The engine's own files, where what DeepSpeed copies beside them cannot be written: what a rank complains of."""
    engine = exactness.build({"zero_stage": 2})
    exactness.update(engine, 1)
    (Path(folder) / "zero_to_fp32.py").mkdir(parents=True, exist_ok=True)
    try:
        deepspeed_engine.save(engine, Path(folder))
    except OSError as error:
        return str(error)
    return ""
