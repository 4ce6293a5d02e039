"""Whole journeys, typed as a user types them."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from dsllama.training.checkpoint import list_checkpoints
from tests.conftest import REPOSITORY, Run, TinyData, deepspeed_command, environment, options, run

DSLLAMA = Path(sys.executable).with_name("dsllama")


def start(*command: object, cwd: Path = REPOSITORY) -> subprocess.Popen[str]:
    """Start a command in a terminal of its own, as it were: Ctrl-C reaches its whole process group."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for_rows(log: Path, rows: int, process: subprocess.Popen[str], seconds: float = 180) -> None:
    """Until the log has so many rows; fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not log.exists() or len(log.read_text().splitlines()) <= rows:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.1)


def test_quickstart_is_interrupted_goes_on_and_knows_when_it_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    command = [
        DSLLAMA,
        "quickstart",
        "--dir",
        folder,
        "n_embd=32",
        "n_layers=1",
        "max_seq_len=64",
        "batch_size=4",
        "tokens_per_update=512",
        "training_tokens=150K",
        "warmup_iterations=10",
        "sample_tokens=8",
    ]
    first = start(*command)
    wait_for_rows(folder / "log.csv", 4, first)
    os.kill(first.pid, signal.SIGINT)
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 75, said[-3000:]
    assert "stopped, with a checkpoint; `make quickstart` goes on from it" in said
    stopped_at = list_checkpoints(folder / "checkpoints")[-1]

    second = run(*command)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"goes on from {stopped_at}" in second.stdout and "tokenizer.json exists" in second.stdout
    start_loss, end_loss = map(
        float, re.findall(r"loss +([\d.]+) at the start .*?, ([\d.]+) at the end", second.stdout)[0]
    )
    assert start_loss == pytest.approx(math.log(8192), abs=0.1) and end_loss < start_loss - 1.5
    for made in ("log.png", "log.samples.txt", "config.yaml", "tensorboard", "shards/manifest.json"):
        assert (folder / made).exists(), made

    third = run(*command)
    assert third.returncode == 0 and "is finished already" in third.stdout

    command_shown = re.search(r"generate +(dsllama generate .*)", third.stdout)
    assert command_shown is not None
    generated = subprocess.run(
        f"{DSLLAMA.parent}/{command_shown[1]} --max_new_tokens 5",
        shell=True,
        text=True,
        capture_output=True,
        env=environment(),
        check=True,
    )
    assert generated.stdout.startswith("The ")

    fresh = start(*command, "--fresh")
    said = fresh.communicate(timeout=180)[0]
    assert fresh.returncode == 0, said[-3000:]
    kept = next(folder.glob("earlier-*"))
    assert (kept / "checkpoints" / stopped_at.name / "manifest.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_job_leaves_a_checkpoint_that_goes_on(
    tiny_data: TinyData, tmp_path: Path, number
) -> None:
    trained = Run(tmp_path / "run", {**tiny_data.settings, "training_tokens": 4000 * 256, "token_ckpt": "1G"})
    process = start(*deepspeed_command(2, "launch/train.py", *trained.words()))
    wait_for_rows(tmp_path / "run" / "log.csv", 5, process)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    checkpoint = list_checkpoints(trained.folder / "checkpoints")[-1]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["update"] == int(trained.rows()[-1]["step"])
    assert manifest["data"]["consumed_samples"] == manifest["update"] * 8

    more = {**trained.settings, "load_ckpt": "true", "training_tokens": (manifest["update"] + 3) * 256}
    result = run(*deepspeed_command(2, "launch/train.py", *Run(trained.folder, more).words()))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [int(row["step"]) for row in trained.rows()][-4:] == list(range(manifest["update"], manifest["update"] + 4))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    settings = {**tiny_data.settings, "token_ckpt": 256, "max_lr": 1e38, "schedule": "constant", "gradient_clipping": 0}
    trained = Run(tmp_path / "run", settings)
    result = run(sys.executable, "launch/train.py", *trained.words())
    assert result.returncode == 1
    assert re.search(r"training stopped: the (loss|gradient norm) is (nan|inf) at update \d+", result.stderr)
    assert "The last good checkpoint is" in result.stderr and "Traceback" not in result.stderr
    newest = json.loads((list_checkpoints(trained.folder / "checkpoints")[-1] / "manifest.json").read_text())
    assert math.isfinite(newest["loss"])


def test_console_csv_and_tensorboard_say_the_same(tiny_data: TinyData, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = Run(
        tmp_path / "run",
        {
            **tiny_data.settings,
            "validation_tokens": 1000,
            "eval_interval": 5,
            "sample_prompts": ["the dog"],
            "sample_tokens": 4,
            "seed": 3,
        },
    )
    result = run(sys.executable, "launch/train.py", *trained.words())
    assert result.returncode == 0, result.stderr
    rows = trained.rows()
    events = EventAccumulator(str(trained.folder / "tensorboard"))
    events.Reload()
    for name in ("loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second"):
        told = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert [step for step, _ in told] == [int(row["tokens_total"]) for row in rows]
        assert [value for _, value in told] == pytest.approx([float(row[name]) for row in rows], rel=1e-6)
    console = re.findall(r"^ *(\d+)/20 .* loss ([\d.]+) \|", result.stdout, re.MULTILINE)
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


def test_from_raw_text_to_a_model_in_transformers_by_hand(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"body": f"line {n} of a small text; {n * n} is its square"}) + "\n" for n in range(800))
    )
    tokenizer, shards = tmp_path / "tok.json", tmp_path / "shards"
    steps = [
        [DSLLAMA, "tokenizer", text, "--out", tokenizer, "--vocab_size", "300", "--text_field", "body"],
        [DSLLAMA, "encode", text, "--tokenizer", tokenizer, "--out", shards, "--text_field", "body"],
        deepspeed_command(
            1,
            "launch/train.py",
            "--config",
            "configs/quickstart.yaml",
            *options(
                {
                    "dataset_dir": shards,
                    "tokenizer_path": tokenizer,
                    "ckpt_dir": tmp_path / "c",
                    "log_file": tmp_path / "l.csv",
                    "n_embd": 32,
                    "n_layers": 1,
                    "max_seq_len": 32,
                    "tokens_per_update": 256,
                    "training_tokens": 5 * 256,
                    "warmup_iterations": 1,
                    "deepspeed_overlay": "ds_configs/zero3.json",
                    "zero_stage": "null",
                }
            ),
        ),
        [DSLLAMA, "export", "--checkpoint", tmp_path / "c", "--out", tmp_path / "hf"],
    ]
    for step in steps:
        result = run(*step)
        assert result.returncode == 0, f"{step}\n{result.stdout}{result.stderr}"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.hidden_size == 32 and torch.isfinite(model(torch.tensor([[0, 20, 30]])).logits).all()


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_the_engine_applies_the_rate_of_the_update(stage: int) -> None:
    result = run(sys.executable, REPOSITORY / "tests" / "applied_rates.py", stage)
    rates = json.loads(result.stdout.split("RATES")[1])
    warmup = [0.5 * u / 3 for u in (1, 2)]
    decay = [0.5 - 0.45 * (u - 3) / 7 for u in range(3, 11)]
    assert rates == pytest.approx([*warmup, *decay, 0.05, 0.05], rel=1e-12), result.stderr[-2000:]


def test_help_is_made_of_the_fields_own_words() -> None:
    told = run(sys.executable, "launch/train.py", "--help").stdout
    assert "--tokens_per_update" in told and "accumulation follows from it" in told and "default: 524288" in told


def test_schedules_are_drawn(tmp_path: Path) -> None:
    from PIL import Image

    result = run(DSLLAMA, "plot-schedule", "--out", tmp_path / "s.png")
    assert result.returncode == 0 and Image.open(tmp_path / "s.png").size[0] > 400
