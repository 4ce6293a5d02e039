"""What many tests share: a tiny data set, and real launches through the `deepspeed` command."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dsllama.data.tokenizer import Tokenizer, train_tokenizer
from dsllama.training.engine import free_port
from tests.launches import once

if TYPE_CHECKING:
    from tests.campaign import Campaign

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
    "self_test": "off",  # a second for each training; tests/test_selftest.py has it on
}


def environment() -> dict[str, str]:
    """As a user's shell with the virtual environment activated, on a machine without a GPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # One thread: the models are so small that threads would mostly wait for each other.
    quiet = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    # Of a training in this very process.
    ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PATH": path, **quiet}


# A machine may be busy with other things: nothing is called hung before this many seconds.
PATIENCE = 1800.0
_LAST_WORDS_SECONDS = 10.0
# For tests that start processes: retried once, which pytest's summary shows as RERUN.
starts_processes = pytest.mark.flaky(reruns=1)


def run(*command: Any, cwd: Path = REPOSITORY, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
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


def one_clear_screen(captured: Any) -> str:
    """The message on standard error, which must be short and no traceback."""
    assert "Traceback" not in captured.err + captured.out
    assert 0 < len(captured.err.splitlines()) <= 40
    return captured.err


def deepspeed_command(ranks: int, *script: Any) -> list[str]:
    """What a user types to train with `ranks` processes."""
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "-q", "--num_gpus", str(ranks), "--master_port", free_port(), *map(str, script)]


def started_ranks(ranks: int, *words: Any) -> subprocess.CompletedProcess[str]:
    """Python with these words as so many ranks. DeepSpeed's launcher, which the tests of what users type go through,
    takes several seconds more: it imports torch twice before a rank begins."""
    if ranks == 1:
        return run(sys.executable, *words)
    with contextlib.ExitStack() as files:
        common = {"WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        output = files.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
        command = [sys.executable, *map(str, words)]
        started = []
        for rank in range(ranks):
            place = {name: str(value) for name, value in {"RANK": rank, "LOCAL_RANK": rank, **common}.items()}
            started.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=environment() | place, stdout=output, stderr=output)
            )
        deadline = time.monotonic() + PATIENCE
        while (codes := [each.poll() for each in started]) and None in codes and not any(codes):
            assert time.monotonic() < deadline, f"{words} hangs"
            time.sleep(0.05)
        for each in started:  # where one has failed the others may wait for it
            if each.poll() is None:
                time.sleep(_LAST_WORDS_SECONDS)
                each.kill()
        codes = [each.wait() for each in started]
        output.seek(0)
        return subprocess.CompletedProcess(command, max(map(abs, codes)), output.read(), "")


def options(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line words."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


# These take longest; they come first, so that neither worker is left with one of them at the end.
_LONGEST_FIRST = [
    "test_runs",
    "test_topologies",
    "test_quickstart",
    "test_stopping",
    "test_resume",
    "test_journeys",
    "test_encode",
    "test_selftest",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files by what they take, for `--dist loadfile` hands them out in order."""
    places = {name: place for place, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


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

    @classmethod
    def made(cls, root: Path) -> TinyData:
        """8,000 tokens with structure to learn, in ragged shards without a manifest, below `root`; made only once."""

        def make(folder: Path) -> None:
            (folder / "shards").mkdir(parents=True)
            text = folder / "text.txt"
            text.write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on\n" * 50, "utf-8")
            tokenizer = train_tokenizer([text], folder / "tokenizer.json", vocab_size=VOCABULARY)
            steps = np.random.Generator(np.random.PCG64(7)).integers(1, 4, 8000)
            tokens = (np.cumsum(steps) % tokenizer.vocab_size).astype(np.uint16)
            for number, part in enumerate(np.split(tokens, [1, 700, 703, 5000])):
                np.save(folder / "shards" / f"part_{number}.npy", part)

        folder = once(root / "tiny", make)
        parts = [np.load(file) for file in sorted((folder / "shards").glob("*.npy"))]
        return cls(folder / "shards", np.concatenate(parts), Tokenizer.load(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of this test run that both workers see."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_data(shared_folder: Path) -> TinyData:
    """The tiny data set, the same for all tests of a run."""
    return TinyData.made(shared_folder)


@pytest.fixture(scope="session")
def campaign(shared_folder: Path, tiny_data: TinyData) -> Campaign:
    """The tiny trainings that many files look at."""
    from tests.campaign import Campaign

    return Campaign(shared_folder / "campaign", tiny_data)


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
        return {int(row["update"]): float(row["loss"]) for row in self.rows()}

    def checkpoint(self, update: int) -> Path:
        return self.folder / "checkpoints" / f"update_{update:07d}"
