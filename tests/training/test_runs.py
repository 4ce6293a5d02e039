"""Whole runs through the real launcher, held against a plain PyTorch loop and against each other.

The plain loop shares nothing with dsllama but the initial weights: the model is transformers', the data are
slices of one array, the rate is the textbook's formula, the optimizer is torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dsllama.checkpoint.catalog import list_checkpoints
from dsllama.config import TrainingConfig
from dsllama.export.huggingface import to_huggingface
from dsllama.inference import export_checkpoint, load_model
from dsllama.model import LLaMaTransformer
from tests.campaign import OWN_FILES, STAGES, UPDATES, Campaign, on_one_and_two_ranks
from tests.conftest import TINY, TinyData, starts_processes

pytestmark = starts_processes


@pytest.fixture(scope="module")
def plain(tiny_data: TinyData) -> dict[str, list[float]]:
    return plain_loop(tiny_data, clipping=1.0)


def plain_loop(
    data: TinyData,
    clipping: float,
    updates: int = UPDATES,
    left_out: Sequence[int] = (),
    without: Sequence[int] = (),
) -> dict[str, list[float]]:
    """Updates written out with transformers' Llama: losses, gradient norms and rates, one each per update.

    left_out: updates that compute a loss and change nothing. without: eights of samples, from 0, that no update sees.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = TrainingConfig(**TINY)
    torch.manual_seed(config.seed)
    start = LLaMaTransformer(config, data.tokenizer).state_dict()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=data.tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    model.load_state_dict(to_huggingface(start))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    told: dict[str, list[float]] = {"loss": [], "grad_norm": [], "learning_rate": []}
    stream = torch.from_numpy(data.tokens.astype(np.int64))
    eights = [number for number in range(updates + len(without)) if number not in without]
    for update in range(1, updates + 1):
        if update < 4:
            rate = 0.01 * update / 4
        else:
            rate = 0.001 + 0.009 * (1 + math.cos(math.pi * (update - 4) / (updates - 4))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        begin = eights[update - 1] * 256
        x, y = stream[begin : begin + 256].view(8, 32), stream[begin + 1 : begin + 257].view(8, 32)
        loss = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clipping if clipping else math.inf)
        if update not in left_out:
            optimizer.step()
        for name, value in (("loss", loss), ("grad_norm", norm), ("learning_rate", rate)):
            told[name].append(value.item() if isinstance(value, torch.Tensor) else value)
    told |= {name: [float(weight.double().sum())] for name, weight in model.state_dict().items()}
    return told


@on_one_and_two_ranks("fp32_stage")
def test_every_zero_stage_trains_like_a_plain_loop(campaign: Campaign, plain, stage: int, ranks: int) -> None:
    rows = campaign.run(f"fp32_stage{stage}", ranks).rows()
    assert [int(row["update"]) for row in rows] == list(range(1, UPDATES + 1))
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("learning_rate", 1e-12)):
        assert [float(row[name]) for row in rows] == pytest.approx(plain[name], rel=tolerance), name


@pytest.mark.parametrize("ranks", (1, 2))
def test_without_clipping_it_trains_like_a_plain_loop_too(campaign: Campaign, tiny_data: TinyData, ranks: int) -> None:
    expected = plain_loop(tiny_data, clipping=0)
    assert list(campaign.losses("no_clipping", ranks).values()) == pytest.approx(expected["loss"], rel=1e-4)


@on_one_and_two_ranks("fp32_stage")
def test_a_checkpoint_of_any_stage_loads_in_one_process_with_the_plain_loops_weights(
    campaign: Campaign, plain, stage: int, ranks: int
) -> None:
    model = load_model(campaign.run(f"fp32_stage{stage}", ranks).folder / "checkpoints")
    for name, weight in to_huggingface(model.state_dict()).items():
        assert float(weight.double().sum()) == pytest.approx(plain[name][0], rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("name", OWN_FILES)
def test_the_weights_by_name_are_those_in_the_engines_own_files(campaign: Campaign, name: str) -> None:
    own, by_name = (
        list_checkpoints(campaign.run(n, 2).folder / "checkpoints")[-1] for n in (name, name.removesuffix("_own_files"))
    )
    theirs, ours = load_model(own).state_dict(), load_model(by_name).state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    if "stage3" not in name:  # there no file holds whole weights
        trained = torch.load(own / "engine" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        assert [n for n, weight in trained.items() if not torch.equal(ours[n].to(weight.dtype), weight)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_an_exported_checkpoint_of_any_stage_is_the_same_model_in_transformers(
    campaign: Campaign, tmp_path: Path, stage: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = list_checkpoints(campaign.run(f"bf16_stage{stage}", 2).folder / "checkpoints")[-1]
    folder = export_checkpoint(checkpoint, tmp_path / "hf")
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_model(checkpoint)
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    words = AutoTokenizer.from_pretrained(folder)
    prompt = words("the quick brown", return_tensors="pt")["input_ids"]
    continued = theirs.generate(prompt, max_new_tokens=12, do_sample=False)
    expected = words.decode(continued[0], skip_special_tokens=True)
    assert ours.generate("the quick brown", max_new_tokens=12, temperature=0) == expected


@on_one_and_two_ranks("bf16_stage")
def test_bf16_follows_fp32(campaign: Campaign, tiny_data: TinyData, stage: int, ranks: int) -> None:
    losses = list(campaign.losses(f"bf16_stage{stage}", ranks).values())
    expected = plain_loop(tiny_data, clipping=1.0, updates=len(losses))
    assert losses == pytest.approx(expected["loss"], rel=3e-2)


@pytest.mark.parametrize("name", ["fp32_stage1", "shuffled"])
def test_the_number_of_ranks_does_not_change_the_losses(campaign: Campaign, name: str) -> None:
    assert campaign.losses(name, 1) == pytest.approx(campaign.losses(name, 2), rel=1e-4)


@pytest.mark.parametrize("ranks", (1, 2))
def test_the_micro_batch_does_not_change_the_losses(campaign: Campaign, ranks: int) -> None:
    assert campaign.losses("one_at_a_time", ranks) == pytest.approx(campaign.losses("fp32_stage2", ranks), rel=1e-4)


def test_the_order_is_another_when_shuffled_and_every_epoch_is_seen_whole(campaign: Campaign) -> None:
    shuffled, straight = campaign.losses("shuffled", 1), campaign.losses("fp32_stage1", 1)
    # 40 updates of 8 sequences pass over the 250 sequences of the data set and into a second epoch.
    assert len(shuffled) == 40
    assert shuffled[1] == pytest.approx(straight[1], rel=0.02) and shuffled[1] != straight[1]
