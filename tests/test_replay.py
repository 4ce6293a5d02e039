"""A refactoring leaves the DeepSpeed JSON and the losses of tiny runs as they were: `python -m tests.replay`."""

from __future__ import annotations

import json

import pytest

from tests import replay
from tests.campaign import Campaign
from tests.conftest import starts_processes


def test_the_deepspeed_json_of_the_ready_configurations_is_what_it_was() -> None:
    golden = json.loads((replay.GOLDEN / "deepspeed.json").read_text(encoding="utf-8"))
    made = json.loads(json.dumps(replay.deepspeed_jsons()))
    assert made.keys() == golden.keys()
    assert [name for name in golden if made[name] != golden[name]] == []


@starts_processes
def test_the_losses_of_four_tiny_runs_are_what_they_were(campaign: Campaign) -> None:
    golden = json.loads((replay.GOLDEN / "losses.json").read_text(encoding="utf-8"))
    losses = replay.losses(campaign)
    assert losses.keys() == golden["losses"].keys()
    # Another processor or another torch sums in another order: there the last bits are free.
    same = golden["machine"] == replay.machine()
    for name, expected in golden["losses"].items():
        assert losses[name] == (expected if same else pytest.approx(expected, rel=1e-2 if "bf16" in name else 1e-4))
