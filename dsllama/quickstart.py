"""The whole road in minutes, on a machine with or without a GPU and without a download.

    standard library's text -> tokenizer -> shards -> `deepspeed launch/train.py` -> summary

Each stage that is done already is kept. A run that was interrupted goes on; one that is finished says so.
"""

from __future__ import annotations

import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from statistics import fmean, median_high
from typing import Any

import torch
import yaml

from dsllama.arguments import value_of
from dsllama.checkpoint.catalog import Checkpoint, newest_whole
from dsllama.checkpoint.retention import LOCK
from dsllama.cluster.launch import Place
from dsllama.cluster.supervisor import Restarts, Supervisor
from dsllama.config import TrainingConfig, load_config, read_settings
from dsllama.data.corpus import gather_stdlib_corpus
from dsllama.data.encode import encode
from dsllama.data.tokenizer import train_tokenizer
from dsllama.derived import DEFAULT_VOCABULARY
from dsllama.errors import Problem, UserError
from dsllama.files import write_own
from dsllama.locks import hold
from dsllama.machine import half_precision, unusable_gpu, usable_cores
from dsllama.model import LLaMaTransformer
from dsllama.rules import check_world_size
from dsllama.sizes import readable, readable_duration
from dsllama.training.engine import free_port
from dsllama.training.reporting import read_log, samples_file
from dsllama.training.stopping import EXIT_STOPPED

_READY_CONFIGURATION = Path(__file__).parent / "quickstart.yaml"
_say = partial(print, flush=True)


def quickstart(folder: Path, fresh: bool = False, ranks: int | None = None, overrides: list[str] | None = None) -> int:
    """Run every stage that is not done yet; returns the exit code (75 where Ctrl-C stopped it with a checkpoint).

    overrides: FIELD=VALUE settings laid over the embedded configuration, or over that of the run which goes on.
    Raises UserError for mistakes, and for settings that the run in the folder does not have.
    """
    begun = time.monotonic()
    check_torch()
    done = None if fresh else newest_whole(folder / "checkpoints")
    config = _configuration(folder, _settings(overrides or []), done, ranks)
    most = torch.cuda.device_count() or usable_cores()
    if ranks is not None and not 1 <= ranks <= most:
        kind = "GPUs that are visible" if torch.cuda.device_count() else "cores"
        raise UserError(Problem("--ranks", f"must be from 1 to {most}, the {kind}", "leave it out", ranks))
    ranks = ranks or default_ranks(config)
    if problems := check_world_size(config.replace(batch_size=1), ranks):
        raise UserError(problems)
    config = config.replace(batch_size=fitting_batch(config, ranks))
    _say(f"everything goes to {folder}/")
    corpus = gather_stdlib_corpus(folder / "corpus")
    _say(f"corpus       {corpus}: the text of this Python's standard library (PSF licence)")
    _make_data(folder, config)
    config_file = folder / "config.yaml"
    if done is not None and done.tokens >= config.training_tokens:
        _say(f"training     is finished already ({done.path}); `make quickstart ARGS=--fresh` starts it anew")
        return _summarize(folder, config, ranks, time.monotonic() - begun)
    if fresh:
        _set_aside(folder)
    write_own(config_file, yaml.safe_dump(config.to_dict(), sort_keys=False))
    if done is not None:
        _say(f"training     goes on from {done.path} ({done.update} updates); ARGS=--fresh would start it anew")
    place = Place(processes=ranks, master_port=int(free_port()))
    words = ["--config", str(config_file)]
    if code := Supervisor(place, words, config, config.vocab_size or DEFAULT_VOCABULARY, Restarts()).run():
        stopped = "stopped, with a checkpoint; `make quickstart` goes on from it"
        _say(stopped if code == EXIT_STOPPED else f"training ended with exit code {code}; what it said is above")
        return code
    return _summarize(folder, config, ranks, time.monotonic() - begun)


def default_ranks(config: TrainingConfig) -> int:
    """One process per GPU, or 2 on a CPU with 2 cores (so that the run is a distributed one), as far as an update's
    sequences can be shared among them."""
    wanted = torch.cuda.device_count() or min(2, usable_cores())
    sequences = config.tokens_per_update // config.max_seq_len
    ranks = max(ranks for ranks in range(1, wanted + 1) if sequences % ranks == 0)
    if ranks < wanted:
        _say(f"ranks        {ranks}, not {wanted}: an update has {sequences} sequences, which {wanted} cannot share")
    return ranks


def fitting_batch(config: TrainingConfig, ranks: int) -> int:
    """The largest micro-batch up to the configuration's of which an update is a whole number on so many ranks; where
    there is none, the configuration's, for the run to refuse. What is trained does not depend on it."""
    share, rest = divmod(config.tokens_per_update, config.max_seq_len * ranks)
    fitting = [size for size in range(1, config.batch_size + 1) if not rest and share % size == 0]
    return max(fitting, default=config.batch_size)


def check_torch() -> None:
    """Raise UserError where there is a GPU that the installed PyTorch cannot use."""
    if os.environ.get("DS_ACCELERATOR") != "cpu" and (problem := unusable_gpu()):
        raise UserError(problem)


def _settings(overrides: list[str]) -> dict[str, Any]:
    if others := [text for text in overrides if "=" not in text]:
        raise UserError(Problem(text, "must be FIELD=VALUE", "for example n_layers=6") for text in others)
    return {name: value_of(name, value) for name, _, value in (text.partition("=") for text in overrides)}


