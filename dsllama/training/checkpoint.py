"""Checkpoints: a folder exists wholly or not at all, and its manifest says what it holds.

    ckpt_dir/update_0000300/            published by one rename of ckpt_dir/.writing-update_0000300
        manifest.json                   update, tokens, loss, data position, counters, sizes and digests of files
        config.yaml deepspeed.json tokenizer.json
        state_00000.safetensors ...     what each rank holds of weights and moments, by name, and its random state

With `checkpoint_format: deepspeed` what the engine itself writes, in engine/, is in the place of the last.

The newest folder whose manifest fits its files is the one to resume from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsllama.checkpoint import state
from dsllama.checkpoint.fragments import DamagedFile, Source, file_name, problem_of
from dsllama.config import TrainingConfig, load_config
from dsllama.errors import Problem, UserError
from dsllama.files import sha256, write_atomically
from dsllama.training import engine as deepspeed_engine
from dsllama.training.engine import World

logger = logging.getLogger("dsllama")

MANIFEST = "manifest.json"
FORMAT = "dsllama-checkpoint-3"
# Whose files are DeepSpeed's; the first one's manifests have other words, and no digest.
_FIRST_FORMAT, _SECOND_FORMAT = "dsllama-checkpoint-1", "dsllama-checkpoint-2"
_NAME = re.compile(r"update_(\d{7,})")
# What must be the same for the weights to fit, and for "update u" to mean the same samples.
_SHAPE = ("n_embd", "n_heads", "n_kv_heads", "n_layers", "multiple_of", "eps", "theta", "tie_embeddings")
_PACE = ("max_seq_len", "tokens_per_update")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def update(self) -> int:
        return self.manifest["update"]

    @property
    def tokens(self) -> int:
        return self.manifest["tokens"]

    @property
    def portable(self) -> bool:
        """Whether its state is kept by name, to be read by any topology."""
        return self.manifest["state"] == "portable"

    def config(self) -> TrainingConfig:
        """The configuration that the checkpoint was trained with."""
        return load_config(self.path / "config.yaml")


# ---------------------------------------------------------------- choosing


def list_checkpoints(ckpt_dir: str | Path) -> list[Path]:
    """The published checkpoints in a folder, oldest first; whether they are whole is not looked at."""
    folder = Path(ckpt_dir)
    found = [p for p in folder.glob("update_*") if p.is_dir() and _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=update_of)


def update_of(path: Path) -> int:
    """The update that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("update_"))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder; given a folder of checkpoints, its newest whole one.

    Every file is read and its sha256 compared. Raises UserError with what is damaged.
    """
    path = Path(path)
    if not (path / MANIFEST).exists() and list_checkpoints(path):
        newest = newest_whole(path, logger.warning)
        if newest is not None:
            return newest
    manifest, reason = _read(path)
    if reason:
        others = [str(p) for p in list_checkpoints(path.parent) if p != path and not _read(p, checksums=False)[1]]
        remedy = f"whole ones beside it: {', '.join(others[-3:])}" if others else "give the path of a checkpoint"
        raise UserError(
            Problem(str(path), f"is not a whole checkpoint: {reason}", remedy), "cannot load the checkpoint"
        )
    return Checkpoint(path, manifest)


def newest_whole(ckpt_dir: str | Path, warn: Any = None) -> Checkpoint | None:
    """The newest whole checkpoint, or None; `warn` is called with a sentence for each damaged one passed over."""
    for path in reversed(list_checkpoints(ckpt_dir)):
        manifest, reason = _read(path)
        if not reason:
            return Checkpoint(path, manifest)
        if warn is not None:
            warn(f"passing over the damaged checkpoint {path}: {reason}")
    return None


def choose(config: TrainingConfig, warn: Any = None) -> Checkpoint | None:
    """What `load_ckpt` asks for: a checkpoint, or None to start anew.

    Raises UserError where a resume was asked for and is impossible, or where starting anew would write over
    an earlier run.
    """
    existing = list_checkpoints(config.ckpt_dir)
    if config.load_ckpt is False:
        if existing:
            raise UserError(
                Problem(
                    "ckpt_dir",
                    f"holds {len(existing)} checkpoints of an earlier run, the newest {existing[-1].name}",
                    "use --load_ckpt true to go on with it, or another --ckpt_dir",
                    config.ckpt_dir,
                )
            )
        return None
    if isinstance(config.load_ckpt, str) and config.load_ckpt != "auto":
        named = open_checkpoint(config.load_ckpt)
        _refuse_to_overwrite(named, existing, config)
        return named
    chosen = newest_whole(config.ckpt_dir, warn)
    if chosen is None and (existing or config.load_ckpt is True):
        rule = (
            f"none of the {len(existing)} checkpoints in it is whole" if existing else "holds no checkpoint to resume"
        )
        raise UserError(
            Problem("ckpt_dir", rule, "use --load_ckpt false and an empty --ckpt_dir to start anew", config.ckpt_dir)
        )
    return chosen


def _refuse_to_overwrite(chosen: Checkpoint, existing: list[Path], config: TrainingConfig) -> None:
    """A resume from an older checkpoint, or from another run's, would replace what lies ahead of it in ckpt_dir."""
    elsewhere = chosen.path.parent.resolve() != Path(config.ckpt_dir).resolve()
    ahead = [p for p in existing if elsewhere or update_of(p) > chosen.update]
    if ahead:
        rule = f"holds {ahead[-1].name}, which a run from {chosen.path} would write over"
        remedy = "use another --ckpt_dir, or move those checkpoints away"
        raise UserError(Problem("ckpt_dir", rule, remedy, config.ckpt_dir))


