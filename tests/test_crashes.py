"""A run that is killed again and again is the run that never died; 200 times: make campaign."""

from __future__ import annotations

from pathlib import Path

from tests.campaign import NEVER_KILLED, Campaign
from tests.conftest import TINY, TinyData, starts_processes
from tests.crashes import Campaign as Kills
from tests.crashes import campaign as killed_again_and_again

pytestmark = starts_processes


def test_a_run_that_was_killed_is_the_run_that_never_died(
    tmp_path: Path, tiny_data: TinyData, campaign: Campaign
) -> None:
    updates = NEVER_KILLED["training_tokens"] // TINY["tokens_per_update"]
    # So slow that it is not over before the fourth kill.
    kills = Kills(tmp_path, tiny_data, updates, seed=2, each_save=5, pace=0.05)
    told = killed_again_and_again(kills, 4, expected=campaign.losses("never_killed", 2))
    assert told["kills"] == 4
