"""What a run says: the same row to the console, the CSV file and TensorBoard, and a plot of the whole.

Only the main rank reports. Rows of an earlier attempt that lie after the update that a run resumes from are moved to
`<log_file>.superseded`, so that the log has one row per update and nothing is lost. Each run that starts anew has a
folder of its own for TensorBoard, NAME-1, NAME-2 ... after the log file; a resumed run goes on in the newest.
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path

from dsllama.errors import Problem, UserError, remedy_for
from dsllama.scheduler import SCHEDULES, Scheduler, learning_rate
from dsllama.sizes import readable, readable_duration


@dataclass(frozen=True)
class Row:
    """One logged update. Tokens are over all ranks; time in seconds since this process began to train."""

    update: int
    progress: float
    loss: float
    perplexity: float
    learning_rate: float
    grad_norm: float | None
    tokens_run: int
    tokens_total: int
    tokens_per_second: float
    time: float
    mfu: float | None = None
    memory_gib: float | None = None
    validation_loss: float | None = None
    skipped_updates: int = 0
    # Of the saves that were published since the last row: for how long training stood still, all of it, and the rate.
    save_stall: float | None = None
    save_seconds: float | None = None
    save_mb_per_second: float | None = None
    # Of the whole run: rollbacks to a checkpoint, and updates that came out otherwise when they were made again.
    rollbacks: int = 0
    suspicions: int = 0

    def line(self, updates: int, eta_seconds: float) -> str:
        """The row as the console shows it."""
        parts = [
            f"{self.update:>{len(str(updates))}}/{updates}",
            f"{self.progress:6.1%}",
            f"loss {self.loss:.4f}",
            f"ppl {self.perplexity:,.5g}",
            f"lr {self.learning_rate:.3e}",
            f"norm {'-' if self.grad_norm is None else format(self.grad_norm, '.3f')}",
            f"tokens {readable(self.tokens_total)}",
            f"{readable(self.tokens_per_second)} tok/s",
        ]
        parts += [f"mfu {self.mfu:.1%}"] if self.mfu is not None else []
        parts += [f"{self.memory_gib:.1f} GiB"] if self.memory_gib is not None else []
        parts += [f"val {self.validation_loss:.4f}"] if self.validation_loss is not None else []
        counted = {"skipped": self.skipped_updates, "rollbacks": self.rollbacks, "suspicions": self.suspicions}
        parts += [f"{what} {count}" for what, count in counted.items() if count]
        return " | ".join([*parts, f"eta {readable_duration(eta_seconds)}"])


COLUMNS = [field.name for field in fields(Row)]
_FEWEST_COLUMNS = COLUMNS.index("time") + 1
_EVENTS = "TensorBoard's events"
_PLACES = ("update", "progress", "tokens_run", "tokens_total", "time")  # of a row: TensorBoard draws the rest there


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class Report:
    """Where the rows go. `resumed_from`: the update of the checkpoint that the run went on from, 0 for none."""

    def __init__(self, log_file: Path, tensorboard_dir: Path, resumed_from: int, resumed_tokens: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        _split_log(log_file, resumed_from)
        self._file = log_file.open("a", newline="", encoding="utf-8", buffering=1)
        self._csv = csv.DictWriter(self._file, COLUMNS)
        events = events_folder(tensorboard_dir, log_file, bool(resumed_from))
        self._failing: set[str] = set()
        # Its thread dies of a full disk, which is said below; then there is another one, in the same folder.
        self._new_events = partial(SummaryWriter, str(events))
        # purge_step hides what an earlier attempt wrote beyond the point that we go on from.
        self._events = self._new_events(purge_step=resumed_tokens + 1 if resumed_from else None)
        self._aloud = aloud = threading.excepthook
        threading.excepthook = lambda error: None if isinstance(error.exc_value, OSError) else aloud(error)

    def row(self, row: Row, updates: int, eta_seconds: float) -> None:
        """Write one row everywhere."""
        print(row.line(updates, eta_seconds), flush=True)
        cells = asdict(row)
        # repr keeps a float to the bit, so that logs of two runs can be compared exactly.
        exact = {name: repr(value) if isinstance(value, float) else value for name, value in cells.items()}
        with self._surviving(f"the log {self.log_file}"):
            self._csv.writerow(exact)
        with self._surviving(_EVENTS):
            for name, value in cells.items():
                if value is not None and name not in _PLACES:
                    self._events.add_scalar(f"train/{name}", value, row.tokens_total)

    def sample(self, update: int, tokens: int, texts: list[str]) -> None:
        """Show generated text, and keep it beside the log and in TensorBoard."""
        for text in texts:
            print(f"--- sample after update {update} ---\n{text}\n---", flush=True)
            with self._surviving(_EVENTS):
                self._events.add_text("sample", text.replace("\n", "  \n"), tokens)
        name = samples_file(self.log_file)
        with self._surviving(str(name)), name.open("a", encoding="utf-8") as file:
            file.writelines(f"=== update {update}, {tokens} tokens ===\n{text}\n\n" for text in texts)

    def plot(self, checkpoints: Sequence[int] = ()) -> None:
        """Draw loss and learning rate of all rows so far. checkpoints: in tokens."""
        with self._surviving(_EVENTS):
            self._events.flush()
        with self._surviving("the plot"):
            plot_log(self.log_file, checkpoints)

    def close(self) -> None:
        """Flush and close the files."""
        with self._surviving(f"the log {self.log_file}"):
            self._file.close()
        with self._surviving(_EVENTS):
            self._events.close()
        threading.excepthook = self._aloud

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """A full disk is no reason to end a run: it is said once, and what is reported is tried again."""
        try:
            yield
            self._failing.discard(what)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._events = self._new_events() if what == _EVENTS else self._events
            if what not in self._failing:
                print(f"WARNING: {what} cannot be written ({error.strerror or error}); the run goes on", flush=True)
            self._failing.add(what)


def events_folder(tensorboard_dir: Path, log_file: Path, resumed: bool) -> Path:
    """Where a run's events go: a new folder, or the newest that is there where the run is resumed."""
    pattern = re.compile(re.escape(log_file.stem) + r"-(\d+)")
    found = [pattern.fullmatch(path.name) for path in tensorboard_dir.glob("*") if path.is_dir()]
    newest = max((int(match[1]) for match in found if match), default=0)
    return tensorboard_dir / f"{log_file.stem}-{max(1, newest if resumed else newest + 1)}"


