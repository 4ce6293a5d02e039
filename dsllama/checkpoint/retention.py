"""Which checkpoints are kept. Whatever a policy says, the newest whole one that can be resumed is.

A checkpoint disappears by a rename, so that none is ever half there; where only its optimizer's state goes, a new
manifest is the moment. What a crash leaves behind is removed by `tidy`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsllama.checkpoint.catalog import MANIFEST, Checkpoint, digest, list_checkpoints, look_at, update_of
from dsllama.errors import Problem, UserError
from dsllama.files import write_atomically
from dsllama.locks import hold

# Whoever adds to a folder of checkpoints, or removes from it, holds this file in it.
LOCK = ".lock"
# How folders of the self-test begin: of one that was killed, something may be left.
SELF_TEST = ".dsllama-selftest"
_REMOVING, _WRITING = ".removing-", ".writing-"
_OPTIMIZER = "optimizer_"


@dataclass(frozen=True)
class Policy:
    """Keep the `last` newest; of the older ones one in `every` tokens, and the `best` with the lowest validation loss;
    of the others the weights, if `weights`, else nothing."""

    last: int
    every: int | None = None
    best: int = 0
    weights: bool = False

    def superfluous(self, found: Iterable[Checkpoint]) -> list[Checkpoint]:
        """Those, oldest first, that are not kept as they are."""
        ordered = sorted(found, key=lambda c: c.update)
        resumable = [c for c in ordered if c.resumable]
        kept = {c.update for c in resumable[-self.last :]}
        if (every := self.every) is not None:
            steps = zip(ordered, pairwise([0, *(c.tokens for c in ordered)]), strict=True)
            kept |= {c.update for c, (before, tokens) in steps if tokens // every > before // every}
        judged = [c for c in ordered if c.manifest.get("validation_loss") is not None]
        judged.sort(key=lambda c: c.manifest["validation_loss"])
        kept |= {c.update for c in judged[: self.best]}
        if not resumable:
            return []
        others = [c for c in ordered if c.update not in kept]
        if not self.weights:
            return others
        return [c for c in others if any(name.startswith(_OPTIMIZER) for name in c.manifest["files"])]


class Retention:
    """A policy applied to a folder of checkpoints, as a run adds to it.

    until: the update that the run begins after; what lies beyond it was passed over as damaged, and does not count.
    warn: called with a sentence for what could not be removed; nothing else comes of it.
    """

    def __init__(self, policy: Policy, ckpt_dir: Path, warn: Callable[[str], Any], until: int | None = None) -> None:
        self.policy, self.warn = policy, warn
        paths = [path for path in list_checkpoints(ckpt_dir) if until is None or update_of(path) <= until]
        self.found = [found for found in map(look_at, paths) if isinstance(found, Checkpoint)]

    def apply(self, newest: Checkpoint | None = None) -> list[Checkpoint]:
        """Remove what is superfluous, after `newest` was saved; returns what has gone, or has only weights left."""
        if newest is not None:
            self.found = [c for c in self.found if c.update < newest.update] + [newest]
        gone = []
        for checkpoint in self.policy.superfluous(self.found):
            left = None
            try:
                if self.policy.weights:
                    left = drop_optimizer(checkpoint)
                else:
                    remove(checkpoint.path)
            except OSError as error:
                if not checkpoint.path.exists():  # nobody sees it any more; `tidy` removes the rest
                    self.found.remove(checkpoint)
                why = error.strerror or error
                self.warn(f"could not remove {checkpoint.path}: {why}; it is left for the next time")
                continue
            gone.append(checkpoint)
            self.found = [c for c in self.found if c is not checkpoint] + ([left] if left else [])
        return gone


def prune(
    ckpt_dir: Path, policy: Policy, damaged: bool = False, dry_run: bool = False, warn: Callable[[str], Any] = print
) -> dict[str, list[str]]:
    """Apply a policy by hand; the names of checkpoints that were `removed`, have only `weights` left, are `kept`, and
    of those that are `damaged`, which are removed too if `damaged` (and count for nothing otherwise).

    Everything in the newest one is read beforehand, and in all with `damaged`. dry_run: nothing is changed.
    Raises UserError where a run holds the folder, or no whole checkpoint that can be resumed would be left.
    """
    if not list_checkpoints(ckpt_dir):
        raise UserError(Problem(str(ckpt_dir), "is no folder of checkpoints", "give a ckpt_dir"))
    remedy = "set keep_last in its configuration, or wait for its end"
    with hold(ckpt_dir / LOCK, str(ckpt_dir), "", remedy) if not dry_run else contextlib.nullcontext():
        paths = list_checkpoints(ckpt_dir)
        looked_at = {path: look_at(path) for path in paths}
        whole = [found for found in looked_at.values() if isinstance(found, Checkpoint)]
        bad = {path: found for path, found in looked_at.items() if isinstance(found, str)}
        # From the newest on, until one is whole: what the others are worth depends on that one.
        for checkpoint in sorted(whole, key=lambda c: -c.update):
            damage = next(checkpoint.damages(), "")
            if damage:
                bad[checkpoint.path] = damage
                whole.remove(checkpoint)
            elif checkpoint.resumable and not damaged:
                break
        if not any(checkpoint.resumable for checkpoint in whole):
            rule = "holds no whole checkpoint that could be resumed, so nothing in it is removed"
            raise UserError(Problem(str(ckpt_dir), rule, "see `dsllama checkpoints verify`"))
        retention = Retention(policy, ckpt_dir, warn)
        retention.found = whole
        going = policy.superfluous(whole) if dry_run else retention.apply()
        bad |= {path: "it was passed over as damaged" for path in ckpt_dir.glob("damaged-update_*") if path.is_dir()}
        for path, why in bad.items():
            # What another version wrote, or cannot be read just now, is perhaps whole.
            proven = not why.startswith("its format") and "cannot be " not in why
            warn(f"{path} is damaged: {why}" if proven else f"{path} is left alone: {why}")
            if damaged and proven and not dry_run:
                try:
                    remove(path)
                except OSError as error:
                    warn(f"could not remove {path}: {error.strerror or error}")
        if not dry_run:
            tidy(ckpt_dir, warn)
    gone = {checkpoint.path.name for checkpoint in going}
    return {
        "removed": [] if policy.weights else sorted(gone),
        "weights": sorted(gone) if policy.weights else [],
        "kept": [c.path.name for c in whole if c.path.name not in gone],
        "damaged": sorted(path.name for path in bad),
    }


def remove(path: Path) -> None:
    """Remove a checkpoint; from its first moment on nobody sees a part of one. Of a link, the link. Raises OSError."""
    if path.is_symlink():
        path.unlink()
        return
    aside = path.with_name(f"{_REMOVING}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def drop_optimizer(checkpoint: Checkpoint) -> Checkpoint:
    """Leave only the weights of a portable checkpoint; returns what is left. Raises OSError."""
    files = checkpoint.manifest["files"]
    kept = {name: entry for name, entry in files.items() if not name.startswith(_OPTIMIZER)}
    manifest = {**checkpoint.manifest, "state": "weights", "files": kept}
    manifest["digest"] = digest(manifest)
    write_atomically(checkpoint.path / MANIFEST, json.dumps(manifest, indent=1))
    left = Checkpoint(checkpoint.path, manifest)
    _remove_dropped(left)
    return left


def tidy(ckpt_dir: Path, warn: Callable[[str], Any]) -> list[Path]:
    """Remove what saves and removals that were cut short have left; returns it. Only while the folder is held."""
    removed = []
    left = [p for p in ckpt_dir.glob(".*-update_*") if p.name.startswith((_REMOVING, _WRITING))]
    for path in sorted([*left, *ckpt_dir.glob(f"{SELF_TEST}-*")]):
        try:
            shutil.rmtree(path)
            removed.append(path)
        except OSError as error:
            warn(f"could not remove {path}, which an earlier run has left: {error.strerror or error}")
    for path in list_checkpoints(ckpt_dir):
        found = look_at(path) if any(path.glob(f"{_OPTIMIZER}*")) else ""
        if isinstance(found, Checkpoint) and not found.resumable:
            with contextlib.suppress(OSError):
                _remove_dropped(found)
    return removed


def _remove_dropped(checkpoint: Checkpoint) -> None:
    for file in checkpoint.path.glob(f"{_OPTIMIZER}*"):
        if file.name not in checkpoint.manifest["files"]:
            file.unlink()
