"""`dsllama offload`: what a recipe takes, measured and by formula."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dsllama import cli, offload
from dsllama.config import TrainingConfig
from dsllama.deepspeed_config import deepspeed_config
from dsllama.derived import derive
from dsllama.model import LLaMaTransformer
from tests.campaign import Campaign
from tests.conftest import starts_processes

SETTINGS: dict[str, Any] = {
    "vocab_size": 4096, "n_embd": 256, "n_heads": 8, "n_layers": 4, "batch_size": 2, "max_seq_len": 128,
    "tokens_per_update": 1024, "training_tokens": 102400, "warmup_iterations": 1,
}  # fmt: skip


def needs(world_size: int = 1, **fields: Any) -> tuple[offload.Needs, int]:
    """Of a configuration, and its number of parameters."""
    config = TrainingConfig(**{**SETTINGS, **fields})
    derived = derive(config, world_size, 4096)
    return offload.needs(config, derived, deepspeed_config(config, derived, "cuda")), derived.parameters


# In bf16 a norm without a kernel of its own, as on a CPU, keeps fp32 copies beside.
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_blocks_activations_are_what_autograd_saves(kv_heads: int) -> None:
    saved, formula = [], []
    for layers in (2, 4):
        fields = {"precision": "fp32", "n_kv_heads": kv_heads, "n_layers": layers}
        model = LLaMaTransformer(TrainingConfig(**{**SETTINGS, **fields}), None)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        held: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, held: dict[int, torch.UntypedStorage] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        tokens = torch.randint(4096, (2, 128))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, tokens)
        saved.append(sum(storage.nbytes() for place, storage in held.items() if place not in own))
        need, parameters = needs(**fields, zero_stage=2)
        formula.append(need.device - (4 + 12 + 4 + 2 * 4) * parameters)  # states, sums of gradients, two buckets
    assert formula[1] - formula[0] == pytest.approx(saved[1] - saved[0], rel=0.1)


def test_offload_moves_bytes_of_a_parameter_from_device_to_host_to_nvme(tmp_path: Path) -> None:
    common = {"precision": "bf16", "nvme_path": str(tmp_path), "zero_stage": 3}
    plain, parameters = needs(**common)
    states, _ = needs(**common, offload_optimizer="cpu")
    both, _ = needs(**common, offload_optimizer="cpu", offload_params="cpu")
    swapped, _ = needs(**common, offload_optimizer="nvme", offload_params="cpu")
    assert (plain.device - states.device) / parameters == pytest.approx(20)
    assert (states.device - both.device) / parameters == pytest.approx(2)
    assert both.host / parameters == pytest.approx(22)
    assert swapped.nvme / parameters == pytest.approx(16) and both.nvme == 0


@starts_processes
def test_a_recipe_is_measured_by_part(campaign: Campaign) -> None:
    told = campaign.ended("measured").value
    assert sum(told["parts"].values()) == pytest.approx(told["seconds"])
    assert 0 < told["parts"]["cpu_adam"] < told["seconds"]
    assert told["tokens_per_second"] == pytest.approx(512 / told["seconds"])


def test_a_sweep_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SETTINGS), encoding="utf-8")
    words = ["--recipes", str(tmp_path / "none"), "--updates", "0", "--device_memory", "0"]
    assert cli.main(["offload", "--config", str(config), *words]) == 2
    told = capsys.readouterr().err
    assert "is no folder" in told and "--updates = 0: must be at least 1" in told and "--device_memory = 0" in told


@pytest.mark.long
@starts_processes
def test_the_sweep_measures_a_recipe_and_says_why_another_came_to_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipes, config = tmp_path / "recipes", tmp_path / "config.json"
    recipes.mkdir()
    shutil.copy(offload.RECIPES / "zero2_cpu_offload.json", recipes)
    shutil.copy(offload.RECIPES / "zero3_nvme.json", recipes)  # and no nvme_path
    config.write_text(json.dumps({**SETTINGS, "tokenizer_path": str(tmp_path / "none.json")}), encoding="utf-8")
    words = ["--config", str(config), "--recipes", str(recipes), "--updates", "1", "--out", str(tmp_path / "out")]
    assert cli.main(["offload", *words]) == 0
    said = capfd.readouterr().out
    assert "zero3_nvme: nvme_path: must name a folder on the NVMe disk" in said
    measured, failed = json.loads((tmp_path / "out" / "offload.json").read_text(encoding="utf-8"))
    assert measured["recipe"] == "zero2_cpu_offload" and "error" in failed
    assert sum(measured["parts"].values()) == pytest.approx(measured["seconds"])
    assert 0 < measured["parts"]["cpu_adam"] < measured["seconds"]
    assert measured["tokens_per_second"] == pytest.approx(1024 / measured["seconds"])
    assert measured["memory"]["host"] > 0 and (tmp_path / "out" / "offload.png").stat().st_size > 10_000
