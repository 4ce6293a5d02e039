"""The learning rate as a pure function of the update, and the Scheduler that hands it to an optimizer.

Updates are numbered 1, 2, ... N. The rate of update u is set before u runs, so that skipped updates,
accumulation and resumes cannot shift it. The formulas are the textbook's.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant")

# The name by which a DeepSpeed JSON asks for our scheduler: {"scheduler": {"type": ...}}.
DEEPSPEED_NAME = "DsllamaScheduler"

logger = logging.getLogger("dsllama")


def learning_rate(
    update: int, schedule: Schedule, training_steps: int, warmup_steps: int, max_lr: float, min_lr: float
) -> float:
    """The rate of update `update` (1 ... training_steps); after the last one it stays where the schedule ended."""
    if schedule == "constant":
        return max_lr
    if update < warmup_steps:
        return max_lr * max(1, update) / warmup_steps
    if update > training_steps:
        return min_lr
    progress = (update - warmup_steps) / max(1, training_steps - warmup_steps)
    if schedule == "cosine":
        return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2
    return max_lr - (max_lr - min_lr) * progress


class Scheduler:
    """Sets the learning rate of every parameter group, update by update.

    At construction the rate of update 1 is set. `step(u)` sets the rate for update u, before it runs;
    `step()`, as DeepSpeed calls it after an update, moves on to the next one.
    """

    def __init__(
        self,
        torch_optimizer: Any,
        schedule: Schedule,
        training_steps: int,
        warmup_steps: int,
        max_lr: float,
        min_lr: float,
    ) -> None:
        """torch_optimizer: has param_groups; None for none yet. Raises ValueError for what makes no schedule."""
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be cosine, linear or constant, not {schedule!r}")
        if training_steps < 1 or warmup_steps < 0:
            raise ValueError(f"need training_steps >= 1 and warmup_steps >= 0, not {training_steps} and {warmup_steps}")
        if schedule != "constant" and (warmup_steps >= training_steps or not 0 <= min_lr <= max_lr):
            raise ValueError(
                f"need warmup_steps < training_steps and 0 <= min_lr <= max_lr, not {warmup_steps=}, "
                f"{training_steps=}, {min_lr=}, {max_lr=}"
            )
        self.optimizer = torch_optimizer
        self.schedule: Schedule = schedule
        self.training_steps = training_steps
        self.warmup_steps = warmup_steps
        self.max_lr = max_lr
        self.min_lr = min_lr
        self.current_step = 1
        self._warned = False
        self._set_rate()

    def step(self, current_step: int | None = None) -> None:
        """Set the rate for update `current_step`; without it, for the update after the current one."""
        # DeepSpeed itself moves one past the end after the last update; only an update beyond it is worth a word.
        last_silent = self.training_steps + (1 if current_step is None else 0)
        self.current_step = self.current_step + 1 if current_step is None else current_step
        if self.current_step > last_silent and not self._warned:
            message = "past the schedule's %d updates: the learning rate stays where it ended"
            logger.warning(message, self.training_steps)
            self._warned = True
        self._set_rate()

    def get_current_lr(self) -> float:
        """The rate that is set now."""
        return self.current_lr

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that `load_state_dict` takes: the update and the whole schedule."""
        names = ("current_step", "schedule", "training_steps", "warmup_steps", "max_lr", "min_lr")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the schedule that it holds."""
        for name, value in state_dict.items():
            setattr(self, name, value)
        # Not through `step`: to open the checkpoint of a finished run is no update past its end.
        self._set_rate()

    def _set_rate(self) -> None:
        self.current_lr = learning_rate(
            self.current_step, self.schedule, self.training_steps, self.warmup_steps, self.max_lr, self.min_lr
        )
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group["lr"] = self.current_lr