def samples_file(log_file: Path) -> Path:
    """Where the generated samples of a run are kept."""
    return log_file.with_suffix(".samples.txt")


def read_log(log_file: Path) -> list[dict[str, str]]:
    """The rows of a log, as text by column; [] without a log. Rows that are none of ours are left out."""
    return [row for row in _rows(log_file) if _is_sound(row)]


csv.field_size_limit(2**31 - 1)  # a crash of the machine may leave a line of any length


def _rows(log_file: Path) -> list[dict[str, str]]:
    if not log_file.exists():
        return []
    with log_file.open(newline="", encoding="utf-8", errors="replace") as file:
        # A NUL, which a crash of the machine may leave, is an error to the reader.
        return list(csv.DictReader(line.replace("\0", "") for line in file))


def _is_sound(row: dict[str, str]) -> bool:
    """Whether a row is whole: one that a crash cut short lacks cells or runs into the next, one may be edited."""
    try:
        int(row["update"]), int(row["tokens_total"]), float(row["loss"]), float(row["learning_rate"])
        float(row["tokens_per_second"]), float(row["validation_loss"] or 0)
    except (KeyError, TypeError, ValueError):
        return False
    return None not in row and None not in row.values()


def plot_log(log_file: Path, checkpoints: Sequence[int] = ()) -> Path:
    """The loss and the learning rate of a log, against tokens, as a PNG beside it; checkpoints: in tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = read_log(log_file)
    tokens, losses = [int(row["tokens_total"]) for row in rows], [float(row["loss"]) for row in rows]
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    loss_axes.plot(tokens, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training")
    loss_axes.plot(tokens, smoothed(losses), color="tab:blue", label="training, smoothed")
    validated = [
        (t, float(row["validation_loss"])) for t, row in zip(tokens, rows, strict=True) if row["validation_loss"]
    ]
    if validated:
        loss_axes.plot(*zip(*validated, strict=True), "o-", color="tab:orange", markersize=3, label="validation")
    if checkpoints:
        # On the lower edge, whatever the loss is there.
        edge = {"transform": loss_axes.get_xaxis_transform(), "clip_on": False}
        loss_axes.plot(checkpoints, [0] * len(checkpoints), "^", color="tab:red", label="checkpoint", **edge)
    loss_axes.legend()
    last = f": loss {losses[-1]:.4f} after {readable(tokens[-1])} tokens" if rows else ""
    loss_axes.set_title(f"{log_file}{last}", fontsize="medium")
    loss_axes.set_ylabel("loss (nats per token)")
    rate_axes.plot(tokens, [float(row["learning_rate"]) for row in rows], color="tab:green")
    rate_axes.set(xlabel="tokens", ylabel="learning rate")
    rate_axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value)))
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.3)
    path = log_file.with_suffix(".png")
    figure.savefig(path, dpi=110)
    return path


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, a twentieth of all in width; fewer at the ends."""
    reach = max(1, len(values) // 40)
    sums = [0.0, *accumulate(values)]
    spans = [(max(0, place - reach), min(len(values), place + reach + 1)) for place in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def log_problem(path: Path) -> Problem | None:
    """Why a path cannot be a log's: another file is there, or would be written over by what lies beside a log."""
    beside = [file for file in (path.with_suffix(".png"), samples_file(path)) if os.path.lexists(file)]
    rule, remedy = "", "give another name"
    if path.suffix.lower() == ".png":
        rule = "must not end in .png (the plot does)"
    elif os.path.lexists(path):
        rule = "" if _is_log(path) else "must be a new file, or a log of ours"
    elif beside:
        rule = f"has {beside[0].name} beside it, which the run would write over"
        remedy += ", or move that away"
    return Problem("log_file", rule, remedy, str(path)) if rule else None


def _is_log(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        found = file.readline().strip().split(",")
    # Earlier versions had fewer columns: new ones are put at the end, and a log that is gone on with gets them all.
    return found == [""] or (len(found) >= _FEWEST_COLUMNS and found == COLUMNS[: len(found)])


def _split_log(log_file: Path, resumed_from: int) -> None:
    """Make a log with a header and the rows up to `resumed_from`; move the others aside."""
    rows = _rows(log_file)
    kept = [row for row in rows if _is_sound(row) and int(row["update"]) <= resumed_from]
    others = [row for row in rows if row not in kept and None not in row.values()]
    if others:
        _append(log_file.with_name(log_file.name + ".superseded"), others)
    # Written anew in any case: what is appended must not continue a line that a crash cut short.
    temporary = log_file.with_name(log_file.name + ".tmp")
    temporary.unlink(missing_ok=True)
    _append(temporary, kept)
    temporary.replace(log_file)


def _append(path: Path, rows: list[dict[str, str]]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def plot_schedules(
    path: Path, training_steps: int, warmup_steps: int, max_lr: float, min_lr: float, overwrite: bool = False
) -> Path:
    """Draw all schedules; returns the PNG's path. Raises UserError where the numbers do not make one."""
    from matplotlib.figure import Figure

    if not path.suffix and not path.exists():  # matplotlib would add one in silence
        path = path.with_suffix(".png")
    if path.exists() and not (overwrite and path.is_file()):
        remedy = "use --overwrite to replace it, or another name" if path.is_file() else "name a .png file"
        raise UserError(Problem("--out", "exists already", remedy, str(path)))
    try:
        for schedule in SCHEDULES:
            Scheduler(None, schedule, training_steps, warmup_steps, max_lr, min_lr)
    except ValueError as error:
        remedy = "the defaults are 100,000 and 1,000 steps, 1e-3 and 1e-4"
        raise UserError(Problem("schedule", str(error), remedy)) from None
    updates = sorted({*range(1, training_steps + 1, max(1, training_steps // 2000)), warmup_steps or 1, training_steps})
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for schedule in SCHEDULES:
        rates = [learning_rate(u, schedule, training_steps, warmup_steps, max_lr, min_lr) for u in updates]
        axes.plot(updates, rates, label=schedule)
    axes.set(xlabel="update", ylabel="learning rate")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        problem = Problem("--out", f"cannot be written ({error.strerror})", remedy_for(error), str(path))
        raise UserError(problem) from None
    except (ValueError, RuntimeError) as error:  # of a suffix that is no picture, or needs LaTeX
        raise UserError(Problem("--out", f"cannot be drawn ({error})", "name a .png file", str(path))) from None
    return path
