"""TrainingConfig + world size -> the complete DeepSpeed JSON, with nothing left "auto".

    what the configuration derives   binding: an overlay may leave it out, say "auto", or say the same
    what we recommend beside it      an overlay may change it (bucket sizes, monitors, ...)
    the overlay                      ds_configs/*.json, or the user's own; null and "auto" leave a value to us

Every key is known, at every depth (overlay.py); the result has passed DeepSpeed's own configuration class.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsllama import optimizer
from dsllama.config import TrainingConfig
from dsllama.derived import Derived
from dsllama.errors import Problem, UserError
from dsllama.overlay import Json, leaves, merge, read_overlay, said, unsound
from dsllama.paths import parse_path
from dsllama.scheduler import DEEPSPEED_NAME

# DeepSpeed allocates whole buckets; larger ones than this gain nothing measurable and cost small GPUs dearly.
_LARGEST_BUCKET = 200_000_000
# DeepSpeed reports on its own every so many updates; ours reports, so: practically never.
_NEVER = 2**31 - 1


@dataclass(frozen=True)
class ZeroSettings:
    """How ZeRO partitions and offloads: the configuration's values, else the overlay's, else the defaults.

    asked_stage: the stage that was asked for; `stage` is the one that runs.
    """

    stage: int
    asked_stage: int
    offload_optimizer: str
    offload_params: str
    nvme_path: str | None


def zero_settings(config: TrainingConfig, overlay: Json) -> ZeroSettings:
    """The stage and offload of a run. An overlay speaks only where the configuration is silent (null)."""
    zero = overlay.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    parts = (zero.get("offload_optimizer"), zero.get("offload_param"))
    states, params = (part if isinstance(part, dict) else {} for part in parts)

    def first(*values: Any) -> Any:
        return next((value for value in values if value not in (None, "auto")), None)

    asked = first(config.zero_stage, zero.get("stage"), 1)
    # DeepSpeed's own stage 0 is right in fp32 only. In bf16 its wrapper sums gradients in bf16 and steps once at its
    # construction; in fp16 it divides gradients by a loss scale that it never multiplied with. ZeRO-1 needs no more
    # memory and communicates as rarely.
    runs_as_stage_1 = asked == 0 and config.precision != "fp32"
    return ZeroSettings(
        stage=1 if runs_as_stage_1 else asked,
        asked_stage=asked,
        offload_optimizer=first(config.offload_optimizer, states.get("device"), "none"),
        offload_params=first(config.offload_params, params.get("device"), "none"),
        nvme_path=parse_path(first(config.nvme_path, states.get("nvme_path"), params.get("nvme_path"), None)),
    )


def engine_lines(config: TrainingConfig, ds_config: Json) -> list[str]:
    """For people: what the engine of this JSON, which was made for this configuration, does with gradients."""
    zero = ds_config["zero_optimization"]
    parts = [f"engine       DeepSpeed ZeRO-{zero['stage']}", config.precision]
    summed = "4-bit integers" if zero.get("zero_quantized_gradients") else ds_config["communication_data_type"]
    parts.append(f"gradients accumulate in fp32 and are summed over ranks in {summed}")
    for what, name in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        if (device := zero.get(name, {}).get("device", "none")) != "none":
            parts.append(f"{what} on {device}")
    asked = zero_settings(config, read_overlay(config)).asked_stage
    lines = [", ".join(parts)]
    if asked != zero["stage"]:
        lines.append(
            f"             zero_stage {asked} in {config.precision} runs as ZeRO-{zero['stage']}: DeepSpeed's own "
            f"stage {asked} computes wrong updates there"
        )
    return lines


def deepspeed_config(config: TrainingConfig, derived: Derived, accelerator: str = "cuda") -> Json:
    """The complete JSON for this run, accepted by DeepSpeed's own configuration class.

    accelerator: "cuda" or "cpu"; only recommended settings depend on it (overlap, pinned memory).
    Raises UserError with every unknown, misplaced or contradicting key of the overlay.
    """
    overlay = read_overlay(config)
    problems = list(unsound(overlay, config.deepspeed_overlay or ""))
    zero = zero_settings(config, overlay)
    problems += _impossible(zero, config)
    bound = binding(config, derived, zero)
    asked = merge(bound, {"zero_optimization": {"stage": zero.asked_stage}})
    bound = merge(bound, _FIXED)
    recommended = _recommended(config, derived, zero, accelerator)
    recommended = merge(recommended, _buffers(merge(recommended, said(overlay)), config, derived, zero))
    problems += _too_small(recommended, overlay, config)
    problems += list(_contradictions(asked, merge(recommended, bound), overlay, config))
    if problems:
        raise UserError(problems, "the DeepSpeed configuration is wrong")
    complete = merge(merge(recommended, said(overlay)), bound)
    _pass_deepspeeds_own_check(complete, config, derived.world_size)
    return complete


def binding(config: TrainingConfig, derived: Derived, zero: ZeroSettings) -> Json:
    """What the configuration says of the engine, and an overlay must not say otherwise."""
    zero_json: Json = {"stage": zero.stage}
    for name, device in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_params)):
        if device != "none":
            zero_json[name] = {"device": device}
            if device == "nvme":
                zero_json[name]["nvme_path"] = zero.nvme_path
    if zero.offload_params == "nvme":
        # DeepSpeed, reading ahead from NVMe, asks for the same parameter twice, and for the last free buffer.
        zero_json["stage3_prefetch_bucket_size"] = 0
    return {
        "train_batch_size": derived.sequences_per_update,
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": derived.gradient_accumulation_steps,
        "optimizer": optimizer.optimizer_json(config),
        "scheduler": {
            "type": DEEPSPEED_NAME,
            "params": {
                "schedule": config.schedule,
                "training_steps": derived.updates,
                "warmup_steps": config.warmup_iterations,
                "max_lr": config.max_lr,
                "min_lr": config.min_lr,
            },
        },
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        # Always said: DeepSpeed clips at 1.0 where it is left out.
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": zero_json,
    }


# Any other value makes gradients, or the optimizer's state, something else than the head of a run says.
_FIXED: Json = {
    "bf16": {"bf16_master_weights_and_grads": False, "bf16_optimizer_states": False, "check_grad_overflow": True},
    "fp16": {"fp16_master_weights_and_grads": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "torch_autocast": {"enabled": False},
    "zero_optimization": {"compute_grad_norm": True},
    "gradient_allreduce_op": "mean",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
}
_FIXED_BECAUSE = {
    "bf16_master_weights_and_grads": "the optimizer's copies of the weights, and the sums of gradients, are fp32",
    "fp16_master_weights_and_grads": "the optimizer's copies of the weights, and the sums of gradients, are fp32",
    "bf16_optimizer_states": "the optimizer's states are fp32",
    "check_grad_overflow": "gradients that are not finite are never applied",
    "grad_accum_dtype": "gradients accumulate in fp32",
    "enabled": "the field precision decides, and autocast sums gradients in half precision, or scales them wrongly",
    "compute_grad_norm": "the norm of the gradients tells whether they are finite",
    "gradient_allreduce_op": "the gradient is the mean over all tokens of an update",
    "prescale_gradients": "sums over ranks are fp32, which needs no scaling beforehand",
    "gradient_predivide_factor": "sums over ranks are fp32, which needs no scaling beforehand",
}


def _recommended(config: TrainingConfig, derived: Derived, zero: ZeroSettings, accelerator: str) -> Json:
    bucket = min(_LARGEST_BUCKET, derived.parameters)
    zero_json: Json = {
        "contiguous_gradients": True,
        # At stage 2 a single rank has nothing to overlap, and would pay a second bucket for it.
        "overlap_comm": accelerator != "cpu" and (zero.stage == 3 or (zero.stage == 2 and derived.world_size > 1)),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    for name, device in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_params)):
        if device != "none":
            zero_json[name] = {"pin_memory": accelerator != "cpu"}
    if zero.offload_params == "nvme":
        # Left alone, the first 1e9 parameters would stay in host memory.
        zero_json["offload_param"]["max_in_cpu"] = 0
    return {
        # Left out, DeepSpeed sums gradients over the ranks in the model's type: each rounded to bf16, at every stage,
        # and at ZeRO-1 on a single rank too, whatever type they were accumulated in.
        "communication_data_type": "fp32",
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        "tensorboard": {"enabled": False},
        "csv_monitor": {"enabled": False},
        "wandb": {"enabled": False},
        "comet": {"enabled": False},
        "zero_optimization": zero_json,
    }


def _buffers(ds_config: Json, config: TrainingConfig, derived: Derived, settings: ZeroSettings) -> Json:
    """Host memory through which states and parameters pass from NVMe.

    An optimizer's sub-group takes four: weights, two moments, gradients. Of parameters a buffer is needed for each
    matrix that may be whole at once, of the size of a rank's part of the largest: DeepSpeed's own five are too few for
    any model and too small for one of 7B, and a run that has not enough ends in its first update.
    """
    zero, found = ds_config["zero_optimization"], dict[str, Json]()
    if settings.offload_optimizer == "nvme":
        found["offload_optimizer"] = {"buffer_count": 4}
    if settings.offload_params == "nvme":
        width, kv_width = config.n_embd, (config.n_kv_heads or config.n_heads) * derived.head_size
        block = [width * width, width * kv_width, width * kv_width, width * width, *[width * derived.ffn_hidden] * 3]
        table = derived.vocab_size * width
        matrices = [table, *block * config.n_layers, table]
        # What is needed again soon stays beyond the limit.
        room = max(zero.get(f"stage3_max_{name}", 1e9) for name in ("live_parameters", "reuse_distance"))
        # The longest row of them, in the order of their use, that fits there; and those of one block in work at least.
        most, first, held = len(block), 0, 0
        for last, size in enumerate(matrices):
            held += size
            while held > room:
                held -= matrices[first]
                first += 1
            most = max(most, last - first + 1)
        part = -(-max([*block, table]) // derived.world_size)
        found["offload_param"] = {"buffer_size": max(part, 2**20), "buffer_count": min(most + 2, len(matrices))}
    return {"zero_optimization": found}


def _too_small(recommended: Json, overlay: Json, config: TrainingConfig) -> list[Problem]:
    """Buffers of an overlay with which a run on NVMe would end in its first update."""
    problems, known = [], dict(leaves(recommended))
    for path, value in leaves(overlay):
        least = known.get(path) if path[-1] in ("buffer_size", "buffer_count") else None
        if isinstance(least, int) and type(value) is int and value < least:
            where = f"{config.deepspeed_overlay}: {'.'.join(path)}"
            problems.append(Problem(where, f"must be at least {least} for this model", "leave it out", value))
    return problems


def _impossible(zero: ZeroSettings, config: TrainingConfig) -> list[Problem]:
    """Combinations that only show once configuration and overlay are put together."""
    problems = []
    asked, device, params = zero.asked_stage, zero.offload_optimizer, zero.offload_params
    needed, remedy = f"needs zero_stage 3, not {asked}", "use --zero_stage 3"
    if type(asked) is not int or asked not in (0, 1, 2, 3):
        problems.append(Problem("zero_optimization.stage", "must be 0, 1, 2 or 3", "1 suits most runs", asked))
    elif params != "none" and asked != 3:
        problems.append(Problem("offload_params", needed, remedy, params))
    elif device != "none" and asked == 0:
        problems.append(Problem("offload_optimizer", "needs zero_stage 1 or more", "use --zero_stage 1", device))
    elif device == "nvme" and asked != 3:
        problems.append(Problem("offload_optimizer", f"to nvme {needed}", remedy, device))
    if zero.stage == 3 and config.check_replicas_interval:
        rule = "needs zero_stage 0 to 2: at 3 no two ranks hold the same weights"
        value = config.check_replicas_interval
        problems.append(Problem("check_replicas_interval", rule, "leave it out", value))
    if params == "nvme" and config.precision == "fp32":
        rule = "to nvme stores them as bf16, without a word, where precision is fp32"
        problems.append(Problem("offload_params", rule, "use --precision bf16, or --offload_params cpu", params))
    if "nvme" in (device, params) and not zero.nvme_path:
        problems.append(Problem("nvme_path", "must name a folder on the NVMe disk", "use --nvme_path /local/nvme"))
    return problems


def _contradictions(asked: Json, complete: Json, overlay: Json, config: TrainingConfig) -> Iterator[Problem]:
    """What an overlay says that is fixed otherwise, or `asked` for otherwise by the configuration, or "auto" where
    nothing in `complete` gives a value."""
    fixed, derived, known = dict(leaves(_FIXED)), dict(leaves(asked)), dict(leaves(complete))
    for path, value in leaves(overlay):
        where, remedy = f"{config.deepspeed_overlay}: {'.'.join(path)}", "leave it out of the overlay"
        if value == "auto" and not any(other[: len(path)] == path for other in known):
            yield Problem(where, "nothing derives this value", "write the value, or leave the key out", value)
        elif value in (None, "auto"):
            continue
        elif path in fixed and value != fixed[path]:
            rule = f"must be {json.dumps(fixed[path])}: {_FIXED_BECAUSE[path[-1]]}"
            yield Problem(where, rule, remedy, value)
        elif path in derived and value != derived[path]:
            rule = f"contradicts the configuration, which gives {json.dumps(derived[path])} ({_origin(path)})"
            if path[-1] not in ("type", "torch_adam", "fused"):
                remedy += ' or write "auto", and set it in the configuration'
            yield Problem(where, rule, remedy, value)
    # An offload that the configuration rules out is not a leaf of the binding, so it is compared by itself.
    for name, ours in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_params)):
        section = overlay.get("zero_optimization")
        theirs = section.get(name) if isinstance(section, dict) else None
        if ours == "none" and isinstance(theirs, dict) and theirs.get("device", "none") not in ("none", "auto"):
            yield Problem(
                f"{config.deepspeed_overlay}: zero_optimization.{name}.device",
                f'contradicts the configuration, which gives "none" ({_origin(("zero_optimization", name))})',
                "remove one of the two",
                theirs["device"],
            )


_ORIGINS = {
    "train_batch_size": "tokens_per_update / max_seq_len",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "tokens_per_update / (batch_size x max_seq_len x ranks)",
    "optimizer": optimizer.FIELDS,
    "scheduler": "schedule, max_lr, min_lr, warmup_iterations, training_tokens",
    "bf16": "precision",
    "fp16": "precision",
    "gradient_clipping": "gradient_clipping",
}


def _origin(path: tuple[str, ...]) -> str:
    zero = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_params", "stage": "zero_stage"}
    if path[-1] == "nvme_path":
        return "nvme_path"
    if path[-1] == "stage3_prefetch_bucket_size":
        return "offload_params nvme, from where DeepSpeed reads ahead wrongly"
    return zero[path[1]] if path[0] == "zero_optimization" else _ORIGINS[path[0]]


def _pass_deepspeeds_own_check(complete: Json, config: TrainingConfig, world_size: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    class Check(DeepSpeedConfig):
        def _configure_train_batch_size(self) -> None:
            # Outside a launch DeepSpeed believes in one rank; the triple is held against the real number.
            self.world_size = world_size
            super()._configure_train_batch_size()

    level = logger.level
    logger.setLevel("ERROR")
    try:
        Check(copy.deepcopy(complete))
    except Exception as error:  # DeepSpeed raises whatever comes: assertions, pydantic's errors, its own.
        rule = f"DeepSpeed refuses it: {' '.join(str(error).split())[:400]}"
        where = config.deepspeed_overlay or "the derived DeepSpeed configuration"
        problem = Problem(where, rule, "see the DeepSpeed configuration reference")
        raise UserError(problem, "the DeepSpeed configuration is wrong") from None
    finally:
        logger.setLevel(level)
