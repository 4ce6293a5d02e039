"""DatasetLoader: the batches of one rank, cut from the one stream that all ranks share.

    position -> sample numbers of this rank -> places in the stream -> rows of tokens -> (x, y) on the device
                                               (permuted if shuffled)   `- a background thread, ahead of the step -'

Sample i of an epoch is tokens [i T, i T + T] of the stream: T inputs and their T targets, one further along. The
last sample of the epoch is short and padded with ignored targets, so every token but the first is a target
exactly once per epoch. The position is one number, `consumed_samples` over all ranks; row j of rank r is
sample consumed + r B + j, and a micro-step of R ranks consumes B R of them. So an update takes the same
samples whatever the number of ranks and the micro-batch, and resuming anywhere costs O(1).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from dsllama.data.order import permute
from dsllama.data.stream import TokenStream, outside_vocabulary
from dsllama.errors import Problem, UserError
from dsllama.model import IGNORE_INDEX

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""x and y, both int64 and (B, T)."""

_PREFETCHED_BATCHES = 4
_PLANNED_SAMPLES = 4096  # permuting one index costs 75 us, permuting 4,096 together 0.1 us each

logger = logging.getLogger("dsllama.data")


class DatasetLoader(AbstractContextManager["DatasetLoader", None]):
    """The batches of one rank.

    batch: B, rows per batch. seq_len: T, tokens per row. process_rank of num_processes: whose rows. dataset_dir:
    folder of `.npy` shards, see TokenStream, or such a stream that is open already. device: where the batches go.
    shuffle: visit the samples in a random order, another one each epoch, keyed by seed.
    validation_tokens: so many at the end of the stream are held out; 0 for none. split: "train" is all but the
    held-out part; "validation" is that part alone, never shuffled.
    vocab_size: ids must lie below it, see TokenStream; checked on every batch.
    tokens_per_update: given, a training part with fewer tokens than one update is refused.

    Attributes: stream; tokens of the part; samples_per_epoch, ceil((tokens - 1) / T); consumed_samples, the
    position: samples that all ranks together have been given. `len()` is the micro-steps of one pass.
    Raises UserError with everything that is wrong with the arguments, or with the data set.
    A thread reads ahead from the first get_batch on, until `close`, the end of a `with`, or of the program.
    """

    def __init__(
        self,
        batch: int,
        seq_len: int,
        process_rank: int,
        num_processes: int,
        dataset_dir: str | Path | TokenStream,
        device: str | torch.device,
        *,
        shuffle: bool = False,
        seed: int = 0,
        validation_tokens: int = 0,
        split: Literal["train", "validation"] = "train",
        vocab_size: int | None = None,
        tokens_per_update: int | None = None,
    ):
        _check_arguments(batch, seq_len, process_rank, num_processes, device, split)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # The device as it is meant now, by this thread: another thread's current device may be another.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = dataset_dir if isinstance(dataset_dir, TokenStream) else TokenStream(dataset_dir, vocab_size)
        _check_sizes(self.stream, seq_len, validation_tokens, split, tokens_per_update)
        training_tokens = self.stream.tokens - validation_tokens
        self.tokens = training_tokens if split == "train" else validation_tokens
        self.consumed_samples = 0

        self._identity: dict[str, Any] = {
            "fingerprint": self.stream.fingerprint,
            "split": split,
            "validation_tokens": validation_tokens,
            "seq_len": seq_len,
            "shuffle": shuffle,
            "seed": seed,
        }
        self._is_first_rank = process_rank == 0
        self._batches = _Batches(
            self.stream,
            start=0 if split == "train" else training_tokens,
            tokens=self.tokens,
            batch=batch,
            seq_len=seq_len,
            rank=process_rank,
            ranks=num_processes,
            seed=seed if shuffle and split == "train" else None,
            pinned=self.device.type == "cuda",
        )
        self.samples_per_epoch = self._batches.samples
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()

    def __len__(self) -> int:
        """Micro-steps in which all ranks together pass over the part once; the last may not be full."""
        return -(-self.samples_per_epoch // self._batches.global_micro_batch)

    def get_batch(self) -> Batch:
        """The next batch: x and y, int64, each (B, T) and contiguous, on the device; y is x one token on.

        Where the epoch's last sample is short, x is padded with 0 and y with IGNORE_INDEX.
        Raises UserError, with file and place, for an id outside the vocabulary or a file that has gone.
        """
        if self._ahead and self._ahead[0][0] != self.consumed_samples:
            # A state was loaded, or Ctrl-C came between taking a batch and counting it: what was read ahead is stale.
            self.close()
        if self._reader is None:
            # Without its device, pinned memory would open a context on GPU 0, for every rank.
            prepare = {"initializer": torch.cuda.set_device, "initargs": (self.device,)}
            self._reader = ThreadPoolExecutor(1, "dsllama-prefetch", **(prepare if self.device.type == "cuda" else {}))
        while len(self._ahead) <= _PREFETCHED_BATCHES:
            position = self.consumed_samples + len(self._ahead) * self._batches.global_micro_batch
            self._ahead.append((position, self._reader.submit(self._batches.batch_at, position)))
        try:
            batch = self._ahead.popleft()[1].result()
        except Exception:
            self.close()
            raise
        self._announce_epoch()
        self.consumed_samples += self._batches.global_micro_batch
        return self._to_device(batch)

    def validation_batches(self) -> Iterator[Batch]:
        """One pass over the held-out part from its start, wherever get_batch is; for split="validation".

        Every rank yields len(self) batches, so that collective operations stay in step. Rows beyond the part's
        end have only ignored targets, perhaps a whole batch: sum the losses and divide by the number of targets.
        """
        assert self._identity["split"] == "validation", "validation_batches is for split='validation'"
        for step in range(len(self)):
            yield self._to_device(self._batches.batch_at(step * self._batches.global_micro_batch, once=True))

    def first_sequence(self) -> Batch:
        """The first sequence of the stream: x and y of (1, seq_len), int64, on the CPU; moves no position."""
        return self._batches.gather(np.zeros(1, dtype=np.int64))

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in; plain values. Batches that were only read ahead do not count."""
        return {"consumed_samples": self.consumed_samples, **self._identity}

    @property
    def identity(self) -> dict[str, Any]:
        """What a position is a position in."""
        return self._identity

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position; the number of ranks, the micro-batch and the folder may be others now.

        Raises UserError with each value that differs where it must not: then the position means other samples.
        """
        if missing := self.state_dict().keys() - state.keys():
            rule = f"lacks {', '.join(sorted(missing))}"
            raise UserError(Problem("data position", rule, "resume from another checkpoint"), _RESUME)
        saved = "the position was saved with {!r}, this run has {!r}"
        problems = [
            Problem(name, saved.format(state[name], value), _REMEDIES.get(name, "set it as it was, or start a new run"))
            for name, value in self._identity.items()
            if state[name] != value
        ]
        if problems:
            raise UserError(problems, _RESUME)
        self.consumed_samples = int(state["consumed_samples"])

    def close(self) -> None:
        """Stop reading ahead and end the thread. A later get_batch goes on from the same position."""
        self._ahead.clear()
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def _to_device(self, batch: Batch) -> Batch:
        # The pinned sources may be dropped at once: torch's allocator keeps their memory until it has been read.
        x, y = batch
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _announce_epoch(self) -> None:
        """Say so, once, when the micro-step to be delivered holds the first sample of a pass after the first."""
        epoch = (self.consumed_samples + self._batches.global_micro_batch - 1) // self.samples_per_epoch
        first = epoch * self.samples_per_epoch
        if epoch == 0 or first < self.consumed_samples or self._identity["split"] != "train" or not self._is_first_rank:
            return
        logger.warning(
            f"epoch {epoch + 1} begins at sample {first:,}: the data set's {self.tokens:,} tokens are seen again"
        )


@dataclass(eq=False)
class _Batches:
    """The batches of one rank as a pure function of the position: what the thread reads and the loader gives out.

    start, tokens: the part of the stream. batch, seq_len: B and T. seed: of the order; None for the stream's own.
    samples: in one pass over the part. global_micro_batch: samples that all ranks together consume in a micro-step.
    """

    stream: TokenStream
    start: int
    tokens: int
    batch: int
    seq_len: int
    rank: int
    ranks: int
    seed: int | None
    pinned: bool

    def __post_init__(self) -> None:
        self.samples = -(-(self.tokens - 1) // self.seq_len)
        self.global_micro_batch = self.batch * self.ranks
        # Not far beyond an epoch, because each epoch has an order of its own to set up.
        self._planned = max(1, min(_PLANNED_SAMPLES // self.batch, self.samples // self.global_micro_batch))
        # Not an lru_cache of the method, whose circle would keep the shards open until the next garbage collection.
        self._plan: tuple[Any, npt.NDArray[np.int64]] = None, np.empty(0, np.int64)

    def batch_at(self, position: int, once: bool = False) -> Batch:
        """The rows of the micro-step that begins with this sample.

        once: after the last sample, rows without targets instead of another epoch.
        """
        step = position // self.global_micro_batch % self._planned
        plan, which = self._plan, (position - step * self.global_micro_batch, once)
        if plan[0] != which:
            plan = self._plan = which, self._offsets(*which)
        return self.gather(plan[1][step])

    def _offsets(self, position: int, once: bool) -> npt.NDArray[np.int64]:
        """Where in the part each row of the micro-steps from a position on begins: (planned steps, B)."""
        first_row = position + self.rank * self.batch
        numbers = np.add.outer(first_row + np.arange(self._planned) * self.global_micro_batch, np.arange(self.batch))
        if once:
            return np.minimum(numbers * self.seq_len, self.tokens - 1)
        epochs, samples = np.divmod(numbers, self.samples)
        if self.seed is not None:
            for epoch in np.unique(epochs).tolist():
                samples[epochs == epoch] = permute(samples[epochs == epoch], self.samples, self.seed, epoch)
        return samples * self.seq_len

    def gather(self, offsets_B: npt.NDArray[np.int64]) -> Batch:
        """The rows that begin at these tokens of the part, in memory of their own."""
        batch, length = len(offsets_B), self.seq_len
        first, last = int(offsets_B[0]), int(offsets_B[-1])
        in_order = self.seed is None or batch == 1
        if in_order and last - first == (batch - 1) * length and last + length < self.tokens:
            # They follow each other in the stream and none is short: without a copy, as a row's last token is the next
            # row's first.
            flat = self.stream.read(self.start + first, self.start + last + length + 1)
            rows = np.ndarray((batch, length + 1), flat.dtype, flat, strides=(length * flat.itemsize, flat.itemsize))
        else:
            rows = np.zeros((batch, length + 1), self.stream.dtype)  # which stay 0 where the part has ended
            for row, offset in zip(rows, offsets_B.tolist(), strict=True):
                stop = min(offset + length + 1, self.tokens)
                row[: stop - offset] = self.stream.read(self.start + offset, self.start + stop)
        if (outside := outside_vocabulary(rows, self.stream.vocab_size)) is not None:
            row, column = np.unravel_index(int(outside.argmax()), outside.shape)
            position = self.start + int(offsets_B[row]) + int(column)
            raise UserError(self.stream.vocabulary_problem(position), "the data set cannot be used")
        # Two casts, not one with x and y as views on it: 0.5 ns more per token, far below a thousandth of a step,
        # and whoever changes x in place does not change y.
        tokens = torch.empty((2, *offsets_B.shape, length), dtype=torch.int64, pin_memory=self.pinned)
        x, y = tokens.numpy()
        x[...] = rows[:, :-1]
        y[...] = rows[:, 1:]
        for row in np.flatnonzero(offsets_B + length >= self.tokens):
            targets = self.tokens - 1 - int(offsets_B[row])
            x[row, targets:], y[row, targets:] = 0, IGNORE_INDEX
        return tokens[0], tokens[1]


_TITLE = "the data loader cannot start"
_RESUME = "the data cannot go on from this position"
_REMEDIES = {"fingerprint": "this is not the data set that the run was trained on: give that one, or start a new run"}


def _check_arguments(
    batch: int, seq_len: int, process_rank: int, num_processes: int, device: str | torch.device, split: str
) -> None:
    at_least_one = {"batch": batch, "seq_len": seq_len, "num_processes": num_processes}
    problems = [Problem(name, "must be at least 1", value=value) for name, value in at_least_one.items() if value < 1]
    if not 0 <= process_rank < max(1, num_processes):
        rule = f"must be from 0 to num_processes - 1 = {num_processes - 1}"
        problems.append(Problem("process_rank", rule, value=process_rank))
    if split not in ("train", "validation"):
        problems.append(Problem("split", "must be 'train' or 'validation'", value=split))
    try:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            problems.append(Problem("device", "this machine or this PyTorch has no CUDA", "give 'cpu'", str(device)))
    except RuntimeError:
        problems.append(Problem("device", "PyTorch knows no such device", "give 'cuda' or 'cpu'", str(device)))
    if problems:
        raise UserError(problems, _TITLE)


def _check_sizes(
    stream: TokenStream, seq_len: int, validation_tokens: int, split: str, tokens_per_update: int | None
) -> None:
    """A part needs an input and a target; the training part must also last for one update."""
    problems = []
    training_tokens = stream.tokens - validation_tokens
    if validation_tokens < 0 or validation_tokens == 1:
        problems.append(Problem("validation_tokens", "must be 0, for none, or at least 2", value=validation_tokens))
    elif split == "validation" and validation_tokens == 0:
        problems.append(Problem("validation_tokens", "nothing is held out for validation", "set it to at least 2", 0))
    if training_tokens < 2 and validation_tokens == 0:
        rule = f"holds {stream.tokens} token; an input and its target are two"
        problems.append(Problem("dataset_dir", rule, "encode more text", str(stream.dataset_dir)))
    elif training_tokens < 2:
        rule = f"leaves {max(0, training_tokens):,} of {stream.tokens:,} tokens to train on; at least 2 are needed"
        remedy = f"hold out at most {stream.tokens - 2:,}" if stream.tokens >= 4 else "encode more text"
        problems.append(Problem("validation_tokens", rule, remedy, validation_tokens))
    elif tokens_per_update is not None and -(-(training_tokens - 1) // seq_len) * seq_len < tokens_per_update:
        held_out = f" without the {validation_tokens:,} held out" if validation_tokens else ""
        rule = f"the data set is smaller than one update: {training_tokens:,} tokens{held_out} in {stream.dataset_dir}"
        remedy = "encode more text, or take smaller updates"
        problems.append(Problem("tokens_per_update", rule, remedy, tokens_per_update))
    if problems:
        raise UserError(problems, _TITLE)
