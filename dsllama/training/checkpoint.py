"""A run's checkpoints: which one it goes on from, and how all ranks take it up. Saving is next door.

A function that is called collective ends on all ranks alike: one that left alone would leave the others waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsllama.checkpoint import catalog, state
from dsllama.checkpoint.catalog import Checkpoint, list_checkpoints
from dsllama.checkpoint.fragments import Source
from dsllama.config import TrainingConfig
from dsllama.data.tokenizer import Tokenizer
from dsllama.errors import Problem, UserError
from dsllama.sizes import readable
from dsllama.training import engine as deepspeed_engine
from dsllama.training.engine import World

if TYPE_CHECKING:
    from dsllama.training.trainer import Job

logger = logging.getLogger("dsllama")
# What must be the same for the weights to fit, and for "update u" to mean the same samples.
_SHAPE = ("n_embd", "n_heads", "n_kv_heads", "n_layers", "multiple_of", "tie_embeddings")
_SAME_RUN = (*_SHAPE, "eps", "theta", "max_seq_len", "tokens_per_update")


# ---------------------------------------------------------------- choosing


def choose(config: TrainingConfig) -> Checkpoint | None:
    """What `load_ckpt` asks for: a checkpoint, or None to start anew. By manifests and sizes; `load` reads the rest.
    Raises UserError where a resume is impossible, or where starting anew would write over an earlier run."""
    existing = list_checkpoints(config.ckpt_dir)
    if config.load_ckpt is False:
        if existing:
            rule = f"holds {len(existing)} checkpoints of an earlier run, the newest {existing[-1].name}"
            remedy = "use --load_ckpt true to go on with it, or another --ckpt_dir"
            raise UserError(Problem("ckpt_dir", rule, remedy, config.ckpt_dir))
        return None
    if isinstance(config.load_ckpt, str) and config.load_ckpt != "auto":
        named = catalog.open_checkpoint(config.load_ckpt, logger.warning, resumable=True)
        _refuse_to_overwrite(named, existing, config)
        return named
    chosen = catalog.newest_whole(config.ckpt_dir, logger.warning, resumable=True)
    if chosen is None and (existing or config.load_ckpt is True):
        raise UserError(catalog.none_is_whole("ckpt_dir", Path(config.ckpt_dir), resumable=True))
    return chosen


def next_whole(job: Job, damaged: Checkpoint, reason: str) -> Checkpoint:
    """What to go on from instead of a damaged one. Raises UserError if that was asked for by name, or no other fits."""
    folder = damaged.path.parent
    if _by_name(job.config) and damaged.path == Path(str(job.config.load_ckpt)).resolve():
        others = [str(p) for p in list_checkpoints(folder) if p != damaged.path]
        remedy = f"beside it: {', '.join(others[-3:])}" if others else "give the path of another one"
        raise UserError(Problem(str(damaged.path), f"is damaged: {reason}", remedy), "cannot load the checkpoint")
    logger.warning(f"passing over the damaged checkpoint {damaged.path}: {reason}")
    found = catalog.newest_whole(folder, logger.warning, before=damaged.update, resumable=True)
    if found is None:
        raise UserError(catalog.none_is_whole("ckpt_dir", folder, resumable=True))
    if problems := incompatibilities(found, job.config, job.parallel_layout, job.derived.vocab_size):
        raise UserError(problems)
    return found


def _by_name(config: TrainingConfig) -> bool:
    """Whether load_ckpt names one checkpoint, and no folder of them."""
    named = config.load_ckpt
    return isinstance(named, str) and named != "auto" and not list_checkpoints(named)


def _refuse_to_overwrite(chosen: Checkpoint, existing: list[Path], config: TrainingConfig) -> None:
    """A resume from an older checkpoint, or from another run's, would replace what lies ahead of it in ckpt_dir."""
    elsewhere = chosen.path.parent.resolve() != Path(config.ckpt_dir).resolve()
    if not elsewhere and not _by_name(config):
        return  # what lies ahead has been passed over
    ahead = [p for p in existing if elsewhere or catalog.update_of(p) > chosen.update]
    if ahead:
        rule = f"holds {ahead[-1].name}, which a run from {chosen.path} would write over"
        remedy = "use another --ckpt_dir, or move those checkpoints away"
        raise UserError(Problem("ckpt_dir", rule, remedy, config.ckpt_dir))


def incompatibilities(
    checkpoint: Checkpoint, config: TrainingConfig, parallel_layout: dict[str, Any], vocab_size: int
) -> list[Problem]:
    """Why this run cannot go on from a checkpoint; empty where it can."""
    problems = _other_shape(checkpoint, config, vocab_size, _SAME_RUN)
    return problems if checkpoint.portable else problems + _other_topology(checkpoint, parallel_layout)