def incompatibilities(
    checkpoint: Checkpoint, config: TrainingConfig, parallel_layout: dict[str, Any], vocab_size: int
) -> list[Problem]:
    """Why this run cannot go on from a checkpoint; empty where it can."""
    theirs, ours = checkpoint.config().to_dict(), config.to_dict()
    problems = [
        Problem(name, f"differs from the checkpoint's {theirs[name]!r}", f"use {name} {theirs[name]}", ours[name])
        for name in _SHAPE + _PACE
        if theirs[name] != ours[name]
    ]
    if checkpoint.manifest["vocab_size"] != vocab_size:
        problems.append(
            Problem(
                "vocab_size" if config.vocab_size is not None else "tokenizer_path",
                f"gives a vocabulary of {vocab_size}, the checkpoint has {checkpoint.manifest['vocab_size']}",
                f"use the tokenizer that lies in the checkpoint, and vocab_size {theirs['vocab_size'] or 'null'}",
            )
        )
    return problems if checkpoint.portable else problems + _other_topology(checkpoint, parallel_layout)


def _other_topology(checkpoint: Checkpoint, parallel_layout: dict[str, Any]) -> list[Problem]:
    """Why DeepSpeed's own files do not load: they hold an engine's memory."""
    saved = checkpoint.manifest["parallel_layout"]
    if saved["zero_stage"] == 0 and saved["precision"] != "fp32" and parallel_layout["zero_stage"] != 0:
        # Such a run is ZeRO-1 today, so "resume with zero_stage 0" would lead nowhere.
        rule = f"was saved by DeepSpeed's own stage 0 in {saved['precision']}, which computed wrong updates"
        remedy = "start anew; `dsllama generate` and `dsllama export` still read it"
        return [Problem(str(checkpoint.path), rule, remedy)]
    if "nvme" in (saved["offload_optimizer"], saved["offload_params"]):
        rule = "holds DeepSpeed's own files of a run with NVMe offload, which load as other weights without a word"
        return [Problem(str(checkpoint.path), rule, "start anew, and leave checkpoint_format at portable")]
    return [
        Problem(
            name,
            f"differs from the checkpoint's {saved[name]!r}, and DeepSpeed's own files load only as they were saved",
            f"resume with {name} = {saved[name]}; a checkpoint saved with checkpoint_format portable loads anywhere",
            value,
        )
        for name, value in parallel_layout.items()
        # DeepSpeed's stage 0 files hold everything in one piece: they load on any number of ranks.
        if saved[name] != value and not (name == "ranks" and saved["zero_stage"] == parallel_layout["zero_stage"] == 0)
    ]


def topology_change(checkpoint: Checkpoint, config: TrainingConfig, parallel_layout: dict[str, Any]) -> str:
    """What is another now than when the checkpoint was saved, in words; empty where nothing is."""
    saved = {**checkpoint.manifest["parallel_layout"], "batch_size": checkpoint.config().batch_size}
    now = {**parallel_layout, "batch_size": config.batch_size}
    return ", ".join(f"{name} {saved[name]} -> {value}" for name, value in now.items() if saved[name] != value)


# ---------------------------------------------------------------- saving and loading


def save(
    folder: Path,
    world: World,
    engine: Any,
    update: int,
    manifest: dict[str, Any],
    attachments: dict[str, str],
    pinned: state.Pinned,
    form: str = "portable",
) -> Checkpoint:
    """Write and publish `folder`/update_N. Collective.

    manifest: what the caller knows (tokens, loss, data position, parallel_layout ...). attachments: name -> text of
    small files that lie beside the engine's. pinned: whose loss is to come out again at a load. form: "portable", or
    "deepspeed" for what the engine itself writes.
    Raises OSError on every rank if any rank failed to write.
    """
    final = folder / f"update_{update:07d}"
    aside = folder / f".writing-{final.name}"
    with _all_or_none(world):
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    manifest = {**manifest, "state": form}
    if form == "portable":
        manifest |= state.description(engine, pinned)
    mine: dict[str, Any] = {}
    with _all_or_none(world):
        if form == "portable":
            mine[file_name(world.rank)] = state.save(engine, aside, random_state(world))
        else:
            deepspeed_engine.save(engine, aside)
            torch.save(random_state(world), aside / f"random_rank_{world.rank}.pt")
        if world.is_main:
            for name, text in attachments.items():
                (aside / name).write_text(text, encoding="utf-8")
    with _all_or_none(world):
        written = {file_name(rank) for rank in range(world.size)} if form == "portable" else set()
        names = sorted({str(p.relative_to(aside)) for p in aside.rglob("*") if p.is_file()} - written)
        mine |= {name: _describe(aside / name) for name in names[world.rank :: world.size]}
    parts: list[dict[str, Any]] = [{}] * world.size
    dist.all_gather_object(parts, mine)
    files = {name: entry for part in parts for name, entry in part.items()}
    content = {"format": FORMAT, "update": update, **manifest, "files": dict(sorted(files.items()))}
    content["digest"] = _digest(content)
    with _all_or_none(world):
        if world.is_main:
            write_atomically(aside / MANIFEST, json.dumps(content, indent=1))
            if final.exists():  # a damaged one of the same update: kept, under a name that nobody resumes from
                final.rename(final.with_name(f"damaged-{final.name}-{time.time_ns()}"))
            aside.rename(final)
            _flush_folder(folder)
    return Checkpoint(final, content)


