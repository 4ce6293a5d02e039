"""Which checkpoints there are, and whether they are whole; needs neither DeepSpeed nor a process group.

    ckpt_dir/update_0000300/            published by one rename of ckpt_dir/.writing-update_0000300
        manifest.json                   update, tokens, loss, data position, counters, sizes and digests of files
        config.yaml deepspeed.json tokenizer.json
        weights_00000.safetensors       what each rank holds of weights and moments, by name; see fragments.py
        optimizer_00000.safetensors ... (with `checkpoint_format: deepspeed` engine/, what the engine itself writes)

The manifest is the commit: a folder without one is none. What it says is looked at when a checkpoint is chosen, with
the sizes of the files; their contents are checked while they are read, and all of them by `damages`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from calendar import timegm
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dsllama import files
from dsllama.checkpoint.fragments import DamagedFile, StateFile
from dsllama.config import TrainingConfig, load_config
from dsllama.errors import Problem, UserError

MANIFEST = "manifest.json"
# The first two hold DeepSpeed's files, the first one's manifests have other words and no digest; the third had weights
# and moments in the same file.
_FORMATS = [f"dsllama-checkpoint-{number}" for number in (1, 2, 3, 4)]
FORMAT = _FORMATS[-1]
_NAME = re.compile(r"update_(\d{7,})")
# Small, and read whole: their digests are always looked at.
_TEXTS = ("config.yaml", "deepspeed.json", "tokenizer.json")
T = TypeVar("T")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest is whole, and whose files have the sizes that it says."""

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
        return self.manifest["state"] != "deepspeed"

    @property
    def resumable(self) -> bool:
        """Whether it has the optimizer's state, and not only weights."""
        return self.manifest["state"] != "weights"

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    @property
    def age(self) -> float | None:
        """Seconds since it was saved, if it says when."""
        try:
            return max(0.0, time.time() - timegm(time.strptime(self.manifest["saved_at"], _TIME)))
        except (KeyError, TypeError, ValueError):
            return None

    def config(self) -> TrainingConfig:
        """The configuration that the checkpoint was trained with."""
        return load_config(self.path / "config.yaml")

    def damages(self) -> Iterator[str]:
        """Read everything; what is not as it was saved."""
        for name in self.manifest["files"]:
            yield from self.damages_of(name)

    def damages_of(self, name: str) -> list[str]:
        """What in a file is not as it was saved."""
        entry, path = self.manifest["files"][name], self.path / name
        try:
            if "blocks" in entry:
                with contextlib.closing(StateFile(path, entry)) as file:
                    return list(file.damages())
            whole = files.sha256(path) == entry["sha256"]
        except DamagedFile as error:
            return [str(error)]
        except OSError as error:
            return [f"{name} cannot be read ({error.strerror})"]
        return [] if whole else [f"{name} does not have the checksum that it was saved with"]


def topology(layout: dict[str, Any]) -> str:
    """A parallel layout in words: "ZeRO-1, 2 ranks, bf16"."""
    ranks = f"{layout['ranks']} rank" + ("s" if layout["ranks"] > 1 else "")
    words = [f"ZeRO-{layout['zero_stage']}", ranks, layout["precision"]]
    for part in ("optimizer", "params"):
        device = layout.get(f"offload_{part}", "none")
        words += [f"{part} on {device}"] if device != "none" else []
    return ", ".join(words)


def summary(path: Path, read: bool = False) -> dict[str, Any]:
    """A checkpoint for people and programs; `problems` is empty where it is whole. read: all of it, not its manifest
    only."""
    found = look_at(path)
    if isinstance(found, str):
        update = update_of(path) if _NAME.fullmatch(path.name) else None
        return {"path": str(path), "update": update, "problems": [found]}
    return {
        "path": str(path),
        "update": found.update,
        "tokens": found.tokens,
        # JSON has no NaN, which the loss of an update that was left out may be.
        **{name: finite(found.manifest.get(name)) for name in ("loss", "validation_loss")},
        "saved_at": found.manifest.get("saved_at"),
        "age_seconds": found.age,
        "topology": found.manifest["parallel_layout"],
        "state": found.manifest["state"],
        "health": _health(found.manifest),
        "bytes": found.bytes,
        "problems": list(found.damages()) if read else [],
    }


def finite(number: float | None) -> float | None:
    """None for what is none."""
    return number if number is not None and math.isfinite(number) else None


def _health(manifest: dict[str, Any]) -> dict[str, int]:
    """What had gone wrong in the run so far, counted."""
    kept = manifest.get("health", {})
    left_out = sum(last - first for first, last in kept.get("skipped_samples", ()))
    counted = {name: kept.get(name, 0) for name in ("rollbacks", "suspicions")}
    return {
        "skipped_updates": manifest.get("engine", {}).get("skipped_steps", 0),
        **counted,
        "samples_left_out": left_out,
    }


def timestamp() -> str:
    """The time of saving, in UTC, for people."""
    return time.strftime(_TIME, time.gmtime())


# ---------------------------------------------------------------- finding


def list_checkpoints(ckpt_dir: str | Path) -> list[Path]:
    """The published checkpoints in a folder, oldest first; whether they are whole is not looked at."""
    folder = Path(ckpt_dir)
    found = [p for p in folder.glob("update_*") if p.is_dir() and _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=update_of)


def checkpoints_at(path: Path) -> list[Path]:
    """Those in a folder, oldest first, or the one that the folder is. Raises UserError where there is no folder."""
    if not path.is_dir():
        raise UserError(Problem(str(path), "there is no such folder", "give a ckpt_dir, or one checkpoint"))
    path = path.resolve()
    itself = (path / MANIFEST).exists() or _NAME.fullmatch(path.name)
    return list_checkpoints(path) or ([path] if itself else [])


