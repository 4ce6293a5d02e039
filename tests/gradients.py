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
    "nan_bf16_stage0": (1, {"zero_stage": 0, "precision": "bf16"}, ALWAYS),
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
    if ranks == 1:
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


def _exact(folder: Path, settings: dict[str, Any]) -> Call:
    return Call("tests.exactness:trained", {"settings": settings, "folder": str(folder), "snapshots": [1]})


def _overlay(folder: Path, name: str, content: dict[str, Any]) -> str:
    # Beside the launch's folder, which must be new.
    path = folder.with_name(f"{folder.name}_{name}.json")
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)
