"""Small models for the tests, and their twins in transformers."""

from __future__ import annotations

from typing import Any

import torch

from dsllama.config import TrainingConfig
from dsllama.export.huggingface import to_huggingface
from dsllama.model import LLaMaTransformer


def model_config(**changes: Any) -> TrainingConfig:
    """A model that is small in every direction, with a vocabulary of 96."""
    small = {
        "batch_size": 1,
        "n_embd": 32,
        "n_heads": 4,
        "n_layers": 2,
        "multiple_of": 16,
        "max_seq_len": 64,
        "vocab_size": 96,
        "warmup_iterations": 0,
    }
    return TrainingConfig(**{**small, **changes})


def lively_model(config: TrainingConfig, tokenizer: Any = None, seed: int = 0) -> LLaMaTransformer:
    """A model with weights far from its initialization, so that every part of it shows in the logits."""
    model = LLaMaTransformer(config, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if weight.dim() == 1 else noise / weight.shape[1] ** 0.5)
    return model.eval()


def transformers_twin(model: LLaMaTransformer) -> Any:
    """transformers' LlamaForCausalLM of the same shape and with the same weights, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=model.layers[0].mlp.up_proj.out_features,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads or c.n_heads,
            max_position_embeddings=c.max_seq_len,
            rms_norm_eps=c.eps,
            tie_word_embeddings=c.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.theta},
        )
    )
    missing, unexpected = twin.load_state_dict(to_huggingface(model.state_dict()), strict=False)
    assert not missing and not unexpected
    return twin.eval()


def from_huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LlamaForCausalLM's weights under our names; where the head is tied, both names are there."""
    ours = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return {"lm_head.weight": ours["embed_tokens.weight"], **ours}


def random_tokens(*shape: int, vocab_size: int = 96, seed: int = 1) -> torch.Tensor:
    """Token ids, int64."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
