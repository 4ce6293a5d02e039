"""A skipped update is said when it happens, and a run that does nothing but skip is stopped."""

from __future__ import annotations

import re

import pytest

from dsllama.checkpoint.catalog import list_checkpoints
from tests.campaign import UPDATES, Campaign
from tests.conftest import TinyData, starts_processes
from tests.training.test_runs import plain_loop

pytestmark = starts_processes


def skipped(said: str) -> list[int]:
    """The updates that a console calls skipped."""
    return [int(number) for number in re.findall(r"^skipped +update (\d+): its gradients are not finite", said, re.M)]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("nan_fp32_stage0", 1),
        ("nan_fp32_stage1", 1),
        ("nan_fp32_stage3", 1),
        ("nan_bf16_stage2", 2),
    ],
)
def test_a_run_whose_gradients_are_never_finite_is_stopped(campaign: Campaign, name: str, ranks: int) -> None:
    ended = campaign.ended(name, ranks)
    assert ended.values == [1] * ranks
    assert skipped(ended.said) == [1, 2, 3]
    assert "training stopped: updates 1 to 3 (samples 0 to 23, learning rate" in ended.complained
    assert "3 in a row (max_skipped_updates)" in ended.complained and "no earlier checkpoint" in ended.complained
    assert list_checkpoints(campaign.runs[name, ranks].folder / "checkpoints") == []


def test_the_last_good_checkpoint_is_named_and_the_limit_is_a_setting(campaign: Campaign) -> None:
    ended, run = campaign.ended("nan_from_6"), campaign.runs["nan_from_6", 1]
    assert ended.value == 1 and skipped(ended.said) == [6, 7]
    assert f"The last good checkpoint is {run.checkpoint(5)}" in ended.complained
    # What would only hold the same weights at a later update is not saved.
    assert list_checkpoints(run.folder / "checkpoints")[-1] == run.checkpoint(5)


def test_a_run_that_is_started_again_goes_on_counting(campaign: Campaign) -> None:
    ended = campaign.ended("nan_at_the_end")
    assert ended.value == 0 and "finished: update 7 of 7" in ended.said and "; 2 updates skipped" in ended.said
    again = campaign.ended("nan_again")
    assert again.value == 1 and skipped(again.said) == [8]
    assert "updates 6 to 8 (samples 40 to 63, learning rate" in again.complained


def test_weights_that_are_not_finite_are_not_saved(campaign: Campaign) -> None:
    ended, run = campaign.ended("huge_decay"), campaign.runs["huge_decay", 1]
    assert ended.code == 1 and "the weights are not finite after update 1 (samples 0 to 7" in ended.complained
    assert list_checkpoints(run.folder / "checkpoints") == []


def test_a_rate_that_ruins_every_gradient_stops_the_run(campaign: Campaign) -> None:
    ended = campaign.ended("huge_rate")
    assert ended.code == 1 and re.search("not finite|the loss is|the gradient norm is", ended.complained)


def test_updates_that_are_skipped_now_and_then_are_said_and_left_out(campaign: Campaign, tiny_data: TinyData) -> None:
    ended, run = campaign.ended("nan_now_and_then", 2), campaign.runs["nan_now_and_then", 2]
    assert ended.values == [0, 0] and skipped(ended.said) == [4, 6, 7]
    expected = plain_loop(tiny_data, clipping=1.0, left_out=(4, 6, 7))["loss"]
    assert list(run.losses().values()) == pytest.approx(expected, rel=1e-4)
    assert [row["skipped_updates"] for row in run.rows()][-1] == "3"


def test_fp16_may_skip_as_long_as_it_searches_for_its_scale(campaign: Campaign) -> None:
    ended = campaign.ended("fp16_search")
    assert ended.value == 0, ended.complained
    found = skipped(ended.said)
    assert found[:4] == [1, 2, 3, 4] and len(found) < UPDATES - 3
    assert "at loss scale 2.68435e+08, which is now" in ended.said and "(4 in a row)" in ended.said


def test_fp16_stops_when_its_scale_is_at_its_end(campaign: Campaign) -> None:
    # 8 (twice: DeepSpeed tolerates one), 4, 2, and then 1, below which there is none: three times.
    ended = campaign.ended("nan_fp16")
    assert ended.value == 1 and skipped(ended.said) == [1, 2, 3, 4, 5, 6, 7]
    assert "3 in a row (max_skipped_updates) at 1, the smallest loss scale" in ended.complained
    assert "update 7: its gradients are not finite at loss scale 1; the weights" in ended.said


def test_fp16_at_a_scale_of_the_users_stops_as_other_precisions_do(campaign: Campaign) -> None:
    ended = campaign.ended("static_fp16")
    assert ended.value == 1 and skipped(ended.said) == [1, 2, 3]
    assert "loss scale 1.09951e+12 that fp16.loss_scale gives (0 there lets it be found)" in ended.complained


def test_a_run_that_ends_before_its_first_applied_update_has_failed(campaign: Campaign) -> None:
    ended, run = campaign.ended("fp16_too_short"), campaign.runs["fp16_too_short", 1]
    assert ended.value == 1 and "each was skipped, so nothing has been trained" in ended.complained
    assert list_checkpoints(run.folder / "checkpoints") == []