def load(checkpoint: Checkpoint, world: World, engine: Any, pinned: state.Pinned, precision: str) -> None:
    """Restore the engine's and this rank's random state, and prove it. Collective.

    pinned: as it was saved with. precision: of this run. Raises RuntimeError, on every rank, where it cannot be loaded
    or comes out otherwise.
    """
    manifest = checkpoint.manifest
    if not checkpoint.portable:
        deepspeed_engine.load(engine, checkpoint.path)
        file = checkpoint.path / f"random_rank_{world.rank}.pt"
        if file.exists() and manifest["parallel_layout"]["ranks"] == world.size:
            restore_random_state(torch.load(file, weights_only=True), world)
        return
    with Source(checkpoint.path, manifest) as source:
        try:
            own = state.load(engine, source, manifest)
        except DamagedFile as error:
            raise RuntimeError(f"{checkpoint.path}: {error}") from None
    if own:
        restore_random_state(own, world)
    else:  # draws that no rank has made before
        seed_everything(manifest["seed"] + 1 + world.rank + 1000 * checkpoint.update)
    wrong = state.proof(engine, manifest, pinned, precision)
    if wrong:
        raise RuntimeError(f"{checkpoint.path}: {wrong}")


def random_state(world: World) -> dict[str, torch.Tensor]:
    """torch's random state on this rank (dropout draws from it)."""
    found = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(world.device)
    return found


def restore_random_state(saved: dict[str, torch.Tensor], world: World) -> None:
    """Put back what `random_state` took."""
    torch.set_rng_state(saved["cpu"])
    if "cuda" in saved and world.device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], world.device)


def seed_everything(seed: int) -> None:
    """The same start on every rank: weights drawn on any rank are the same weights."""
    torch.manual_seed(seed)


# ---------------------------------------------------------------- files


def _read(path: Path, checksums: bool = True) -> tuple[dict[str, Any], str]:
    """(manifest, "") of a whole checkpoint, or ({}, what is wrong with it)."""
    if not path.is_dir():
        return {}, "there is no such folder"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] not in (FORMAT, _SECOND_FORMAT, _FIRST_FORMAT):
            return {}, f"its format is {manifest['format']!r}, not {FORMAT!r}"
        if manifest["format"] == _FIRST_FORMAT:
            manifest["parallel_layout"] = manifest.pop("topology")
        elif manifest["digest"] != _digest(manifest):
            return {}, f"its {MANIFEST} was changed after it was saved"
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) != manifest["update"]:
            return {}, f"its {MANIFEST} is of update {manifest['update']}"
    except FileNotFoundError:
        return {}, f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return {}, f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    try:
        manifest.setdefault("state", "deepspeed")
        reason = _file_problem(path, manifest, checksums)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return {}, f"its {MANIFEST} says something else than it should ({type(error).__name__}: {error})"
    return ({}, reason) if reason else (manifest, "")


def _file_problem(path: Path, manifest: dict[str, Any], checksums: bool) -> str:
    for name in ("update", "tokens", "data", "parallel_layout", "vocab_size", "schedule"):
        manifest[name]
    for name, entry in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if "blocks" in entry:
            problem = problem_of(path / name, entry) if checksums else ""
            if problem:
                return problem
        elif checksums and sha256(path / name) != entry["sha256"]:
            return f"{name} does not have the checksum that it was saved with"
    return ""


def _digest(manifest: dict[str, Any]) -> str:
    """By which a manifest is known to be as it was saved: what it says decides which data a run goes on with."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return "sha256:" + hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _describe(file: Path) -> dict[str, Any]:
    """Size and checksum of a file that has just been written, once the disk really has it."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _all_or_none(world: World) -> Iterator[None]:
    """Raise OSError on every rank if writing failed on any: a rank that left alone would hang the others."""
    failure = ""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk with a RuntimeError
        failure = f"rank {world.rank}: {' '.join(str(error).split())[:300]}"
    failures: list[str] = [""] * world.size
    dist.all_gather_object(failures, failure)
    text = "; ".join(filter(None, failures))
    if text:
        raise OSError(text)


def timestamp() -> str:
    """The time of saving, in UTC, for people."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
