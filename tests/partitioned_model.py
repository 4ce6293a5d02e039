"""Builds a model as ZeRO-3 does, in a rank of its own, and says how it compares with one that is built whole."""

from __future__ import annotations

from typing import Any

import torch

from dsllama.model import LLaMaTransformer
from dsllama.training import engine as deepspeed_engine
from tests.models import model_config, random_tokens

PROMPT = [0, 5, 17]


def deepspeed_json(bf16: bool) -> dict[str, Any]:
    """ZeRO-3 that keeps no parameter whole between uses, however small."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }


def built(bf16: bool, tied: bool, positions: int = 64) -> LLaMaTransformer:
    """A model from seed 11, under zero.Init."""
    import deepspeed

    torch.manual_seed(11)
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_json(bf16)):
        return LLaMaTransformer(model_config(n_kv_heads=2, tie_embeddings=tied, max_seq_len=positions), None)


def whole(tied: bool, positions: int = 64) -> LLaMaTransformer:
    """The same model without DeepSpeed, in fp32."""
    torch.manual_seed(11)
    return LLaMaTransformer(model_config(n_kv_heads=2, tie_embeddings=tied, max_seq_len=positions), None)


def largest_difference(bf16: bool, tied: bool) -> float:
    """Between the gathered weights, or the positions, and the whole model's, rounded alike."""
    import deepspeed

    # Enough positions that bf16 could not count them.
    partitioned, reference = built(bf16, tied, positions=512), whole(tied, positions=512)
    assert all(weight.numel() == 0 for weight in partitioned.parameters()), "nothing was partitioned"
    dtype = torch.bfloat16 if bf16 else torch.float32
    pairs = list(zip(partitioned.rotary, reference.rotary, strict=True))
    with deepspeed.zero.GatheredParameters(list(partitioned.parameters())):
        expected = dict(reference.named_parameters())
        pairs += [(w.detach().clone(), expected[name].to(dtype)) for name, w in partitioned.named_parameters()]
    return max((ours.double() - theirs.double()).abs().max().item() for ours, theirs in pairs)


def report_of_engine() -> dict[str, Any]:
    """What the engine's model computes and generates between two training steps, beside the whole model."""
    import deepspeed

    from dsllama.generation import generate_ids

    x, y = random_tokens(2, 16), random_tokens(2, 16, seed=2)
    model = built(bf16=False, tied=False)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=deepspeed_json(bf16=False)
    )
    losses, ids = [], []
    for _ in range(2):
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        ids.append(generate_ids(engine.module, PROMPT, 70, temperature=0))  # past max_seq_len
    reference = whole(tied=False)
    return {
        "losses": losses,
        "ids": ids,
        "loss": reference(x, y).item(),
        "reference_ids": generate_ids(reference, PROMPT, 70, temperature=0),
    }


def report() -> dict[str, Any]:
    """How models that are built partitioned differ from whole ones, and what an engine makes of one."""
    deepspeed_engine.start(*deepspeed_engine.world_from_environment())
    kinds = [(bf16, tied) for bf16 in (False, True) for tied in (False, True)]
    named = {f"{'bf16' if bf16 else 'fp32'} {'tied' if tied else 'untied'}": (bf16, tied) for bf16, tied in kinds}
    return {"differences": {name: largest_difference(*kind) for name, kind in named.items()}, **report_of_engine()}
