"""What a run says while it trains, and when it cannot go on."""

from __future__ import annotations

import json
import math
import re

import pytest
import yaml

from dsllama.training.checkpoint import list_checkpoints
from tests.campaign import Campaign
from tests.conftest import starts_processes

pytestmark = starts_processes


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    campaign: Campaign,
) -> None:
    ended, trained = campaign.ended("diverging"), campaign.runs["diverging", 1]
    assert ended.code == 1
    assert re.search(r"training stopped: the (loss|gradient norm) is (nan|inf) at update \d+", ended.complained)
    assert "The last good checkpoint is" in ended.complained and "Traceback" not in ended.complained
    newest = json.loads((list_checkpoints(trained.folder / "checkpoints")[-1] / "manifest.json").read_text())
    assert math.isfinite(newest["loss"])


def test_console_csv_and_tensorboard_say_the_same(campaign: Campaign) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained, said = campaign.run("reporting"), campaign.ended("reporting").said
    rows = trained.rows()
    events = EventAccumulator(str(trained.folder / "tensorboard"))
    events.Reload()
    for name in ("loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second"):
        told = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert [step for step, _ in told] == [int(row["tokens_total"]) for row in rows]
        assert [value for _, value in told] == pytest.approx([float(row[name]) for row in rows], rel=1e-6)
    console = re.findall(r"^ *(\d+)/20 .* loss ([\d.]+) \|", said, re.MULTILINE)
    assert [(int(s), float(loss)) for s, loss in console] == [
        (int(row["step"]), pytest.approx(float(row["loss"]), abs=6e-5)) for row in rows
    ]
    assert [int(row["step"]) for row in rows if row["validation_loss"]] == [5, 10, 15, 20]
    # The textbook's interval: eval_interval, then 1.5 times as far each time.
    samples = (trained.folder / "log.samples.txt").read_text()
    assert re.findall(r"=== update (\d+),", samples) == ["5", "8", "12", "18"] and samples.count("the dog") == 4
    saved = yaml.safe_load((trained.folder / "checkpoints" / "config.yaml").read_text())
    assert saved["seed"] == 3 and saved["validation_tokens"] == 1000
    ds_json = json.loads((trained.folder / "checkpoints" / "deepspeed.json").read_text())
    assert ds_json["train_batch_size"] == 8 and "auto" not in json.dumps(ds_json)
