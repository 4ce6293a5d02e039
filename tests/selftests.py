"""What ranks of a shared launch do for tests/test_selftest.py: the self-test on sound engines, and on faulty ones.

A fault is planted into the engine that `engine.build` gives, so the plain loop beside it knows nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from dsllama import selftest
from dsllama.checkpoint import state
from dsllama.config import TrainingConfig
from dsllama.deepspeed_config import deepspeed_config
from dsllama.derived import derive
from dsllama.model import IGNORE_INDEX
from dsllama.training import engine as deepspeed_engine
from dsllama.training import run
from dsllama.training.beside import Finding
from dsllama.training.reduced import reduced
from tests.engine_tasks import fp16_on_cpu
from tests.exactness import SETTINGS, VOCABULARY

Json = dict[str, Any]


def verdict(settings: Json, root: str, fault: str = "", search: bool = False) -> Json:
    """The self-test's word on a run with these settings, whose engine has this fault. root: a folder for what it needs.

    margins: by what was compared, the largest deviation over its limit.
    """
    config = TrainingConfig(**{**SETTINGS, **settings})
    with fp16_on_cpu(config.precision == "fp16"):
        world = deepspeed_engine.start(*deepspeed_engine.world_from_environment())
        derived = derive(config, world.size, VOCABULARY)
        ds_config = deepspeed_config(config, derived, "cpu")
        subject = reduced(config, derived, ds_config)
        examine, margins = selftest.examine, {}

        def noting(*arguments: Any) -> list[Finding]:
            findings = examine(*arguments)
            for finding in findings:
                margins[finding.what] = max(margins.get(finding.what, 0.0), finding.ratio)
            return findings

        with mock.patch.object(selftest, "examine", noting), planted(fault):
            told = selftest.verdict_on(subject, world, Path(root), search)
    return {**told, "margins": margins, "said": selftest.summary(told)}


def train(words: list[str], cache: str, fault: str = "") -> int:
    """A training whose engines have this fault; verdicts are kept in `cache`. Its exit code."""
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": cache}), planted(fault):
        return run.main(words)


# ---------------------------------------------------------------- faults


def planted(fault: str) -> Any:
    """Engines that are built within have the fault."""
    build = deepspeed_engine.build
    if fault == "moments lost":
        load = state.load

        def losing(engine: Any, *arguments: Any) -> Any:
            own = load(engine, *arguments)
            for moments in engine.basic_optimizer.state.values():
                moments["exp_avg_sq"].zero_()
            return own

        return mock.patch.object(state, "load", losing)

    def faulty(model: Callable[[], Any], ds_config: Json) -> Any:
        engine, scheduler = build(model, {**ds_config, **JSON_FAULTS.get(fault, {})})
        if fault in FAULTS:
            FAULTS[fault](engine, scheduler)
        return engine, scheduler

    return mock.patch.object(deepspeed_engine, "build", faulty)


def _times_accumulation(engine: Any, _: Any) -> None:
    backward = engine.backward
    engine.backward = lambda loss: backward(loss, scale_wrt_gas=False)


def _divided_by_ranks(engine: Any, _: Any) -> None:
    backward = engine.backward
    engine.backward = lambda loss: backward(loss / dist.get_world_size())


def _no_gradient_in_attention(engine: Any, _: Any) -> None:
    for block in engine.module.layers:
        block.self_attn.register_full_backward_pre_hook(lambda _, gradients: tuple(g * 0 for g in gradients))


def _no_gradient_where_recomputed(engine: Any, scheduler: Any) -> None:
    if engine.module.config.activation_checkpointing:
        _no_gradient_in_attention(engine, scheduler)


def _one_step_too_many(engine: Any, _: Any) -> None:
    """Without gradients, as DeepSpeed makes it to have the moments allocated."""
    for group in engine.basic_optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    engine.basic_optimizer.step()
    engine.basic_optimizer.zero_grad()


def _twice_the_decay(engine: Any, _: Any) -> None:
    for group in engine.basic_optimizer.param_groups:
        group["weight_decay"] *= 2


def _late_rate(_: Any, scheduler: Any) -> None:
    step = scheduler.step
    scheduler.step = lambda number=None: step(number - 1 if number else None)


def _other_data(engine: Any, _: Any) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        engine.module.register_forward_pre_hook(lambda _, inputs: ((inputs[0] + 1) % VOCABULARY, *inputs[1:]))


def _stale_copy(engine: Any, _: Any) -> None:
    """What the model computes with does not follow its master."""
    weight, step = engine.module.norm.weight, engine.step
    kept = weight.detach().clone()

    def stay() -> None:
        step()
        weight.data.copy_(kept)

    engine.step = stay


def _tiled_loss(engine: Any, _: Any) -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    model = engine.module

    def of_shard(self: Any, x: Any, y: Any) -> Any:
        logits = self.lm_head(x).float().flatten(0, -2)
        return torch.nn.functional.cross_entropy(logits, y.flatten(), ignore_index=IGNORE_INDEX)

    def forward(tokens: Any, targets: Any) -> Any:
        x = model.embed_tokens(tokens)
        rotary = tuple(table[: tokens.shape[1]].to(x.dtype) for table in model.rotary)
        for block in model.layers:
            x = block(x, rotary)
        weights = [model.lm_head.weight]
        return TiledFusedLogitsLoss.apply(of_shard, model, model.norm(x), targets, None, 2, weights, "mean")

    model.forward = forward


FAULTS: dict[str, Callable[[Any, Any], None]] = {
    "times accumulation": _times_accumulation,
    "divided by ranks": _divided_by_ranks,
    "no gradient in attention": _no_gradient_in_attention,
    "no gradient where recomputed": _no_gradient_where_recomputed,
    "one step too many": _one_step_too_many,
    "twice the decay": _twice_the_decay,
    "late rate": _late_rate,
    "other data": _other_data,
    "stale copy": _stale_copy,
    "tiled loss": _tiled_loss,
}
JSON_FAULTS: dict[str, Json] = {
    "rounded reduction": {"communication_data_type": "bf16"},
    "stage 0 in bf16": {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "bf16"}},
    "no clipping": {"gradient_clipping": 0.0},
}
