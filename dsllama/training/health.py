"""Updates that go wrong, and what becomes of them.

    an update whose loss or gradients are not finite, or whose loss is a spike, leaves the weights as they are
      -> it is made again, from the same state with the same samples
           right now           it counts, and the hardware is suspected, aloud
           wrong once more     data or rate are to blame: the policy of its kind (`on_nonfinite_loss` ...)

What was seen so far is saved with each checkpoint, so that a resumed run judges as the one that never stopped would.
The samples that a rollback leaves out are in ckpt_dir too, for a resume from a checkpoint of before.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsllama.config import TrainingConfig
from dsllama.errors import Problem, UserError, of_system
from dsllama.files import write_atomically

SKIPPED_SAMPLES = "skipped_samples.json"
_FEWEST_LOSSES = 16
# Of a normal distribution, the standard deviation is this many times the median distance from the median.
_MAD_TO_DEVIATION = 1.4826
# Where losses hardly vary every one of them seems far off: a deviation is at least this part of the median.
_SMALLEST_DEVIATION = 2e-3


@dataclass(frozen=True)
class Trouble:
    """What is wrong with an update. kind: the end of the name of its policy's field."""

    kind: str
    told: str


class Health:
    """What a run has seen of its losses, and what it has left out. The same on every rank."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.loss_spike_window)
        self.suspicions = self.rollbacks = 0
        # Ranges of samples, first -> one past the last, that no update is made with.
        self.skipped_samples: dict[int, int] = {}
        self._from: Counter[int] = Counter()

    def state_dict(self) -> dict[str, Any]:
        """As it is saved with a checkpoint: plain values."""
        return {
            "losses": list(self.losses), "suspicions": self.suspicions, "rollbacks": self.rollbacks,
            "skipped_samples": sorted(self.skipped_samples.items()),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], noted: Iterable[Note] = ()) -> None:
        """Take up what was saved. noted: what is left out beside that, and which checkpoints were gone back to."""
        self.losses = deque(state.get("losses", ()), maxlen=self.config.loss_spike_window)
        # A rollback brings back what an older checkpoint knew of them.
        for name in ("suspicions", "rollbacks"):
            setattr(self, name, max(getattr(self, name), state.get(name, 0)))
        noted = list(noted)
        self.skipped_samples |= dict(state.get("skipped_samples", ()))
        self.skipped_samples |= {note["first"]: note["last"] + 1 for note in noted}
        self._from = Counter(note["from"] for note in noted)

    @property
    def watches(self) -> bool:
        """Whether spikes are looked for."""
        return self.config.on_loss_spike != "off"

    def policy(self, trouble: Trouble) -> str:
        """What the configuration says to do."""
        found: str = getattr(self.config, f"on_{trouble.kind}")
        return found

    def score(self, loss: float) -> float:
        """A robust z-score: deviations above the median of the window; 0 while there are too few."""
        if len(self.losses) < min(_FEWEST_LOSSES, self.config.loss_spike_window):
            return 0.0
        middle = statistics.median(self.losses)
        spread = _MAD_TO_DEVIATION * statistics.median(abs(each - middle) for each in self.losses)
        return (loss - middle) / max(spread, _SMALLEST_DEVIATION * abs(middle), 1e-12)

    def spike(self, loss: float) -> Trouble | None:
        """Where a loss is further above the others than loss_spike_score: that, in words."""
        if not self.watches or not self.score(loss) > self.config.loss_spike_score:
            return None
        rule = f"{self.score(loss):.1f} deviations above the median of the last {len(self.losses)}"
        return Trouble("loss_spike", f"its loss {loss:.4f} is {rule} ({statistics.median(self.losses):.4f})")

    def goes_back_again(self, update: int) -> bool:
        """Whether there may be a rollback to the checkpoint of an update: not for ever to the same one."""
        return self._from[update] < self.config.max_skipped_updates

    def skip_samples(self, first: int, last: int) -> None:
        """Leave out samples first ... last - 1 from now on."""
        self.skipped_samples[first] = last
        self.rollbacks += 1


# ---------------------------------------------------------------- the samples that are left out, in ckpt_dir


Note = dict[str, Any]
_NOTE = ("first", "last", "from", "data")


def read_skipped(ckpt_dir: Path, source: Path, identity: dict[str, Any]) -> list[Note]:
    """What runs with these data have left out, by `skipped_samples.json`; that of the folder which a run goes on from
    is taken over into ckpt_dir. Raises UserError where there is one that cannot be read: its samples would come back.
    """
    own = _notes(ckpt_dir / SKIPPED_SAMPLES)
    taken = [note for note in _notes(source / SKIPPED_SAMPLES) if note not in own]
    if taken:
        write_atomically(ckpt_dir / SKIPPED_SAMPLES, json.dumps([*own, *taken], indent=1))
    return [note for note in [*own, *taken] if note["data"] == identity]


def note_skipped(ckpt_dir: Path, note: Note) -> None:
    """Write down one more range: first and last sample, update, checkpoint gone back to, why. Raises UserError."""
    path = ckpt_dir / SKIPPED_SAMPLES
    notes = [*_notes(path), note]
    try:
        write_atomically(path, json.dumps(notes, indent=1))
    except OSError as error:
        raise UserError(of_system(error)) from None


def _notes(path: Path) -> list[Note]:
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        if not all(name in note for note in notes for name in _NOTE):
            raise ValueError("an entry lacks one of " + ", ".join(_NOTE))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        remedy = "mend it, or move it away: the samples that it names are trained on again then"
        raise UserError(Problem(str(path), f"cannot be read ({error})", remedy)) from None
    return list(notes)


# ---------------------------------------------------------------- replicas


def differing_replicas(module: torch.nn.Module) -> dict[int, list[str]]:
    """Rank -> parameters whose bits are not those of most ranks; where no value has a majority, all ranks of each.
    Collective; for ZeRO 0 to 2, where every rank holds all weights."""
    named = list(module.named_parameters())
    sums = torch.stack([_checksum(parameter.detach()) for _, parameter in named])
    everywhere = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, sums)
    found: dict[int, list[str]] = {}
    if all(torch.equal(each, sums) for each in everywhere):  # one comparison on the device, as a rule
        return found
    for number, values in enumerate(torch.stack(everywhere).T.tolist()):
        value, count = Counter(values).most_common(1)[0]
        for rank, own in enumerate(values):
            if len(set(values)) > 1 and (own != value or count * 2 <= len(values)):
                found.setdefault(rank, []).append(named[number][0])
    return found


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor's bits; a single one that differs changes it."""
    kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.view(-1).view(kind).sum(dtype=torch.int64)
