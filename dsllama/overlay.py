"""The overlay: a DeepSpeed JSON of the user's, laid over the one that follows from the configuration.

    file -> tree -> each key known, each value of its type and in its range -> what it really says

A null or an "auto" in it leaves the value to us. Known is what DeepSpeed reads and what has an effect here.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from dsllama import optimizer
from dsllama.config import TrainingConfig, plain, read_settings
from dsllama.errors import Problem, UserError, did_you_mean

Json = dict[str, Any]

_Count = Annotated[int, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Type = Literal["fp32", "bf16", "bfloat16", "fp16", "float16", "float32"]
_Level = Literal["debug", "info", "warning", "error", "critical"]

_REFERENCE = "see DeepSpeed's reference of its JSON"
# What DeepSpeed reads and what would have no effect here, or another one than its name says; and what has it instead.
_ELSEWHERE = {
    "activation_checkpointing": "the field activation_checkpointing does it",
    "checkpoint": "the run writes checkpoints of its own",
    "foreach": "AdamW is torch's fused one",
    "bias_correction": "AdamW corrects its bias",
    "adam_w_mode": "it is AdamW",
    "fp32_optimizer_states": "they are fp32",
    "amp": "the field precision decides",
    "sparse_gradients": "no gradient here is sparse",
    "curriculum_learning": "the order of the data is the run's own",
    "data_efficiency": "the order of the data is the run's own",
    "elasticity": "any number of ranks that divides tokens_per_update trains the same",
    "autotuning": "the launcher does not tune",
    "pipeline": "there is no pipeline here",
    "cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": 'write "pin_memory" in "offload_optimizer" and "offload_param"',
    "stage3_gather_fp16_weights_on_model_save": "the run writes checkpoints of its own",
}


def read_overlay(config: TrainingConfig) -> Json:
    """The overlay's JSON, {} without one. Raises UserError if it cannot be read."""
    if config.deepspeed_overlay is None:
        return {}
    path = Path(config.deepspeed_overlay)
    if not path.is_file():
        ready = ", ".join(sorted(str(p) for p in Path("ds_configs").glob("*.json")))
        remedy = f"ready ones: {ready}" if ready else "give the path of a JSON file"
        raise UserError(Problem("deepspeed_overlay", "there is no such file", remedy, str(path)))
    return read_settings(path)


def said(overlay: Json) -> Json:
    """The overlay without what it leaves to us."""
    kept = {key: said(value) if isinstance(value, dict) else value for key, value in overlay.items()}
    return {key: value for key, value in kept.items() if value is not None and value != "auto"}


def merge(base: Json, above: Json) -> Json:
    """`above` laid over `base`, at every depth; neither is changed."""
    merged = copy.deepcopy(base)
    for key, value in above.items():
        both_sections = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_sections else copy.deepcopy(value)
    return merged


def leaves(tree: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The (path, value) of everything in a tree that is no section."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def unsound(section: Json, file: str, known: Json | None = None, path: tuple[str, ...] = ()) -> Iterator[Problem]:
    """What is wrong with an overlay by itself: unknown keys, values of another type or out of range."""
    known = _known_keys() if known is None else known
    for key, value in section.items():
        where = f"{file}: {'.'.join((*path, str(key)))}"
        if key not in known:
            instead = _ELSEWHERE.get(key)
            rule = f"has no effect here: {instead}" if instead else "DeepSpeed has no such key here"
            yield Problem(where, rule, "leave it out" if instead else did_you_mean(str(key), known, _REFERENCE))
        elif value is None or value == "auto":
            continue
        elif isinstance(known[key], dict) and isinstance(value, dict):
            yield from unsound(value, file, known[key], (*path, str(key)))
        elif isinstance(known[key], dict):
            yield Problem(where, "must be a section { ... }", _REFERENCE, value)
        elif key == "output_file" and isinstance(value, str) and Path(value).exists():
            yield Problem(where, "is there already, and would be written over", "name a new file", value)
        elif rule := _broken_rule(known[key], value):
            yield Problem(where, rule, "write such a value, or leave the key out", value)


def _broken_rule(annotation: Any, value: Any) -> str:
    """Why a value is none of a type, as pydantic says it; empty where it is one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 5e8 is how people write a bucket
    try:
        # As JSON: an enumeration is its value there, and neither true nor "1" is a number.
        TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return plain(error.errors()[0]["msg"])
    return ""


@functools.cache
def _known_keys() -> Json:
    """Every key, as a tree: a dictionary is a section, anything else the type of a value.

    Sections come from DeepSpeed's own pydantic classes where it has them; the rest from its reference page.
    """
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    texts = list[str]
    schedule = {"schedule": str, "training_steps": _Count, **_each("warmup_steps max_lr min_lr", _NotNegative)}
    return {
        **_each("train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print", _Count),
        **_each("gradient_clipping gradient_predivide_factor", _NotNegative),
        **_each(
            "wall_clock_breakdown memory_breakdown dump_state prescale_gradients disable_allgather "
            "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer disable_python_gc graph_harvesting",
            bool,
        ),
        **_each("communication_data_type seq_parallel_communication_data_type", _Type),
        "gradient_allreduce_op": str,
        "log_level": _Level,
        "optimizer": optimizer.KEYS,
        "scheduler": {"type": str, "params": schedule},
        "fp16": _fields_of(DeepSpeedFP16Config) | {"fp16_master_weights_and_grads": bool},
        "bf16": _fields_of(DeepSpeedBF16Config),
        "data_types": {**_each("grad_accum_dtype param_dtype buffer_dtype", _Type), "keep_in_fp32_modules": texts},
        "zero_optimization": _fields_of(DeepSpeedZeroConfig) | {"stage": Any},  # its rule is zero_stage's
        **{name: _fields_of(field.annotation) for name, field in DeepSpeedMonitorConfig.model_fields.items()},
        "flops_profiler": {
            **_each("enabled detailed", bool),
            "recompute_fwd_factor": _NotNegative,
            **_each("profile_step top_modules", _Count),
            "module_depth": int,
            "output_file": str,
        },
        "comms_logger": _fields_of(CommsLoggerConfig),
        "aio": {
            **_each("block_size queue_depth intra_op_parallelism", _Count),
            **_each("single_submit overlap_events use_gds", bool),
        },
        "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": texts},
        "compile": _fields_of(CompileConfig),
        "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    }


def _each(names: str, annotation: Any) -> Json:
    return dict.fromkeys(names.split(), annotation)


def _fields_of(model: Any) -> Json:
    keys: Json = {}
    for name, field in model.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated"):
            continue
        parts = (field.annotation, *get_args(field.annotation))
        section = next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)
        annotation: Any = field.annotation
        for rule in field.metadata:
            annotation = Annotated[annotation, rule]
        for key in filter(None, (name, field.alias)):
            keys[key] = _fields_of(section) if section else annotation
    return keys
