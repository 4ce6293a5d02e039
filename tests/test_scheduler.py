"""The learning rate against the textbook's formulas, written out a second time, and the Scheduler round it."""

from __future__ import annotations

import itertools
import json
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllama.scheduler import SCHEDULES, Schedule, Scheduler, learning_rate

N, W, MAX, MIN = 20, 5, 1e-3, 1e-4


def textbook(u: int, schedule: str, n: int = N, w: int = W, high: float = MAX, low: float = MIN) -> float:
    """The rate of update u, by the formulas as the textbook gives them; (1 + cos x) / 2 is cos(x / 2) squared."""
    if schedule == "constant":
        return high
    if u < w:
        return max(u, 1) * high / w
    if u > n:
        return low
    if schedule == "cosine":
        return low + (high - low) * math.cos(math.pi * (u - w) / (2 * (n - w))) ** 2
    return ((n - u) * high + (u - w) * low) / (n - w)


def optimizer(groups: int = 1) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=123.0)


def scheduler(torch_optimizer: Any = None, schedule: Schedule = "cosine", **changes: Any) -> Scheduler:
    numbers = {"training_steps": N, "warmup_steps": W, "max_lr": MAX, "min_lr": MIN, **changes}
    return Scheduler(torch_optimizer, schedule, **numbers)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    w=st.integers(0, 300),
    d=st.integers(1, 3000),
    u=st.integers(0, 4000),
    high=st.floats(1e-6, 1),
    share=st.floats(0, 1),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_the_rate_is_the_textbooks_for_any_numbers(
    schedule: Schedule, w: int, d: int, u: int, high: float, share: float
) -> None:
    low = high * share
    expected = textbook(u, schedule, w + d, w, high, low)
    assert learning_rate(u, schedule, w + d, w, high, low) == pytest.approx(expected, rel=1e-9, abs=1e-12 * high)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_curve_passes_through_the_points_that_the_formulas_fix(schedule: Schedule) -> None:
    rates = [learning_rate(u, schedule, 110, 10, MAX, MIN) for u in range(112)]
    assert rates[0] == rates[1] == pytest.approx(MAX / 10)  # update 0 is there for those who count from it
    assert rates[10] == MAX == max(rates)
    assert rates[60] == pytest.approx((MAX + MIN) / 2)
    assert rates[110] == pytest.approx(MIN) and rates[111] == MIN
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:111]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_rate_is_set_at_construction_and_each_later_one_by_naming_its_update(schedule: Schedule) -> None:
    torch_optimizer = optimizer(groups=3)
    ours = scheduler(torch_optimizer, schedule)
    for update in (1, 2, 4, 5, 6, 13, 20, 3):  # any order: the rate is a function of the update alone
        if update > 1:
            ours.step(update)
        assert ours.get_current_lr() == pytest.approx(textbook(update, schedule))
        assert [group["lr"] for group in torch_optimizer.param_groups] == [ours.get_current_lr()] * 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_number_a_step_moves_on_to_the_next_update(schedule: Schedule) -> None:
    ours = scheduler(optimizer(), schedule)
    applied = []
    for _ in range(N):  # as an engine does it: an update at the rate that is set, then step()
        applied.append(ours.optimizer.param_groups[0]["lr"])
        ours.step()
    assert applied == pytest.approx([textbook(update, schedule) for update in range(1, N + 1)])
    ours.step(7)
    ours.step()
    assert ours.get_current_lr() == pytest.approx(textbook(8, schedule))


@pytest.mark.parametrize(("schedule", "final"), [("cosine", MIN), ("linear", MIN), ("constant", MAX)])
def test_after_the_last_update_the_rate_stays_and_one_warning_says_so(
    schedule: Schedule, final: float, caplog: pytest.LogCaptureFixture
) -> None:
    ours = scheduler(optimizer(), schedule)
    with caplog.at_level(logging.WARNING, logger="dsllama"):
        for update in range(1, N + 1):
            ours.step(update)
        ours.step()  # an engine's own, after the last update
        assert not caplog.records
        for update in (N + 1, N + 2, 10 * N):
            ours.step(update)
            assert ours.get_current_lr() == final == ours.optimizer.param_groups[0]["lr"]
    assert [record.getMessage() for record in caplog.records] == [
        f"past the schedule's {N} updates: the learning rate stays where it ended"
    ]


def test_steps_without_numbers_warn_once_too(caplog: pytest.LogCaptureFixture) -> None:
    ours = scheduler()
    with caplog.at_level(logging.WARNING, logger="dsllama"):
        for _ in range(N + 5):
            ours.step()
    assert len(caplog.records) == 1


def test_a_restored_schedule_goes_on_as_if_it_had_not_stopped() -> None:
    first = scheduler(optimizer(), "linear")
    for _ in range(8):
        first.step()
    state = json.loads(json.dumps(first.state_dict()))  # plain values: any file format holds them
    restored = scheduler(optimizer(), "cosine", training_steps=99, warmup_steps=0, max_lr=1.0, min_lr=0.5)
    restored.load_state_dict(state)
    assert restored.state_dict() == first.state_dict()
    assert restored.optimizer.param_groups[0]["lr"] == first.get_current_lr() == pytest.approx(textbook(9, "linear"))
    for _ in range(4):
        first.step()
        restored.step()
        assert restored.get_current_lr() == first.get_current_lr()


def test_restoring_a_schedule_that_ran_to_its_end_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    finished, fresh = scheduler(), scheduler(optimizer())
    with caplog.at_level(logging.WARNING, logger="dsllama"):
        for _ in range(N):
            finished.step()
        fresh.load_state_dict(finished.state_dict())
        assert fresh.get_current_lr() == MIN and not caplog.records
        fresh.step(N + 1)  # whereas to train on there is worth a word
    assert len(caplog.records) == 1


def test_an_optimizer_can_be_linked_later() -> None:
    ours = scheduler(None)
    assert ours.get_current_lr() == pytest.approx(textbook(1, "cosine"))
    ours.step(6)
    ours.optimizer = optimizer()
    ours.step(7)
    assert ours.optimizer.param_groups[0]["lr"] == pytest.approx(textbook(7, "cosine"))


@pytest.mark.parametrize(
    ("schedule", "changes", "message"),
    [
        ("cosin", {}, "cosine, linear or constant, not 'cosin'"),
        ("cosine", {"training_steps": 0, "warmup_steps": 0}, "training_steps >= 1"),
        ("constant", {"warmup_steps": -1}, "warmup_steps >= 0"),
        ("linear", {"warmup_steps": N}, "warmup_steps < training_steps"),
        ("cosine", {"min_lr": 2 * MAX}, "min_lr <= max_lr"),
        ("linear", {"min_lr": -MIN}, "0 <= min_lr"),
        ("cosine", {"max_lr": math.nan}, "min_lr <= max_lr"),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(schedule: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler(None, schedule, **changes)


def test_a_constant_schedule_asks_nothing_of_the_numbers_that_it_does_not_read() -> None:
    ours = scheduler(None, "constant", warmup_steps=N, min_lr=2 * MAX)
    assert ours.get_current_lr() == MAX
