"""A run made small for the self-test: 2 layers, narrow, few tokens, and the same kinds of parts under its engine."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsllama.config import TrainingConfig
from dsllama.deepspeed_config import ZeroSettings, binding, deepspeed_config
from dsllama.derived import Derived
from dsllama.model import parameter_count
from dsllama.overlay import merge
from dsllama.training.engine import accelerator

Json = dict[str, Any]
_LAYERS, _WIDTH, _VOCABULARY, _POSITIONS, _SEQUENCES, _MICRO_STEPS = 2, 512, 264, 32, 2, 4
# At the rate of a real run the change of a weight lies near the rounding of its fp32; and clipping has to act.
_RATE, _CLIPPING = 0.01, 0.05
# DeepSpeed swaps nothing smaller than 1 MiB to NVMe: so many parameters for each rank.
_SWAPPED = 400_000
_REPORTERS = ("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "comms_logger")
# ZeRO's sizes in elements that shrink with the model, with DeepSpeed's defaults.
_SIZES = {"reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000}
_SIZES_OF_STAGE_3 = {
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}
# What makes an engine simpler, by the configuration's field.
_SIMPLER: Json = {
    "enable_compilation": False,
    "activation_checkpointing": False,
    "use_flash_attention": False,
    "tie_embeddings": False,
    "n_kv_heads": None,
    "gradient_clipping": 0.0,
    "weight_decay": 0.0,
    "offload_params": "none",
    "offload_optimizer": "none",
    "precision": "fp32",
    "checkpoint_format": "portable",
}


@dataclass(frozen=True)
class Subject:
    """A reduced run. base: the run's DeepSpeed JSON, from which `json` makes the reduced one's."""

    config: TrainingConfig
    base: Json
    derived: Derived

    @property
    def json(self) -> Json:
        """For an engine of the reduced model."""
        config, base = self.config, copy.deepcopy(self.base)
        stage, optimizer, params = config.zero_stage or 0, config.offload_optimizer, config.offload_params
        for name, device in (("offload_optimizer", optimizer), ("offload_param", params)):
            if device == "none":
                base["zero_optimization"].pop(name, None)
        zero = ZeroSettings(stage, stage, optimizer or "none", params or "none", config.nvme_path)
        return merge(base, binding(config, self.derived, zero))

    def but(self, **changes: Any) -> Subject:
        """Another one, with some of the configuration's fields changed."""
        return dataclasses.replace(self, config=self.config.model_copy(update=changes))

    def with_micro_steps(self, steps: int) -> Subject:
        """Another one, with so many micro-steps to an update."""
        sequences = self.config.batch_size * self.derived.world_size * steps
        numbers = {"gradient_accumulation_steps": steps, "sequences_per_update": sequences}
        return dataclasses.replace(self, derived=dataclasses.replace(self.derived, **numbers))

    def switches(self) -> Iterator[tuple[str, Subject]]:
        """Each setting that can be switched off, and the run without it."""
        c = self.config
        if self.derived.gradient_accumulation_steps > 1:
            yield "gradient accumulation", self.with_micro_steps(1)
        for name, value in _SIMPLER.items():
            if getattr(c, name) != value:
                changes = {name: value}
                if name == "offload_optimizer":  # without which DeepSpeed offloads no parameters
                    changes["offload_params"] = "none"
                yield f"{name} {getattr(c, name)}", self.but(**changes)
        if c.deepspeed_overlay is not None:
            base = deepspeed_config(c.model_copy(update={"deepspeed_overlay": None}), self.derived, accelerator())
            yield f"deepspeed_overlay {c.deepspeed_overlay}", dataclasses.replace(self, base=base)
        if (c.zero_stage or 0) > 1:
            yield f"zero_stage {c.zero_stage}", self.but(zero_stage=1, offload_params="none", offload_optimizer="none")


def reduced(config: TrainingConfig, derived: Derived, ds_config: Json) -> Subject:
    """A run like this one with a model that takes no time: as many heads to a key-value head, of the same size, as far
    as that goes; buckets, sub-groups and thresholds shrink as the model does, so that as many of them are filled."""
    zero = ds_config["zero_optimization"]
    optimizer, params = (zero.get(name, {}) for name in ("offload_optimizer", "offload_param"))
    on_nvme = [part for part in (optimizer, params) if part.get("device") == "nvme"]
    kv = config.n_kv_heads or config.n_heads
    group, kv_heads = min(config.n_heads // kv, 4), min(kv, 2)
    while group * kv_heads * derived.head_size > _WIDTH and (group > 2 or kv_heads > 1):
        group, kv_heads = (group, 1) if kv_heads > 1 else (2, 1)
    width = group * kv_heads * derived.head_size
    rows = max(_VOCABULARY, _SWAPPED * derived.world_size // width if on_nvme else 0)
    small = config.model_copy(
        update={
            "n_layers": min(config.n_layers, _LAYERS),
            "n_embd": width,
            "n_heads": group * kv_heads,
            "n_kv_heads": kv_heads if config.n_kv_heads is not None else None,
            "multiple_of": min(config.multiple_of, 64),
            "vocab_size": min(derived.vocab_size, rows),
            "max_seq_len": min(config.max_seq_len, _POSITIONS),
            "batch_size": min(config.batch_size, _SEQUENCES),
            "dropout": 0.0,
            "max_lr": _RATE,
            "min_lr": min(config.min_lr / config.max_lr, 1.0) * _RATE,
            "gradient_clipping": min(config.gradient_clipping, _CLIPPING),
            "zero_stage": zero["stage"],
            "offload_optimizer": optimizer.get("device", "none"),
            "offload_params": params.get("device", "none"),
            "nvme_path": on_nvme[0]["nvme_path"] if on_nvme else None,
        }
    )
    parameters, _ = parameter_count(small, min(derived.vocab_size, rows))
    sizes = _SIZES | (_SIZES_OF_STAGE_3 if zero["stage"] == 3 else {})
    # Even ones: DeepSpeed asks that of allgather_bucket_size.
    shrunk: Json = {
        name: max(2, zero.get(name, default) * parameters // derived.parameters // 2 * 2)
        for name, default in sizes.items()
    }
    if zero["stage"] == 3:
        threshold = zero.get("stage3_param_persistence_threshold", 100_000)
        shrunk["stage3_param_persistence_threshold"] = int(threshold * (width / config.n_embd) ** 2)
    if on_nvme:
        shrunk["sub_group_size"] = max(shrunk["sub_group_size"], _SWAPPED)
    if params in on_nvme:
        shrunk["offload_param"] = {"buffer_size": parameters}
    quiet = {name: {"enabled": False} for name in _REPORTERS if name in ds_config}
    base = merge(ds_config, {**quiet, "zero_optimization": shrunk})
    subject = Subject(small, base, dataclasses.replace(derived, parameters=parameters))
    return subject.with_micro_steps(min(derived.gradient_accumulation_steps, _MICRO_STEPS))
