"""What many tests share: a tiny data set, and real launches through the `deepspeed` command."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsllama.data.tokenizer import Tokenizer, train_tokenizer
from dsllama.training.engine import free_port

# A shell starts what it puts in the background with SIGINT ignored, and children inherit that: Ctrl-C could not be
# tested there.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY = 384

# A model that is small in every direction; 256 tokens an update divide among 1 or 2 ranks and micro-batches of 1 to 4.
TINY = {
    "batch_size": 2,
    "max_seq_len": 32,
    "tokens_per_update": 256,
    "n_embd": 32,
    "n_heads": 4,
    "n_layers": 2,
    "multiple_of": 16,
    "warmup_iterations": 4,
    "max_lr": 0.01,
    "min_lr": 0.001,
    "training_tokens": 20 * 256,
    "token_ckpt": 10 * 256,
    "sample_prompts": [],
    "precision": "fp32",
}


def environment() -> dict[str, str]:
    """As a user's shell with the virtual environment activated, on a machine without a GPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # One thread: the models are so small that threads would mostly wait for each other.
    quiet = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    return {**os.environ, "PATH": path, **quiet}


def run(*command: Any, cwd: Path = REPOSITORY, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would; its output is in .stdout and .stderr."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(),
        timeout=timeout,
        text=True,
        capture_output=True,
        check=False,
    )


def deepspeed_command(ranks: int, *script: Any) -> list[str]:
    """What a user types to train with `ranks` processes."""
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "-q", "--num_gpus", str(ranks), "--master_port", free_port(), *map(str, script)]


def options(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line words."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors on one thread: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class TinyData:
    """A folder of plain shards, the same tokens as one array, and a tokenizer."""

    folder: Path
    tokens: np.ndarray
    tokenizer: Tokenizer

    @property
    def settings(self) -> dict[str, Any]:
        return {**TINY, "dataset_dir": str(self.folder), "tokenizer_path": str(self.tokenizer.path)}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """8,000 tokens with structure to learn, in ragged shards without a manifest."""
    root = tmp_path_factory.mktemp("tiny")
    text = root / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on\n" * 50, encoding="utf-8")
    tokenizer = train_tokenizer([text], root / "tokenizer.json", vocab_size=VOCABULARY)
    generator = np.random.Generator(np.random.PCG64(7))
    steps = generator.integers(1, 4, 8000)
    tokens = (np.cumsum(steps) % tokenizer.vocab_size).astype(np.uint16)
    folder = root / "shards"
    folder.mkdir()
    for number, part in enumerate(np.split(tokens, [1, 700, 703, 5000])):
        np.save(folder / f"part_{number}.npy", part)
    return TinyData(folder, tokens, tokenizer)


@dataclass(frozen=True)
class Run:
    """One training run in a folder of its own."""

    folder: Path
    settings: dict[str, Any]

    def words(self) -> list[str]:
        places = {"ckpt_dir": self.folder / "checkpoints", "log_file": self.folder / "log.csv"}
        return options({**self.settings, **places})

    def rows(self) -> list[dict[str, str]]:
        with (self.folder / "log.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def losses(self) -> dict[int, float]:
        return {int(row["step"]): float(row["loss"]) for row in self.rows()}

    def checkpoint(self, update: int) -> Path:
        return self.folder / "checkpoints" / f"update_{update:07d}"


def launch_all(runs: list[Run], ranks: int) -> None:
    """All runs in one real launch; fails with the launcher's output if one of them fails."""
    plan = runs[0].folder.parent / f"plan_{runs[0].folder.name}_{ranks}.json"
    plan.write_text(json.dumps([run.words() for run in runs]), encoding="utf-8")
    result = run(*deepspeed_command(ranks, REPOSITORY / "tests" / "launched.py", plan))
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
