"""Gradients are what a plain loop computes: no digit that fp32 keeps depends on stage or ranks, in bf16 either."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests import exactness
from tests.campaign import Campaign
from tests.conftest import starts_processes
from tests.gradients import AFTER_A_LOAD, EXACT, STAGES

pytestmark = [starts_processes, pytest.mark.usefixtures("one_thread")]


@functools.cache
def plain(name: str, ranks: int) -> tuple[dict[str, list[float]], exactness.State]:
    # The stage is nothing to a plain loop.
    settings = {**EXACT[name], "zero_stage": None}
    told, states = exactness.plain(settings, ranks, [1])
    return told, states[1]


def engines(campaign: Campaign, name: str, ranks: int) -> tuple[dict[str, Any], exactness.State]:
    """Losses and norms, and masters and moments after one update."""
    ended = campaign.ended(name, ranks)
    assert ended.code == 0, ended.complained
    folder = campaign.root / f"whole_{ranks}" / name
    return ended.value, torch.load(folder / "1.pt")


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("name", [name for name in EXACT if "fp32" not in name])
def test_masters_and_moments_of_bf16_are_those_of_a_plain_loop(campaign: Campaign, name: str, ranks: int) -> None:
    told, held = engines(campaign, name, ranks)
    expected, state = plain(name, ranks)
    assert exactness.differences(held, state) == pytest.approx(
        dict.fromkeys(("weight", *exactness.MOMENTS), 0), abs=1e-6
    )
    assert told["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert told["norm"] == pytest.approx(expected["norm"], rel=1e-6)
    assert expected["norm"][0] > 2 * exactness.CLIPPING  # clipping is active where there is any


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("stage", STAGES)
def test_masters_and_moments_of_fp32_are_those_of_a_plain_loop(campaign: Campaign, stage: int, ranks: int) -> None:
    told, held = engines(campaign, f"exact_fp32_stage{stage}", ranks)
    expected, state = plain(f"exact_fp32_stage{stage}", ranks)
    found = exactness.differences(held, state)
    # The first update of Adam divides each gradient by its own size: of tiny ones the last bits show.
    assert found["exp_avg"] < 1e-6 and found["exp_avg_sq"] < 1e-6 and found["weight"] < 2e-5
    assert told["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert told["norm"] == pytest.approx(expected["norm"], rel=1e-6)


@pytest.mark.parametrize("ranks", (1, 2))
def test_stages_agree_with_one_another_in_bf16(campaign: Campaign, ranks: int) -> None:
    first, *others = (engines(campaign, f"exact_bf16_stage{stage}", ranks)[1] for stage in STAGES)
    for other in others:
        assert max(exactness.differences(other, first).values()) < 1e-6


def test_one_and_two_ranks_agree_in_bf16(campaign: Campaign) -> None:
    one, two = (engines(campaign, "exact_bf16_stage1", ranks)[1] for ranks in (1, 2))
    assert max(exactness.differences(one, two).values()) < 1e-6


def test_sums_over_ranks_in_bf16_are_had_only_where_an_overlay_asks(campaign: Campaign) -> None:
    # And these tests would see it: each gradient is rounded to 8 bits.
    rounded = engines(campaign, "exact_rounded", 2)[1]
    found = exactness.differences(rounded, plain("exact_bf16_stage1", 2)[1])
    assert found["exp_avg"] > 1e-3 and found["exp_avg_sq"] > 1e-3


@pytest.mark.parametrize(
    ("precision", "stage", "ranks"), [*((precision, stage, 1) for precision, stage in AFTER_A_LOAD), ("bf16", 1, 2)]
)
def test_a_resumed_engine_has_the_settings_of_its_own_configuration(
    campaign: Campaign, precision: str, stage: int, ranks: int
) -> None:
    ended = campaign.ended(f"after_a_load_{precision}_{stage}", ranks)
    assert ended.code == 0, ended.complained
    saved, fresh, loaded = (ended.value[name] for name in ("saved", "fresh", "loaded"))
    assert loaded.pop("scale", None) == saved.pop("scale", None)  # that is state, and goes on
    fresh.pop("scale", None)
    assert loaded == fresh and loaded != saved
    # What it does with them: AdamW by its formula, on a gradient that was clipped to 0.01.
    assert ended.value["norm"] == pytest.approx(0.01, rel=1e-3)
    assert ended.value["deviation"] < 1e-4


def test_activation_checkpointing_leaves_nothing_behind_in_zero_3(campaign: Campaign) -> None:
    assert campaign.ended("module_stack").value == [1, 1, 1]


def test_collectives_wait_half_an_hour_for_a_slow_rank(campaign: Campaign) -> None:
    assert campaign.ended("timeouts").value == [1800, 1800]


def test_ranks_that_would_draw_differently_generate_what_the_first_one_draws(campaign: Campaign) -> None:
    first, second = campaign.ended("draws", 2).values
    assert first == second and len({len(ids) for ids in first} | {40}) > 1