def _configuration(folder: Path, changes: dict[str, Any], done: Checkpoint | None, ranks: int | None) -> TrainingConfig:
    """The embedded configuration with these changes; or, where a run in the folder goes on, that run's."""
    paths = {
        "dataset_dir": str(folder / "shards"),
        "tokenizer_path": str(folder / "tokenizer.json"),
        "ckpt_dir": str(folder / "checkpoints"),
        "log_file": str(folder / "log.csv"),
        "load_ckpt": "auto",
    }
    if done is None:
        config = load_config(None, {**read_settings(_READY_CONFIGURATION), **paths, **changes})
        return config if "precision" in changes else config.replace(precision=_faster_precision(config, ranks))
    theirs = done.config().replace(**paths)
    config = theirs.replace(**changes)
    ours, saved = config.to_dict(), theirs.to_dict()
    remedy = "--fresh starts anew with it (the earlier run is moved aside), --dir DIR beside it"
    problems = [
        Problem(name, f"is not what the run in {folder} has: {saved[name]!r}", remedy, ours[name])
        for name in changes
        if ours[name] != saved[name] and name != "training_tokens"
    ]
    if problems:
        raise UserError(problems, "there is a run with other settings")
    return config


def _faster_precision(config: TrainingConfig, ranks: int | None) -> str:
    """Half precision on a GPU; on a CPU what is faster there, which is measured: with matrix units for it a bf16 step
    takes half the time of an fp32 one, and without them three times as long."""
    if torch.cuda.is_available():
        return half_precision()
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, usable_cores() // (ranks or default_ranks(config))))
    try:
        seconds = {name: _seconds_per_step(config, dtype) for name, dtype in types.items()}
    finally:
        torch.set_num_threads(threads)
    faster = min(seconds, key=lambda precision: seconds[precision])
    told = ", ".join(f"{time * 1000:.0f} ms in {precision}" for precision, time in seconds.items())
    _say(f"precision    {faster}: on this CPU a forward and backward of one sequence takes {told}")
    return faster


def _seconds_per_step(config: TrainingConfig, dtype: torch.dtype) -> float:
    """The fastest forward and backward of one sequence, tried for a second."""
    model = LLaMaTransformer(config.replace(vocab_size=DEFAULT_VOCABULARY), None).to(dtype)
    tokens = torch.zeros((1, config.max_seq_len), dtype=torch.int64)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - begun < 1.0:
        started = time.perf_counter()
        model(tokens, tokens).backward()
        times.append(time.perf_counter() - started)
    return min(times)


def _make_data(folder: Path, config: TrainingConfig) -> None:
    tokenizer_path = Path(config.tokenizer_path)
    if tokenizer_path.exists():
        _say(f"tokenizer    {tokenizer_path} exists")
    else:
        tokenizer = train_tokenizer([folder / "corpus"], tokenizer_path)
        _say(f"tokenizer    {tokenizer_path}: {tokenizer.vocab_size:,} tokens, byte-level BPE")
    manifest = encode([folder / "corpus"], tokenizer_path, Path(config.dataset_dir), shard_tokens=1_000_000)
    _say(f"shards       {config.dataset_dir}: {manifest.summary()}")


def _set_aside(folder: Path) -> None:
    """Move an earlier training out of the way; nothing that was saved is deleted."""
    parts = [folder / name for name in ("checkpoints", "tensorboard", "log.csv", "log.png", "log.samples.txt")]
    if existing := [part for part in parts if part.exists()]:
        if (folder / "checkpoints").is_dir():
            other = "wait for its end, or give another --dir"
            hold(folder / "checkpoints" / LOCK, "--dir", str(folder), other).release()
        aside = folder / time.strftime("earlier-%Y%m%d-%H%M%S")
        aside.mkdir()
        for part in existing:
            part.rename(aside / part.name)
        _say(f"the earlier run is kept in {aside}")


def _summarize(folder: Path, config: TrainingConfig, ranks: int, seconds: float) -> int:
    newest = newest_whole(config.ckpt_dir)
    rows = read_log(Path(config.log_file))
    if newest is None or not rows:
        _say(f"there is no finished training in {folder}")
        return 1
    first = float(rows[0]["loss"])
    tail = [float(row["loss"]) for row in rows[-max(1, len(rows) // 10) :]]  # one update's loss is noisy
    last, rate = fmean(tail), median_high(float(row["tokens_per_second"]) for row in rows)
    vocabulary = newest.manifest["vocab_size"]
    train = f"deepspeed --num_gpus {ranks} launch/train.py --config {folder / 'config.yaml'}"
    _say(f"""
loss         {first:.3f} at the start (ln {vocabulary} = {math.log(vocabulary):.3f}), {last:.3f} at the end (mean of \
the last {len(tail)} rows): {first - last:.3f} lower
speed        {readable(rate)} tokens per second (median), {config.precision} on {ranks} ranks, \
ZeRO-{config.zero_stage}
time         {readable_duration(seconds)} for this command
checkpoint   {newest.path}
log          {config.log_file}   plot {Path(config.log_file).with_suffix(".png")}
TensorBoard  {folder / "tensorboard"}   samples {samples_file(Path(config.log_file))}

Next (in .venv/bin, or after `source .venv/bin/activate`):
  generate       dsllama generate --checkpoint {config.ckpt_dir} --prompt "The "
  export         dsllama export --checkpoint {config.ckpt_dir} --out {folder / "hf"}
  train longer   {train} --load_ckpt true --training_tokens {2 * config.training_tokens} --use_prev_scheduler false
  another model  make quickstart ARGS="--dir runs/deeper n_layers=6 max_lr=0.001"
  look closer    tensorboard --logdir {folder / "tensorboard"}""")
    return 0


if __name__ == "__main__":  # what `make` asks after it has installed PyTorch
    try:
        check_torch()
    except UserError as error:
        sys.exit(str(error))
