"""The model against transformers' Llama, against closed forms, and against itself where two ways must agree."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dsllama.errors import UserError
from dsllama.model import LLaMaTransformer, ffn_hidden_size, parameter_count
from tests.models import lively_model, model_config, random_tokens, transformers_twin

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(model: LLaMaTransformer, x: torch.Tensor, y: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradient of every parameter)."""
    model.zero_grad()
    loss = model(x, y)
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return loss.item(), {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize(("n_embd", "multiple_of", "hidden"), [(4096, 256, 11008), (2048, 256, 5632), (96, 32, 256)])
def test_the_swiglu_hidden_size_is_that_of_the_published_llamas(n_embd: int, multiple_of: int, hidden: int) -> None:
    assert ffn_hidden_size(n_embd, multiple_of) == hidden


def test_the_parameter_count_of_llama_7b_is_the_published_one() -> None:
    config = model_config(n_embd=4096, n_heads=32, n_layers=32, multiple_of=256)
    assert parameter_count(config, 32_000) == (6_738_415_616, 6_738_415_616 - 32_000 * 4096)


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 2}, {"tie_embeddings": True}, {"n_kv_heads": 1, "n_layers": 3}])
def test_the_parameter_count_is_that_of_the_model_which_is_built(shape: dict[str, Any]) -> None:
    config = model_config(**shape)
    weights = dict(LLaMaTransformer(config, None).named_parameters())
    total = sum(weight.numel() for weight in weights.values())
    assert parameter_count(config, 96)[0] == total
    # Tied, the one matrix is multiplied with as the head; untied, the embedding is only looked up in.
    assert parameter_count(config, 96)[1] == total - (0 if config.tie_embeddings else 96 * 32)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_kv_heads": 2},
        {"tie_embeddings": True},
        {"n_kv_heads": 1, "tie_embeddings": True, "theta": 500_000.0},
        {"max_seq_len": 2048, "n_layers": 1},
        {"use_flash_attention": False, "n_kv_heads": 2},
    ],
)
def test_logits_agree_with_transformers_on_the_same_weights(shape: dict[str, Any]) -> None:
    model = lively_model(model_config(**shape))
    tokens = random_tokens(2, model.config.max_seq_len)
    with torch.no_grad():
        ours, theirs = model(tokens), transformers_twin(model)(tokens).logits
    assert theirs.std() > 0.5  # far from the uniform start, where everything would agree
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_plain_and_fused_attention_give_the_same_loss_and_gradients(kv_heads: int | None) -> None:
    x, y = random_tokens(2, 64), random_tokens(2, 64, seed=2)
    configs = (model_config(n_kv_heads=kv_heads, use_flash_attention=flash) for flash in (True, False))
    fused, plain = map(lively_model, configs)
    (loss, of_fused), (plain_loss, of_plain) = gradients(fused, x, y), gradients(plain, x, y)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    torch.testing.assert_close(of_fused, of_plain, rtol=1e-4, atol=1e-5)
    assert of_fused.keys() == dict(fused.named_parameters()).keys()


def test_a_position_sees_nothing_of_the_later_ones() -> None:
    model, tokens = lively_model(model_config()), random_tokens(1, 20)
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 96
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_the_loss_is_the_cross_entropy_of_the_valid_positions_over_all_positions() -> None:
    model, x, y = lively_model(model_config()), random_tokens(3, 10), random_tokens(3, 10, seed=2)
    y[0, 4:] = y[2, :] = -100
    with torch.no_grad():
        probabilities = model(x).double().exp()
        loss = model(x, y)
    probabilities /= probabilities.sum(-1, keepdim=True)
    expected = -sum(math.log(probabilities[b, t, y[b, t]]) for b in range(3) for t in range(10) if y[b, t] >= 0) / 30
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_mean_over_micro_batches_is_the_loss_of_the_whole_batch_though_some_targets_are_ignored() -> None:
    model, x, y = lively_model(model_config()), random_tokens(4, 10), random_tokens(4, 10, seed=2)
    y[0, 2:] = -100
    with torch.no_grad():
        parts = [model(x[i : i + 2], y[i : i + 2]).item() for i in (0, 2)]
        assert sum(parts) / 2 == pytest.approx(model(x, y).item(), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("n_embd", "n_layers"), [(16, 1), (64, 2), (64, 24), (512, 1)])
