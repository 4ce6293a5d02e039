"""What the shared launches do for tests/training/test_gradients.py and test_skipping.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import exactness
from tests.conftest import Run, TinyData
from tests.launches import Call

STAGES = (0, 1, 2, 3)
ALWAYS = list(range(1, 21))
# Trainings whose gradients are NaN in some updates, by name: ranks, settings, the updates.
NAN: dict[str, tuple[int, dict[str, Any], list[int]]] = {
    "nan_fp32_stage0": (1, {"zero_stage": 0}, ALWAYS),
    "nan_fp32_stage1": (1, {"zero_stage": 1}, ALWAYS),
    "nan_fp32_stage3": (1, {"zero_stage": 3}, ALWAYS),
    "nan_bf16_stage2": (2, {"zero_stage": 2, "precision": "bf16"}, ALWAYS),
    "nan_from_6": (1, {"zero_stage": 1, "token_ckpt": 256, "max_skipped_updates": 2}, ALWAYS[5:]),
    "nan_at_the_end": (1, {"zero_stage": 2, "training_tokens": 7 * 256, "token_ckpt": "1G"}, [6, 7]),
    "nan_now_and_then": (2, {"zero_stage": 2, "token_ckpt": "1G"}, [4, 6, 7]),
    "nan_fp16": (1, {"zero_stage": 1, "precision": "fp16", "deepspeed_overlay": {"initial_scale_power": 3}}, ALWAYS),
    "static_fp16": (1, {"zero_stage": 2, "precision": "fp16", "deepspeed_overlay": {"loss_scale": 2.0**40}}, []),
    "fp16_too_short": (
        1,
        {
            "precision": "fp16",
            "training_tokens": 3 * 256,
            "warmup_iterations": 1,
            "deepspeed_overlay": {"initial_scale_power": 30},
        },
        [],
    ),
    # It skips until its scale is small enough: more than three times in a row, and that is right.
    "fp16_search": (1, {"zero_stage": 0, "precision": "fp16", "deepspeed_overlay": {"initial_scale_power": 28}}, []),
}
# Trainings that have trouble with some samples, by name: ranks, settings, and the plan of `train_with_trouble`. Eight
# samples are an update's.
_BACK = {"token_ckpt": 2 * 256, "training_tokens": 12 * 256}
_SPIKES = {"loss_spike_window": 4, "training_tokens": 12 * 256, "token_ckpt": "1G"}
TROUBLE: dict[str, tuple[int, dict[str, Any], dict[str, list[str]]]] = {
    "heals": (
        2,
        {"zero_stage": 1, "token_ckpt": "1G", "check_replicas_interval": 1},
        {"40": ["nan@1"], "72": ["gradients"]},
    ),
    "heals_with_dropout": (1, {"zero_stage": 2, "dropout": 0.2}, {"40": ["nan"]}),
    "skips_the_loss": (1, {"zero_stage": 0, "on_nonfinite_loss": "skip", **_SPIKES}, {"64": ["inf*"]}),
    "stops_at_the_loss": (1, {"zero_stage": 3, "token_ckpt": 256}, {"40": ["nan*"]}),
    "stops_at_gradients": (1, {"zero_stage": 1, "on_nonfinite_gradients": "stop"}, {"40": ["gradients*"]}),
    "rolls_back": (2, {"zero_stage": 1, "on_nonfinite_loss": "roll_back", **_BACK}, {"40": ["nan*"], "72": ["inf*"]}),
    "rolls_back_own_files": (
        1,
        {
            **{"zero_stage": 3, "on_nonfinite_gradients": "roll_back", "checkpoint_format": "deepspeed"},
            **_BACK,
        },
        {"40": ["gradients*"], "72": ["gradients*"]},
    ),
    "rolls_back_for_ever": (
        1,
        {"zero_stage": 2, "on_nonfinite_loss": "roll_back", "training_tokens": 12 * 256, "token_ckpt": 4 * 256},
        {str(first): ["nan*"] for first in range(40, 400, 8)},
    ),
    "spike_warned": (1, {"zero_stage": 2, "on_loss_spike": "warn", **_SPIKES}, {"64": ["spike*"]}),
    "spike_healed": (1, {"zero_stage": 1, "on_loss_spike": "stop", **_SPIKES}, {"64": ["spike"]}),
    "spike_skipped": (2, {"zero_stage": 3, "on_loss_spike": "skip", **_SPIKES}, {"64": ["spike*"]}),
    "spike_skipped_plain": (1, {"zero_stage": 0, "on_loss_spike": "skip", **_SPIKES}, {"64": ["spike*"]}),
    "spike_stopped": (1, {"zero_stage": 1, "on_loss_spike": "stop", **_SPIKES}, {"64": ["spike*"]}),
    "spike_rolled_back": (
        1,
        {"zero_stage": 2, "on_loss_spike": "roll_back", **_SPIKES, "token_ckpt": 3 * 256},
        {"64": ["spike*"]},
    ),
    "rolls_back_to_nothing": (
        1,
        {"zero_stage": 2, "on_nonfinite_loss": "roll_back", "token_ckpt": 256},
        {"8": ["damage*"]},
    ),
    "replicas": (2, {"zero_stage": 0, "check_replicas_interval": 4, "token_ckpt": 256}, {"40": ["bit@1"]}),
}
EXACT = {
    f"exact_{precision}_stage{stage}": {"precision": precision, "zero_stage": stage, "gradient_clipping": clipping}
    for precision, clipping in (("fp32", 0.0), ("bf16", exactness.CLIPPING))
    for stage in STAGES
}
EXACT |= {f"exact_unclipped_stage{s}": {"precision": "bf16", "zero_stage": s, "gradient_clipping": 0.0} for s in (1, 3)}
AFTER_A_LOAD = [*(("fp32", stage) for stage in STAGES), ("bf16", 1), ("bf16", 2), ("fp16", 1), ("fp16", 3)]


def work(folder: Path, data: TinyData, ranks: int) -> tuple[dict[str, Call], dict[str, Run]]:
    """The calls of a launch, and the trainings among them."""
    tasks, runs = "tests.engine_tasks", {}
    calls = {name: _exact(folder / name, settings) for name, settings in EXACT.items()}
    for name, (nan_ranks, settings, updates) in NAN.items():
        if nan_ranks == ranks:
            fp16 = settings.get("precision") == "fp16"
            if fp16:
                overlay = _overlay(folder, name, {"fp16": settings["deepspeed_overlay"]})
                settings = {**settings, "deepspeed_overlay": overlay}
            runs[name] = Run(folder / name, {**data.settings, **settings})
            arguments = {"words": runs[name].words(), "updates": updates, "fp16": fp16}
            calls[name] = Call(f"{tasks}:train_with_nan", arguments)
    for name, (trouble_ranks, settings, plan) in TROUBLE.items():
        if trouble_ranks == ranks:
            runs[name] = Run(folder / name, {**data.settings, **settings})
            calls[name] = Call(f"{tasks}:train_with_trouble", {"words": runs[name].words(), "plan": plan})
    if ranks == 2:
        before = runs["rolls_back"]  # of before its rollbacks, in a folder of its own
        settings = {**before.settings, "load_ckpt": before.checkpoint(2)}
        again = runs["rolled_back_again"] = Run(folder / "rolled_back_again", settings)
        calls["rolled_back_again"] = Call(f"{tasks}:train", {"argv": again.words()})
    if ranks == 1:
        calls |= _going_back(folder, runs)
        more = {**runs["nan_at_the_end"].settings, "load_ckpt": "auto", "training_tokens": 20 * 256}
        going_on = Run(folder / "nan_at_the_end", more)
        calls["nan_again"] = Call(f"{tasks}:train_with_nan", {"words": going_on.words(), "updates": ALWAYS})
    if ranks == 2:
        rounded = {"deepspeed_overlay": _overlay(folder, "bf16_sums", {"communication_data_type": "bf16"})}
        calls["exact_rounded"] = _exact(folder / "exact_rounded", {**EXACT["exact_bf16_stage1"], **rounded})
        calls["draws"] = Call(f"{tasks}:draws", {"stage": 3})
    else:
        calls |= {name: Call(f"{tasks}:{name}") for name in ("module_stack", "timeouts")}
    for precision, stage in AFTER_A_LOAD if ranks == 1 else [("bf16", 1)]:
        arguments = {"stage": stage, "precision": precision}
        calls[f"after_a_load_{precision}_{stage}"] = Call(f"{tasks}:settings_after_a_load", arguments)
    return calls, runs


def _going_back(folder: Path, runs: dict[str, Run]) -> dict[str, Call]:
    """Trainings that go on from a checkpoint, and back to it or beyond."""
    source = runs["stops_at_the_loss"]  # which has checkpoints 1 to 5
    later = {"load_ckpt": source.checkpoint(5), "on_nonfinite_loss": "roll_back"}
    for_ever = runs["rolls_back_for_ever"]
    plans: dict[str, tuple[Run, dict[str, list[str]]]] = {
        "rolls_back_past_its_start": (
            Run(folder / "rolls_back_past_its_start", {**source.settings, **later, "token_ckpt": "1G"}),
            {"40": ["nan*"]},
        ),
        "rolls_back_further": (
            Run(folder / "rolls_back_further", {**source.settings, **later}),
            {"56": ["damage*"]},
        ),
        "rolls_back_for_ever_again": (
            Run(for_ever.folder, {**for_ever.settings, "load_ckpt": "auto"}),
            TROUBLE["rolls_back_for_ever"][2],
        ),
    }
    runs |= {name: run for name, (run, _) in plans.items()}
    return {
        name: Call("tests.engine_tasks:train_with_trouble", {"words": run.words(), "plan": plan})
        for name, (run, plan) in plans.items()
    }


def _exact(folder: Path, settings: dict[str, Any]) -> Call:
    return Call("tests.exactness:trained", {"settings": settings, "folder": str(folder), "snapshots": [1]})


def _overlay(folder: Path, name: str, content: dict[str, Any]) -> str:
    # Beside the launch's folder, which must be new.
    path = folder.with_name(f"{folder.name}_{name}.json")
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)
