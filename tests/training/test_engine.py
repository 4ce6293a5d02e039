"""What DeepSpeed's engine makes of what we give it."""

from __future__ import annotations

import pytest

from tests.campaign import STAGES, Campaign
from tests.conftest import starts_processes

pytestmark = starts_processes


@pytest.mark.parametrize("stage", STAGES)
def test_the_engine_applies_the_rate_of_the_update(campaign: Campaign, stage: int) -> None:
    warmup = [0.5 * u / 3 for u in (1, 2)]
    decay = [0.5 - 0.45 * (u - 3) / 7 for u in range(3, 11)]
    assert campaign.ended(f"rates{stage}").value == pytest.approx([*warmup, *decay, 0.05, 0.05], rel=1e-12)


def test_a_model_partitioned_while_it_is_built_has_the_same_weights_losses_and_generations(campaign: Campaign) -> None:
    report = campaign.ended("partitioned").value
    assert report["differences"] == dict.fromkeys(["fp32 untied", "fp32 tied", "bf16 untied", "bf16 tied"], 0.0)
    # Generating between two training steps leaves the second as it would have been.
    assert report["losses"] == pytest.approx([report["loss"]] * 2, rel=1e-6)
    assert report["ids"] == [report["reference_ids"]] * 2


def test_what_only_the_engine_refuses_is_a_mistake_of_the_users_too(campaign: Campaign) -> None:
    ended = campaign.ended("refused_by_the_engine")
    assert ended.value == 2 and "DeepSpeed builds no engine from it" in ended.complained
    assert "param_dtype" in ended.complained and "Traceback" not in ended.complained