def update_of(path: Path) -> int:
    """The update that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("update_"))


def open_checkpoint(path: str | Path, warn: Callable[[str], Any] | None = None, resumable: bool = False) -> Checkpoint:
    """The checkpoint in a folder; given a folder of checkpoints, its newest whole one. Raises UserError.

    resumable: with the optimizer's state. warn: called with a sentence for each that is passed over.
    """
    path = Path(path).resolve()
    if list_checkpoints(path):
        newest = newest_whole(path, warn, resumable=resumable)
        if newest is not None:
            return newest
        raise UserError(none_is_whole(str(path), path, resumable), "cannot load the checkpoint")
    found = look_at(path)
    reason = found if isinstance(found, str) else _unresumable(found, resumable)
    if not isinstance(found, str) and not reason:
        return found
    looked_at = [look_at(each) for each in list_checkpoints(path.parent) if each != path]
    others = [str(c.path) for c in looked_at if isinstance(c, Checkpoint) and not _unresumable(c, resumable)]
    remedy = f"whole ones beside it: {', '.join(others[-3:])}" if others else "give the path of a checkpoint"
    if not isinstance(found, str):
        remedy = f"--init_from {path} begins anew with its weights; {remedy}"
    raise UserError(Problem(str(path), f"is not a whole checkpoint: {reason}", remedy), "cannot load the checkpoint")


def none_is_whole(where: str, folder: Path, resumable: bool) -> Problem:
    """That a folder holds no checkpoint that could be taken, as a problem of the field or path `where`."""
    found = list_checkpoints(folder)
    rule = f"none of the {len(found)} checkpoints in it is whole" if found else "holds no checkpoint to resume"
    remedy = "use --load_ckpt false and an empty --ckpt_dir to start anew" if resumable else "give another one"
    weights = newest_whole(folder) if resumable else None
    if weights is not None and next(weights.damages(), None) is not None:
        weights = None
    if weights is not None:
        rule += ", with the optimizer's state"
        remedy = f"--init_from {weights.path} and an empty --ckpt_dir begin anew with the weights that are left"
    value = None if where == str(folder) else str(folder)
    return Problem(where, rule, remedy, value)


def newest_whole(
    ckpt_dir: str | Path, warn: Callable[[str], Any] | None = None, before: int | None = None, resumable: bool = False
) -> Checkpoint | None:
    """The newest whole checkpoint, or None. before: only of earlier updates. The rest as `open_checkpoint`."""
    for path in reversed(list_checkpoints(ckpt_dir)):
        if before is not None and update_of(path) >= before:
            continue
        found = look_at(path)
        if isinstance(found, str):
            reason = f"passing over the damaged checkpoint {path}: {found}"
        elif _unresumable(found, resumable):
            reason = f"passing over {path}: {_unresumable(found, resumable)}"
        else:
            return found
        if warn is not None:
            warn(reason)
    return None


def _unresumable(found: Checkpoint, resumable: bool) -> str:
    return "it holds weights only, and no optimizer state to go on with" if resumable and not found.resumable else ""


def look_at(path: Path) -> Checkpoint | str:
    """The checkpoint in a folder, by its manifest, its small files and the sizes of the rest; or what is wrong."""
    if not path.is_dir():
        return "there is no such folder"
    if not (path / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] not in _FORMATS:
            return f"its format is {manifest['format']!r}, not {FORMAT!r}"
        if manifest["format"] == _FORMATS[0]:
            manifest["parallel_layout"] = manifest.pop("topology")
        elif manifest["digest"] != digest(manifest):
            return f"its {MANIFEST} was changed after it was saved"
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) != manifest["update"]:
            return f"its {MANIFEST} is of update {manifest['update']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    try:
        manifest.setdefault("state", "deepspeed")
        found = Checkpoint(path, manifest)
        return _problem(found) or found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"its {MANIFEST} says something else than it should ({type(error).__name__}: {error})"


def _problem(found: Checkpoint) -> str:
    for name in ("update", "tokens", "data", "parallel_layout", "vocab_size", "schedule"):
        found.manifest[name]
    for name, entry in found.manifest["files"].items():
        try:
            size = (found.path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if name in _TEXTS and (damages := found.damages_of(name)):
            return damages[0]
    return ""


def digest(manifest: dict[str, Any]) -> str:
    """By which a manifest is known to be as it was saved: what it says decides which data a run goes on with."""
    return files.digest({name: value for name, value in manifest.items() if name != "digest"})


def with_first_whole(
    source: Checkpoint, use: Callable[[Checkpoint], T], instead: Callable[[Checkpoint, str], Checkpoint]
) -> T:
    """`use` of a checkpoint; where it turns out damaged while it is read, of the one that is given `instead` of it and
    of what is damaged, and so on."""
    while True:
        try:
            return use(source)
        except DamagedFile as error:
            source = instead(source, str(error))


def older_whole(
    path: str | Path, warn: Callable[[str], Any], damaged: Checkpoint, reason: str, where: str = ""
) -> Checkpoint:
    """The newest whole one before a damaged one, if `path` is the folder of both. Raises UserError, of the field
    `where`, if there is none."""
    older = newest_whole(path, warn, before=damaged.update)
    if older is None:
        named = (where, str(damaged.path)) if where else (str(damaged.path), None)
        problem = Problem(named[0], f"is damaged: {reason}", "give the path of another checkpoint", named[1])
        raise UserError(problem, "cannot load the checkpoint") from None
    warn(f"passing over the damaged checkpoint {damaged.path}: {reason}; beginning with {older.path}")
    return older