def _other_shape(
    checkpoint: Checkpoint, config: TrainingConfig, vocab_size: int, fields: Sequence[str]
) -> list[Problem]:
    theirs, ours = checkpoint.config().to_dict(), config.to_dict()
    problems = [
        Problem(name, f"differs from the checkpoint's {theirs[name]!r}", f"use {name} {theirs[name]}", ours[name])
        for name in fields
        if theirs[name] != ours[name]
    ]
    if checkpoint.manifest["vocab_size"] != vocab_size:
        where = "vocab_size" if config.vocab_size is not None else "tokenizer_path"
        rule = f"gives a vocabulary of {vocab_size}, the checkpoint has {checkpoint.manifest['vocab_size']}"
        remedy = f"use the tokenizer that lies in the checkpoint, and vocab_size {theirs['vocab_size'] or 'null'}"
        problems.append(Problem(where, rule, remedy))
    return problems


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


def misfits(
    checkpoint: Checkpoint, config: TrainingConfig, vocab_size: int, tokenizer: Tokenizer | None
) -> list[Problem]:
    """Why a run cannot begin with a checkpoint's weights (`init_from`); empty where it can."""
    problems = _other_shape(checkpoint, config, vocab_size, _SHAPE)
    theirs = Tokenizer.load(checkpoint.path / "tokenizer.json").fingerprint
    if tokenizer is not None and tokenizer.fingerprint != theirs:
        rule = f"is not the tokenizer of {checkpoint.path}, so its weights know the ids as other words"
        remedy = f"use {checkpoint.path / 'tokenizer.json'}, and encode the data with it"
        problems.append(Problem("tokenizer_path", rule, remedy, config.tokenizer_path))
    return problems


def resumption_lines(checkpoint: Checkpoint, config: TrainingConfig, parallel_layout: dict[str, Any]) -> list[str]:
    """What a run says of the checkpoint that it goes on from, and of what is another since that was saved."""
    lines = [f"resuming     {checkpoint.path}: update {checkpoint.update}, {readable(checkpoint.tokens)} tokens"]
    saved = {**checkpoint.manifest["parallel_layout"], "batch_size": checkpoint.config().batch_size}
    now = {**parallel_layout, "batch_size": config.batch_size}
    change = ", ".join(f"{name} {saved[name]} -> {value}" for name, value in now.items() if saved[name] != value)
    if change and checkpoint.portable:
        change += ": the state is taken up by name, the losses go on"
    return [*lines, f"topology     {change}"] if change else lines


# ---------------------------------------------------------------- loading


def load(checkpoint: Checkpoint, world: World, engine: Any, pinned: state.Pinned, precision: str) -> None:
    """Restore the engine's and this rank's random state, and prove it. Collective.

    pinned: as it was saved with. precision: of this run. Raises, on every rank, DamagedFile where a file is not as it
    was saved (another checkpoint may be loaded then), and RuntimeError where the state comes out otherwise.
    """
    manifest = checkpoint.manifest
    if not checkpoint.portable:
        insist_on_whole_files(checkpoint, world)
        deepspeed_engine.load(engine, checkpoint.path)
        file = checkpoint.path / f"random_rank_{world.rank}.pt"
        if file.exists() and manifest["parallel_layout"]["ranks"] == world.size:
            restore_random_state(torch.load(file, weights_only=True), world)
        return
    with Source(checkpoint.path, manifest) as source:
        own = state.load(engine, source, manifest)
    if own:
        restore_random_state(own, world)
    else:  # draws that no rank has made before
        torch.manual_seed(manifest["seed"] + 1 + world.rank + 1000 * checkpoint.update)
    if wrong := state.proof(engine, manifest, pinned, precision):
        raise RuntimeError(f"{checkpoint.path}: {wrong}")


def begin_with(checkpoint: Checkpoint, world: World, engine: Any) -> None:
    """Take up a checkpoint's weights in a fresh engine. Collective. Raises DamagedFile on every rank."""
    if checkpoint.portable:
        with Source(checkpoint.path, checkpoint.manifest) as source:
            state.load_weights(engine, source.read_into)
        return
    from dsllama.training.weights import from_deepspeeds_files

    insist_on_whole_files(checkpoint, world)  # DeepSpeed would read what is there, whatever it is
    weights = from_deepspeeds_files(checkpoint)

    def read_into(name: str, _kind: str, start: int, out: torch.Tensor) -> None:
        out.copy_(weights[name].view(-1)[start : start + out.numel()])

    state.load_weights(engine, read_into)


def insist_on_whole_files(checkpoint: Checkpoint, world: World) -> None:
    """Read every file, each on one rank. Collective. Raises DamagedFile on every rank."""
    names = list(checkpoint.manifest["files"])[world.rank :: world.size]
    state.raise_together("; ".join(damage for name in names for damage in checkpoint.damages_of(name)))


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