def test_the_loss_starts_near_ln_of_the_vocabulary_at_any_shape(n_embd: int, n_layers: int, tied: bool) -> None:
    torch.manual_seed(0)
    config = model_config(n_embd=n_embd, n_layers=n_layers, vocab_size=2000, tie_embeddings=tied)
    with torch.no_grad():
        loss = LLaMaTransformer(config, None)(*(random_tokens(4, 64, vocab_size=2000, seed=s) for s in (1, 2)))
    assert loss.item() == pytest.approx(math.log(2000), abs=0.1)


def test_weights_are_drawn_with_the_documented_deviations() -> None:
    torch.manual_seed(0)
    config = model_config(n_embd=128, n_layers=8, vocab_size=1000)
    branch = 0.02 / math.sqrt(2 * 8)
    expected = {"o_proj": branch, "down_proj": branch, "lm_head": 1 / 128}
    for name, weight in LLaMaTransformer(config, None).named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones(128)), name
        else:  # 128 * 128 draws or more: their deviation is known to 0.6 %
            assert weight.std().item() == pytest.approx(expected.get(name.split(".")[-2], 0.02), rel=0.03), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(dropout: float) -> None:
    x, y = random_tokens(2, 16), random_tokens(2, 16, seed=2)
    results = []
    for recompute in (False, True):
        model = lively_model(model_config(dropout=dropout, activation_checkpointing=recompute)).train()
        torch.manual_seed(5)
        results.append(gradients(model, x, y))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("flash", [True, False])
def test_dropout_acts_in_training_only(flash: bool) -> None:
    tokens = random_tokens(1, 16)
    with_dropout = lively_model(model_config(dropout=0.5, use_flash_attention=flash))
    without = lively_model(model_config(use_flash_attention=flash))
    with torch.no_grad():
        torch.testing.assert_close(with_dropout(tokens), without(tokens))
        with_dropout.train()
        assert not torch.allclose(with_dropout(tokens), with_dropout(tokens))


def test_positions_keep_their_precision_when_the_model_is_cast_to_bf16() -> None:
    tokens = random_tokens(1, 2048)
    cast = lively_model(model_config(max_seq_len=2048)).bfloat16().float()
    fresh = lively_model(model_config(max_seq_len=2048))
    fresh.load_state_dict(cast.state_dict())  # the rounded weights, with positions that were never cast
    with torch.no_grad():
        torch.testing.assert_close(cast(tokens), fresh(tokens), rtol=0, atol=0)


def test_one_seed_gives_the_same_weights_in_every_precision_up_to_rounding() -> None:
    torch.manual_seed(3)
    full = LLaMaTransformer(model_config(), None).state_dict()
    torch.manual_seed(3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        half = LLaMaTransformer(model_config(), None).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in half.values()} == {torch.bfloat16}
    torch.testing.assert_close({name: weight.bfloat16() for name, weight in full.items()}, half, rtol=0, atol=0)


def test_a_model_that_was_evaluated_in_inference_mode_can_still_be_trained() -> None:
    model, tokens = LLaMaTransformer(model_config(), None), random_tokens(1, 8)
    with torch.inference_mode():
        model(tokens)
    model(tokens, tokens).backward()


def test_the_whole_model_with_its_loss_is_one_graph_to_torch_compile() -> None:
    model, x, y = lively_model(model_config(n_kv_heads=2)).train(), random_tokens(2, 16), random_tokens(2, 16, seed=2)
    # The backend that runs the captured graph as it is: what is asked here is that nothing breaks it.
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (16, 12, 9):  # from the second on, the length is a variable of the graph
        short = x[:, :length], y[:, :length]
        assert compiled(*short).item() == pytest.approx(model(*short).item(), rel=1e-6)


def test_more_positions_than_max_seq_len_are_refused() -> None:
    with pytest.raises(ValueError, match="65 positions are more than max_seq_len = 64"):
        LLaMaTransformer(model_config(), None)(random_tokens(1, 65))


def test_a_vocabulary_without_room_for_the_tokenizer_is_the_users_error(tiny_data: Any) -> None:
    size = tiny_data.tokenizer.vocab_size
    with pytest.raises(UserError, match=f"vocab_size = {size - 1}: must be at least the tokenizer's {size}"):
        LLaMaTransformer(model_config(vocab_size=size - 1), tiny_data.tokenizer)
