"""An update that goes wrong is made again, then treated as the configuration says; samples stay left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsllama import cli
from dsllama.errors import UserError
from dsllama.training.health import Health, read_skipped
from tests.campaign import Campaign
from tests.conftest import TinyData, starts_processes
from tests.gradients import TROUBLE
from tests.training.test_runs import plain_loop

pytestmark = starts_processes


class Expected:
    """Losses of a loop without any of our code."""

    def __init__(self, data: TinyData) -> None:
        self.data, self.known = data, dict[str, list[float]]()

    def __call__(self, skipped: int = 0, first: int = 1, updates: int = 12, **options: list[int]) -> list[float]:
        """To what fp32 keeps, from an update on. skipped: an update whose own loss is not looked at."""
        key = repr((updates, options))
        if key not in self.known:
            self.known[key] = plain_loop(self.data, clipping=1.0, updates=updates, **options)["loss"]
        return pytest.approx(without(self.known[key], skipped)[first - 1 :], rel=1e-4)


def without(losses: list[float], update: int) -> list[float]:
    return losses[: update - 1] + losses[update:] if update else losses


@pytest.fixture(scope="module")
def expected(tiny_data: TinyData) -> Expected:
    return Expected(tiny_data)


def made(campaign: Campaign, name: str, code: int) -> tuple[str, list[float], list[dict[str, str]]]:
    """(what a training said, its losses, its rows)."""
    ranks = TROUBLE[name][0] if name in TROUBLE else 2 if (name, 2) in campaign.runs else 1
    ended, run = campaign.ended(name, ranks), campaign.runs[name, ranks]
    assert ended.values == [code] * ranks, ended.said + ended.complained
    return ended.said + ended.complained, list(run.losses().values()), run.rows()


def test_what_heals_at_the_second_try_counts_and_the_hardware_is_suspected(campaign: Campaign) -> None:
    said, losses, rows = made(campaign, "heals", 0)
    assert losses == list(campaign.losses("fp32_stage1", 2).values())
    assert re.search(r"suspicion    update 6: its loss is nan; made again .* Suspect the hardware of rank 1 on ", said)
    assert "suspicion    update 10: its gradients are not finite; made again" in said
    assert [row["suspicions"] for row in rows] == ["0"] * 5 + ["1"] * 4 + ["2"] * 11
    assert {row["skipped_updates"] for row in rows} == {"0"}
    events = EventAccumulator(str(campaign.runs["heals", 2].folder / "tensorboard" / "log-1")).Reload()
    assert [event.value for event in events.Scalars("train/suspicions")][-1] == 2


def test_the_second_try_draws_the_dropout_of_the_first(campaign: Campaign) -> None:
    _, losses, _ = made(campaign, "heals_with_dropout", 0)
    assert losses == list(campaign.losses("dropout", 1).values())


def test_a_loss_that_is_not_finite_is_skipped_or_stops_the_run(campaign: Campaign, expected: Expected) -> None:
    said, losses, rows = made(campaign, "skips_the_loss", 0)
    assert "skipped      update 9: its loss is inf; the weights are as before (1 in a row)" in said
    assert losses[8] == float("inf") and rows[-1]["skipped_updates"] == "1"
    assert without(losses, 9) == expected(9, left_out=[9])
    said, _, _ = made(campaign, "stops_at_the_loss", 1)
    assert "training stopped: the loss is nan at update 6 (samples 40 to 47, learning rate" in said
    assert "update_0000005; --load_ckpt true goes on" in said
    said, _, _ = made(campaign, "stops_at_gradients", 1)
    assert "its gradients are not finite at update 6 (samples 40 to 47" in said


def test_a_rollback_leaves_the_samples_out_at_every_resume(campaign: Campaign, expected: Expected, capsys) -> None:
    said, losses, rows = made(campaign, "rolls_back", 0)
    assert "rolled back  update 6: its loss is nan. Its samples 40 to 47 are left out from now on" in said
    assert "rolled back  update 9: its loss is inf. Its samples 72 to 79 are left out" in said
    assert losses == expected(without=[5, 9])
    assert [row["update"] for row in rows] == [str(update) for update in range(1, 13)]
    assert rows[-1]["rollbacks"] == "2" and "rollbacks 2" in said
    folder = campaign.runs["rolls_back", 2].folder / "checkpoints"
    notes = json.loads((folder / "skipped_samples.json").read_text())
    assert [(note["first"], note["last"], note["update"]) for note in notes] == [(40, 47, 6), (72, 79, 9)]
    assert cli.main(["checkpoints", "list", str(folder)]) == 0
    assert "2 rollbacks, 16 samples left out" in capsys.readouterr().out.splitlines()[-1]
    _, again, _ = made(campaign, "rolled_back_again", 0)  # which takes the notes over
    assert again == losses[2:]


def test_notes_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    """Or the samples that they name would be trained on again without a word."""
    assert read_skipped(tmp_path, tmp_path, {}) == []
    (tmp_path / "skipped_samples.json").write_text('[{"first": 40, "last": 47, "fr')
    with pytest.raises(UserError, match=r"skipped_samples.json: cannot be read[\s\S]* are trained on again"):
        read_skipped(tmp_path, tmp_path, {})


def test_a_rollback_takes_up_the_engines_own_files_too(campaign: Campaign, expected: Expected) -> None:
    said, losses, _ = made(campaign, "rolls_back_own_files", 0)
    assert "rolled back  update 6: its gradients are not finite" in said
    assert losses == expected(without=[5, 9])


def test_a_run_does_not_go_back_to_the_same_checkpoint_for_ever(campaign: Campaign) -> None:
    said, _, _ = made(campaign, "rolls_back_for_ever", 1)
    assert len(re.findall("^rolled back ", said, re.M)) == 3
    assert "the loss is nan at update 6 (samples" in said and "after 3 rollbacks to the same checkpoint" in said

    # Nor is it forgotten at a new start: the notes tell.
    said, _, _ = made(campaign, "rolls_back_for_ever_again", 1)
    assert "rolled back " not in said and "after 3 rollbacks to the same checkpoint" in said


def test_a_rollback_goes_back_past_the_start_or_to_an_older_checkpoint(campaign: Campaign, expected: Expected) -> None:
    said, losses, _ = made(campaign, "rolls_back_past_its_start", 0)
    assert "rolled back  update 6: its loss is nan" in said and "stops_at_the_loss/checkpoints/update_0000005" in said
    assert losses == expected(without=[5], first=6, updates=20)
    # The checkpoint of update 7, which this start has made itself: one that load_ckpt names is never passed over.
    said, losses, _ = made(campaign, "rolls_back_further", 0)
    assert re.search(r"passing over the damaged checkpoint .*update_0000007", said)
    assert "rolled back  update 8: its loss is nan" in said and "rolls_back_further/checkpoints/update_0000006" in said
    assert losses == expected(without=[7], first=6, updates=20)


def test_a_rollback_that_finds_nothing_whole_stops_the_run(campaign: Campaign) -> None:
    said, _, _ = made(campaign, "rolls_back_to_nothing", 1)
    assert "training stopped: its loss is nan at update 2 (samples 8 to 15" in said
    assert "there is no way back" in said and "none of the 1 checkpoints in it is whole" in said


def test_a_spike_is_warned_of_skipped_stopped_at_or_left_out(campaign: Campaign, expected: Expected) -> None:
    said, losses, _ = made(campaign, "spike_warned", 0)
    assert re.search(
        r"warning      update 9: its loss 10\d\.\d+ is .* above the median of the last 4 .*; it counts", said
    )
    losses[8] -= 100
    assert losses == expected()
    said, losses, rows = made(campaign, "spike_healed", 0)
    assert "suspicion    update 9: its loss 10" in said and losses == expected()
    for name in ("spike_skipped", "spike_skipped_plain"):
        said, losses, rows = made(campaign, name, 0)
        assert "skipped      update 9: its loss 10" in said and rows[-1]["skipped_updates"] == "1"
        assert without(losses, 9) == expected(9, left_out=[9])
    said, _, _ = made(campaign, "spike_stopped", 1)
    assert re.search(r"training stopped: its loss 10\d.* at update 9 \(samples 64 to 71", said)
    said, losses, _ = made(campaign, "spike_rolled_back", 0)
    assert "going on from" in said and losses == expected(without=[8])


def test_a_weight_that_differs_between_ranks_stops_the_run(campaign: Campaign) -> None:
    said, _, _ = made(campaign, "replicas", 1)
    assert re.search(
        r"after update 6 .* weights differ between these, and which is right .*: rank 0 on .*; rank 1", said
    )
    assert "tok_embeddings.weight" in said or "embed" in said
    made(campaign, "heals", 0)  # with its replicas compared after each update


def test_the_score_is_that_of_the_median_and_needs_a_window() -> None:
    health = Health(SimpleNamespace(loss_spike_window=128, on_loss_spike="warn", loss_spike_score=5.0))
    for number in range(15):
        health.losses.append(2 + 0.01 * (number % 3))
    assert health.score(1e9) == 0
    health.losses.append(2.01)
    # The median is 2.01, the median distance from it 0.01.
    assert health.score(2.01 + 0.014826 * 4) == pytest.approx(4, rel=1e-6)
    assert health.spike(2.01 + 0.014826 * 4) is None and health.spike(1.0) is None
    assert "5.5 deviations above the median of the last 16 (2.0100)" in health.spike(2.01 + 0.014826 * 5.5).told


def test_a_setting_that_cannot_be_is_refused(tmp_path: Path, capsys) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("on_loss_spike: maybe\nzero_stage: 3\ncheck_replicas_interval: 5\n")
    assert cli.main(["config", "--config", str(config)]) == 2
    told = capsys.readouterr().err
    assert "on_loss_spike" in told and "roll_back" in told
    config.write_text("on_loss_spike: off\nzero_stage: 3\ncheck_replicas_interval: 5\n")
    assert cli.main(["config", "--config", str(config)]) == 2
    assert "check_replicas_interval = 5: needs zero_stage 0 to 2" in capsys.readouterr().err
