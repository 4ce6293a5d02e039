"""A training that lingers in one of its phases, so that a test can interrupt it there.

    deepspeed --module tests.phases "evaluating" FILE the words of a training

Where the phase begins, the first rank makes FILE, and every rank waits for three seconds.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SECONDS = 3.0
_TRAINER, _SAVER = "dsllama.training.trainer:Trainer.", "dsllama.training.saving:"
# Where each begins, and what a training needs to come there; "" for a function that is called at any update.
PHASES: dict[str, tuple[str, dict[str, Any]]] = {
    "testing itself": ("dsllama.selftest:of_run", {"self_test": "auto"}),
    "building the engine": ("dsllama.training.engine:build", {}),
    "in its first update": (f"{_TRAINER}train_one_update", {}),
    "waiting for data": ("dsllama.data.loader:DatasetLoader.get_batch", {}),
    "in forward": ("dsllama.model:LLaMaTransformer.forward", {}),
    "evaluating": (f"{_TRAINER}_evaluate", {"validation_tokens": "1K", "eval_interval": 5}),
    "sampling": (f"{_TRAINER}_sample", {"sample_prompts": ["the"], "sample_tokens": 4, "eval_interval": 5}),
    "copying for a save": (f"{_SAVER}Saver.begin", {"token_ckpt": 5 * 256}),
    "writing a save": (f"{_SAVER}_Save._run", {"token_ckpt": 5 * 256}),
    "writing DeepSpeed's files": (
        f"{_SAVER}Saver._write_the_engines",
        {"token_ckpt": 5 * 256, "checkpoint_format": "deepspeed"},
    ),
    "publishing": (f"{_SAVER}_publish", {"token_ckpt": 5 * 256}),
    "in its last update": (f"{_TRAINER}train_one_update", {"training_tokens": 12 * 256}),
    "ending": (f"{_TRAINER}_summarize", {"training_tokens": 12 * 256}),
}
BEFORE_THE_FIRST_UPDATE = ("testing itself", "building the engine", "in its first update")
AFTER_THE_LAST = ("in its last update", "ending")
# Calls that are let pass: then updates have been made.
_PASSED = {"waiting for data": 40, "in forward": 40, "in its last update": 11}


def lingering(phase: str, file: Path) -> None:
    """Have this process wait where the phase begins, once."""
    place, _ = PHASES[phase]
    module, _, names = place.partition(":")
    *owners, name = names.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def waits(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == _PASSED.get(phase, 0) + 1:
            file.touch()
            time.sleep(SECONDS)
        return function(*arguments, **options)

    setattr(owner, name, waits)


def rank(argv: Sequence[str], lingers: Callable[[str, Path], None] = lingering) -> None:
    """What the launcher starts."""
    from dsllama.training import stopping

    stop = stopping.StopRequest()
    from dsllama.training import run

    words = [word for word in argv if not word.startswith("--local_rank")]
    lingers(words[0], Path(words[1]))
    run.exit_process(run.main(words[2:], stop))


if __name__ == "__main__":
    rank(sys.argv[1:])
