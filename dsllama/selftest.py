"""Whether an engine of these very settings trains as plain PyTorch does: a proof, before anything long begins.

    a reduced model of the run (training/reduced.py), the run's own DeepSpeed JSON
      -> 3 updates, each beside a plain loop (training/plain.py) that begins with the engine's own state before it
      -> saved, loaded into a fresh engine, a 4th update (compiled, where the run is)
      -> what deviates by more than its limit (training/beside.py), by part; then which setting is to blame

    dsllama selftest --config c.yaml                                     one rank
    deepspeed --num_gpus 2 --module dsllama.selftest --config c.yaml     several

A run asks for it before its first update (`self_test: auto`). What has passed is kept, for these settings and versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsllama import console
from dsllama.checkpoint.catalog import timestamp
from dsllama.checkpoint.retention import SELF_TEST
from dsllama.config import TrainingConfig
from dsllama.deepspeed_config import deepspeed_config, engine_lines
from dsllama.derived import Derived, derive
from dsllama.errors import EXIT_USER_ERROR, Problem, UserError
from dsllama.files import digest, write_atomically
from dsllama.machine import versions
from dsllama.training import checkpoint as checkpoints
from dsllama.training import engine as deepspeed_engine
from dsllama.training import run, stopping, swap
from dsllama.training.beside import Finding, examine
from dsllama.training.engine import World
from dsllama.training.reduced import Subject, reduced
from dsllama.training.saving import all_or_none

Json = dict[str, Any]
# Time for the search for the setting that is to blame.
_SEARCH_SECONDS = 120.0
_MODEL = ("n_layers", "n_embd", "n_heads", "n_kv_heads", "multiple_of", "eps", "theta", "tie_embeddings", "vocab_size")
_HOW = ("max_seq_len", "use_flash_attention", "activation_checkpointing", "enable_compilation", "checkpoint_format")


def of_run(
    config: TrainingConfig, derived: Derived, ds_config: Json, world: World, earlier: Json | None = None
) -> tuple[Json, str]:
    """A run's verdict, and what its head says of it; what is known (earlier: by the checkpoint that the run goes on
    from) is not tested again. Collective. Raises UserError as `verdict_on`."""
    if config.self_test == "off":
        return {"result": "off"}, "self-test    off (self_test): nothing has shown that these settings train rightly"
    if reason := untestable(ds_config):
        return {"result": "none"}, reason
    subject = reduced(config, derived, ds_config)
    known = None
    if world.is_main:
        key = key_of(subject, world)
        known = earlier if earlier and earlier.get("key") == key else _kept(key)
    known = world.tell(known)
    if known is not None:
        return known, f"{summary(known)}; known since {known['at']}"
    if config.enable_compilation:
        world.say(f"self-test    compiles {_model(subject)}, which may take a minute")
    verdict = verdict_on(subject, world, Path(config.ckpt_dir))
    if world.is_main:
        _keep(verdict)
    return verdict, summary(verdict)


def untestable(ds_config: Json) -> str:
    """Why these settings have no expected result, as a line of the head; empty where they have one."""
    zero = ds_config["zero_optimization"]
    if zero.get("zero_hpz_partition_size", 1) > 1:
        return "self-test    none: DeepSpeed can build one engine of zero_hpz_partition_size in a process"
    quantized = [name for name in ("zero_quantized_gradients", "zero_quantized_weights") if zero.get(name)]
    return f"self-test    none: {' and '.join(quantized)} round by design, past all limits" if quantized else ""


def verdict_on(subject: Subject, world: World, ckpt_dir: Path, search: bool = True) -> Json:
    """What the test came to, for a manifest. Collective.

    result: "passed" or "failed"; worst: the finding nearest its limit, or farthest beyond; failed: those beyond, of the
    first update that has any; blame: the settings without which it passes (search: looked for); seconds.
    Raises UserError, on every rank, where DeepSpeed builds no engine, or folders cannot be written.
    """
    began, drawn = time.perf_counter(), checkpoints.random_state(world)
    findings = _examine_aside(subject, world, ckpt_dir)
    failed = [finding for finding in findings if finding.ratio > 1]
    failed = [finding for finding in failed if finding.update == failed[0].update]
    blame, untried = [], []
    for name, simpler in subject.switches() if failed and search else ():
        if world.tell(time.perf_counter() - began > _SEARCH_SECONDS):
            untried.append(name)
            continue
        with contextlib.suppress(UserError):  # DeepSpeed builds no engine of that
            if all(finding.ratio <= 1 for finding in _examine_aside(simpler, world, ckpt_dir)):
                blame.append(name)
    checkpoints.restore_random_state(drawn, world)
    worst = max(findings, key=lambda finding: finding.ratio)
    return {
        "result": "failed" if failed else "passed",
        "key": key_of(subject, world),
        "model": _model(subject),
        "worst": {**dataclasses.asdict(worst), "ratio": worst.ratio},
        "failed": [dataclasses.asdict(finding) for finding in failed],
        "blame": blame,
        "untried": untried,
        "seconds": world.tell(time.perf_counter() - began),
        "at": timestamp(),
    }


def _examine_aside(subject: Subject, world: World, ckpt_dir: Path) -> list[Finding]:
    """`examine` with folders of its own; ranks on several hosts have none in common but ckpt_dir."""
    name = f"{SELF_TEST}-{world.tell(uuid.uuid4().hex[:8])}"
    on_one_host = deepspeed_engine.local_size() == world.size
    folder = Path(world.tell(tempfile.gettempdir() if on_one_host else str(ckpt_dir))) / name
    try:
        with all_or_none(world):
            if world.is_main:
                folder.mkdir(parents=True)
                stopping.LEFTOVERS.add(folder)
        place = subject.config.nvme_path
        with swap.own_folder(Path(place) if place else None, world) as own:
            return examine(subject.but(nvme_path=own and str(own)), world, folder)
    except OSError as error:  # on every rank
        remedy = "make room and give permission there (TMPDIR names another place), or switch self_test off"
        raise UserError(Problem("self_test", f"could not write what it needs: {error}", remedy)) from None
    except UserError as error:
        hint = "it is the self-test's reduced model that meets with it, and --self_test off goes without"
        found = [dataclasses.replace(each, remedy=f"{each.remedy}; {hint}") for each in error.problems]
        raise UserError(found, error.title) from None
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _model(subject: Subject) -> str:
    return f"{subject.config.n_layers} layers of {subject.config.n_embd}"


def key_of(subject: Subject, world: World) -> str:
    """What a verdict holds for: these settings, on this kind of device, with these versions and this code."""
    ds_config, code = subject.json, hashlib.sha256()
    for part in ds_config["zero_optimization"].values():
        if isinstance(part, dict):
            part.pop("nvme_path", None)
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    settings = {name: getattr(subject.config, name) for name in (*_MODEL, *_HOW)}
    return digest([settings, ds_config, world.size, device, versions(), code.hexdigest()])


def summary(verdict: Json) -> str:
    """For people: a line where all is well, else a table."""
    worst, model, took = verdict["worst"], verdict["model"], f"{verdict['seconds']:.1f} s"
    if verdict["result"] == "passed":
        where = worst["what"] if worst["part"] == "all" else f"{worst['what']} of {worst['part']}"
        largest = f"largest deviation {worst['deviation']:.1e}, {worst['ratio']:.2g} of its limit ({where})"
        return f"self-test    passed: {model} train as in plain PyTorch under these settings; {largest}; {took}"
    rows = [["what", "part", "expected", "found", "factor", "deviation", "limit"]]
    for each in sorted(verdict["failed"], key=lambda each: -each["deviation"]):
        numbers = [f"{each[name]:.6g}" for name in ("expected", "found", "factor")]
        rows.append([each["what"], each["part"], *numbers, *(f"{each[name]:.1e}" for name in ("deviation", "limit"))])
    update = verdict["failed"][0]["update"]
    lines = [f"self-test    FAILED: {model} do not train as in plain PyTorch under these settings; {took}"]
    lines += [f"             {row}" for row in console.table(rows)]
    lines.append(f"             at update {update}; each begins with the engine's own state")
    blame = [f"it passes without {name}" for name in verdict["blame"]] or ["no setting alone"]
    lines.append(f"to blame     {', and '.join(blame)}; --self_test off would train all the same")
    if verdict["untried"]:
        lines.append(f"             (no time was left to try without {', '.join(verdict['untried'])})")
    return "\n".join(lines)


def _kept_in() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsllama" / "selftest"


def _kept(key: str) -> Json | None:
    try:
        verdict: Json = json.loads((_kept_in() / f"{key[-64:]}.json").read_text(encoding="utf-8"))
        sound = verdict["result"] == "passed" and verdict["key"] == key and isinstance(verdict["at"], str)
        return verdict if sound and summary(verdict) else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the last one: a user without a home
        return None


def _keep(verdict: Json) -> None:
    if verdict["result"] == "passed":
        with contextlib.suppress(OSError, RuntimeError):  # what cannot be kept is tested again
            _kept_in().mkdir(parents=True, exist_ok=True)
            write_atomically(_kept_in() / f"{verdict['key'][-64:]}.json", json.dumps(verdict))


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str]) -> int:
    """`test` on every rank of a launch, from the command line; returns the exit code."""
    console.settle()
    rank, ranks = deepspeed_engine.world_from_environment()
    try:
        config = run.parse(argv, "deepspeed --module dsllama.selftest", "Prove a configuration.")
        return test(config, rank, ranks)
    except UserError as error:
        return run.complain(str(error), rank, EXIT_USER_ERROR)


def test(config: TrainingConfig, rank: int = 0, ranks: int = 1) -> int:
    """Test a configuration, whatever is known of it; returns the exit code. Collective. Raises UserError."""
    vocab_size, _ = run.vocabulary_so_far(config)
    derived = derive(config, ranks, vocab_size)
    ds_config = deepspeed_config(config, derived, deepspeed_engine.accelerator())
    if problems := deepspeed_engine.unsupported_here(config, ds_config):
        raise UserError(problems)
    world = deepspeed_engine.start(rank, ranks)
    world.say("\n".join(engine_lines(config, ds_config)))
    told, code = untestable(ds_config), 0
    if not told:
        verdict = verdict_on(reduced(config, derived, ds_config), world, Path(config.ckpt_dir))
        told, code = summary(verdict), run.EXIT_FAILED if verdict["failed"] else 0
        if world.is_main:
            _keep(verdict)
    world.say(told)
    return code


if __name__ == "__main__":
    run.exit_process(main(sys.argv[1:]))
