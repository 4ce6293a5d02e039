"""Whole journeys, typed as a user types them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.conftest import deepspeed_command, options, run, starts_processes

DSLLAMA = Path(sys.executable).with_name("dsllama")
pytestmark = starts_processes


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


def test_help_is_made_of_the_fields_own_words() -> None:
    told = run(sys.executable, "launch/train.py", "--help").stdout
    assert "--tokens_per_update" in told and "accumulation follows from it" in told and "default: 524288" in told


def test_schedules_are_drawn(tmp_path: Path) -> None:
    from PIL import Image

    result = run(DSLLAMA, "plot-schedule", "--out", tmp_path / "s.png")
    assert result.returncode == 0 and Image.open(tmp_path / "s.png").size[0] > 400
