"""The self-test finds each fault that is planted into an engine, by part and factor, and is quiet otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dsllama import selftest
from dsllama.checkpoint.catalog import open_checkpoint
from dsllama.config import load_config
from dsllama.deepspeed_config import deepspeed_config
from dsllama.derived import derive
from dsllama.training.reduced import reduced
from tests.conftest import Run, TinyData
from tests.launches import Call, Launch

Json = dict[str, Any]
# Four micro-steps on two ranks.
BASE: Json = {"zero_stage": 1, "precision": "fp32", "batch_size": 2, "tokens_per_update": 16 * 32}
# Fault -> settings, and what the self-test must say first: what, part, factor (None: any).
FAULTS: dict[str, tuple[Json, list[tuple[str, str, float | None]]]] = {
    "times accumulation": ({}, [("gradient norm", "all", 4.0)]),
    "divided by ranks": ({"zero_stage": 2, "precision": "bf16"}, [("gradient norm", "all", 0.5)]),
    "no gradient in attention": ({"zero_stage": 3}, [("exp_avg", "attention", 0.0), ("exp_avg_sq", "attention", 0.0)]),
    "rounded reduction": ({"precision": "bf16"}, [("exp_avg", part, 1.0) for part in ("attention", "head")]),
    "stage 0 in bf16": ({"precision": "bf16"}, [("AdamW's step", "all", None), ("weight at the start", "head", None)]),
    "one step too many": ({"zero_stage": 2}, [("AdamW's step", "all", None), ("weight at the start", "norms", None)]),
    "twice the decay": ({"zero_stage": 2}, [("weight's change", part, None) for part in ("head", "norms")]),
    "late rate": ({}, [("learning rate", "all", None)]),
    "no clipping": ({"zero_stage": 3, "precision": "bf16"}, [("exp_avg", part, None) for part in ("head", "norms")]),
    "tiled loss": ({"precision": "bf16"}, [("exp_avg", "head", 0.0)]),
    "other data": ({"zero_stage": 2}, [("loss", "all", None), ("gradient norm", "all", None)]),
    "stale copy": ({}, [("weight's copy", "norms", None)]),
    "moments lost": ({}, [("exp_avg_sq after loading", part, 0.0) for part in ("embedding", "norms", "head")]),
}
QUIET: dict[str, Json] = {
    "fp32, stage 0": {"zero_stage": 0},
    "bf16, stage 0, which runs as 1": {"zero_stage": 0, "precision": "bf16"},
    "bf16, stage 2, checkpointing": {"zero_stage": 2, "precision": "bf16", "activation_checkpointing": True},
    "bf16, stage 3, one micro-step, no clipping": {
        "zero_stage": 3, "precision": "bf16", "tokens_per_update": 4 * 32, "gradient_clipping": 0.0,
    },
    "fp32, stage 3, tied, grouped": {"zero_stage": 3, "tie_embeddings": True, "n_kv_heads": 2},
    "fp16, stage 2": {"zero_stage": 2, "precision": "fp16"},
    "one position, whose queries have no gradient; one rate": {
        "zero_stage": 3, "max_seq_len": 1, "tokens_per_update": 16, "training_tokens": 320,
        "max_lr": 2e-4, "min_lr": 2e-4,
    },
    "offload, whose Adam rounds slow decays": {
        "zero_stage": 2, "offload_optimizer": "cpu", "beta1": 0.999, "beta2": 0.9999,
    },
    "DeepSpeed's own files": {"zero_stage": 2, "checkpoint_format": "deepspeed"},
}  # fmt: skip
# Left to `long`: a spread of the others is looked at each time.
LONG = {
    "divided by ranks", "one step too many", "twice the decay", "other data", "stale copy", "tiled loss",
    "fp32, stage 0", "bf16, stage 2, checkpointing", "fp16, stage 2", "DeepSpeed's own files",
}  # fmt: skip


def spread(names: Iterable[str]) -> list[Any]:
    """For parametrize: those of LONG are marked."""
    return [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in names]


# So that the search for what is to blame is a short one.
FEW_SWITCHES: Json = {"gradient_clipping": 0.0, "weight_decay": 0.0, "use_flash_attention": False}
BLAMED = "no gradient where recomputed"


def _on(settings: Json, root: Path, **more: Any) -> Call:
    return Call("tests.selftests:verdict", {"settings": BASE | settings, "root": str(root), **more})


@pytest.fixture(scope="module")
def runs(shared_folder: Path, tiny_data: TinyData) -> dict[str, Run]:
    """Trainings of three updates, most with the self-test before the first."""
    root = shared_folder / "selftest_runs"
    settings = {**tiny_data.settings, "training_tokens": 3 * 256, "warmup_iterations": 1}
    tested = {**settings, "self_test": "auto"}
    found = {"off": settings, "first": tested, "second": tested, "other": {**tested, "n_layers": 1}}
    found["faulty"] = tested | FEW_SWITCHES
    runs = {name: Run(root / name, each) for name, each in found.items()}
    longer = {**tested, "training_tokens": 4 * 256, "load_ckpt": "auto", "use_prev_scheduler": False}
    return runs | {"longer": Run(root / "first", longer)}


def _verdicts(root: Path) -> dict[str, Any]:
    faulty = {fault: _on(settings, root, fault=fault) for fault, (settings, _) in FAULTS.items()}
    return faulty | {name: _on(settings, root) for name, settings in QUIET.items()}


@pytest.fixture(scope="module")
def verdicts(shared_folder: Path, launch: Launch) -> Callable[[str], Json]:
    """The verdict of each, by name."""
    root = shared_folder / "selftest_root_long"
    rest = Launch(shared_folder / "selftest_long", 2, {n: c for n, c in _verdicts(root).items() if n in LONG})
    return lambda name: (rest if name in LONG else launch)[name].value


@pytest.fixture(scope="module")
def launch(shared_folder: Path, runs: dict[str, Run]) -> Launch:
    """Both ranks: every fault, a spread of what is sound, and trainings."""
    root = shared_folder / "selftest_root"
    work = {name: call for name, call in _verdicts(root).items() if name not in LONG}
    work[BLAMED] = _on(FEW_SWITCHES | {"activation_checkpointing": True}, root, fault=BLAMED, search=True)
    for name, run in runs.items():
        arguments = {"words": run.words(), "cache": str(root / "cache")}
        fault = {"fault": "times accumulation"} if name == "faulty" else {}
        if fault:
            arguments["cache"] = str(root / "no_cache")
        work[f"run {name}"] = Call("tests.selftests:train", arguments | fault)
    return Launch(shared_folder / "selftest", 2, work)


@pytest.mark.parametrize("fault", spread(FAULTS))
def test_names_each_fault_by_part_and_factor(verdicts: Callable[[str], Json], fault: str) -> None:
    told = verdicts(fault)
    assert told["result"] == "failed"
    found = {(each["what"], each["part"]): each for each in told["failed"]}
    for what, part, factor in FAULTS[fault][1]:
        each = found[what, part]
        assert each["deviation"] > 10 * each["limit"], each
        assert f"{what} " in told["said"]
        if factor is not None:
            assert each["factor"] == pytest.approx(factor, abs=2e-3)


@pytest.mark.parametrize("name", spread(QUIET))
def test_is_quiet_on_sound_engines(verdicts: Callable[[str], Json], name: str) -> None:
    _assert_quiet(verdicts(name))


def _assert_quiet(told: Json) -> None:
    assert told["result"] == "passed", told["said"]
    assert max(told["margins"].values()) < 0.1, told["margins"]


def test_finds_the_setting_that_is_to_blame(launch: Launch) -> None:
    told = launch[BLAMED].value
    assert told["blame"] == ["activation_checkpointing True"], told["said"]
    assert "it passes without activation_checkpointing True" in told["said"]


def test_a_run_is_tested_once_and_says_so(launch: Launch, runs: dict[str, Run]) -> None:
    first, second, other, longer = (launch[f"run {name}"] for name in ("first", "second", "other", "longer"))
    assert [each.value for each in (first, second, other, longer)] == [0, 0, 0, 0]
    assert "self-test    passed" in first.said and "known since" not in first.said
    assert "self-test    passed" in second.said and "known since" in second.said
    assert "self-test    passed" in other.said and "known since" not in other.said  # another model
    assert "self-test    passed" in longer.said and "known since" not in longer.said  # another schedule
    verdict = open_checkpoint(runs["first"].checkpoint(3)).manifest["self_test"]
    assert verdict["result"] == "passed" and verdict["worst"]["ratio"] < 0.1
    assert open_checkpoint(runs["second"].checkpoint(3)).manifest["self_test"] == verdict


def test_it_leaves_the_run_as_it_is(launch: Launch, runs: dict[str, Run]) -> None:
    off = launch["run off"]
    assert off.value == 0 and "self-test    off" in off.said
    tested = runs["first"].losses()
    assert {update: tested[update] for update in (1, 2, 3)} == runs["off"].losses()
    names = [sorted(path.name for path in (runs[each].folder / "checkpoints").iterdir()) for each in ("first", "off")]
    assert names[0] == [*names[1], "update_0000004"]
    assert open_checkpoint(runs["off"].checkpoint(3)).manifest["self_test"] == {"result": "off"}


def test_a_run_whose_engine_is_wrong_does_not_begin(launch: Launch, runs: dict[str, Run]) -> None:
    faulty = launch["run faulty"]
    assert faulty.code == 0 and faulty.value == 1
    assert "self-test    FAILED" in faulty.said and "gradient norm" in faulty.said
    assert "it passes without gradient accumulation" in faulty.said
    assert not list((runs["faulty"].folder / "checkpoints").glob("update_*"))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"result": "failed", "failed": []}', '{"key": "k"}'])
def test_what_is_kept_and_damaged_is_tested_again(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dsllama" / "selftest").mkdir(parents=True)
    (tmp_path / "dsllama" / "selftest" / "k.json").write_text(content)
    assert selftest._kept("k") is None


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("file", ["125M", "350M", "1.3B", "7B"])
def test_a_reduced_run_is_one_that_deepspeed_accepts(file: str, stage: int) -> None:
    changes = {"zero_stage": stage, "tokens_per_update": 2**19}
    config = load_config(f"configs/{file}.yaml", changes)
    for vocabulary in (8192, 32000, 50257):
        derived = derive(config, 8, vocabulary)
        small = reduced(config, derived, deepspeed_config(config, derived, "cpu"))
        zero = small.json["zero_optimization"]
        assert zero["allgather_bucket_size"] % 2 == 0  # it refuses odd ones
        assert small.derived.parameters < 4e6
        assert zero["reduce_bucket_size"] * derived.parameters <= 200_000_000 * small.derived.parameters


def test_what_rounds_by_design_or_cannot_be_built_twice_is_not_tested() -> None:
    for key, value in {"zero_quantized_gradients": True, "zero_hpz_partition_size": 2}.items():
        assert "self-test    none" in selftest.untestable({"zero_optimization": {"stage": 3, key: value}})
    assert selftest.untestable({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}}) == ""


# ---------------------------------------------------------------- all of it

_MATRIX = [
    {
        "zero_stage": stage, "precision": precision, "offload_optimizer": offload, "steps": steps,
        "activation_checkpointing": recompute,
    }
    for stage, precision, offload, steps, recompute in product(
        (0, 1, 2, 3), ("bf16", "fp32"), ("none", "cpu", "nvme"), (1, 4), (False, True)
    )
    if offload == "none" or (offload == "cpu" and stage) or (offload == "nvme" and stage == 3)
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_is_quiet_on_the_whole_matrix(shared_folder: Path, ranks: int, offload: str) -> None:
    root = shared_folder / f"matrix_{offload}"
    # Wide enough for DeepSpeed to swap.
    nvme = {"nvme_path": str(root), "n_embd": 256} if offload == "nvme" else {}
    work, worst = {}, 0.0
    for case in _MATRIX:
        if case["offload_optimizer"] == offload:
            settings = {**case, **nvme}
            settings["tokens_per_update"] = 2 * 32 * ranks * settings.pop("steps")
            work[str(case)] = _on(settings, root)
    launch = Launch(shared_folder / f"selftest_matrix_{ranks}_{offload}", ranks, work)
    for name in work:
        _assert_quiet(launch[name].value)
        worst = max(worst, *launch[name].value["margins"].values())
    print(f"{len(work)} on {ranks} ranks, {offload}: the largest deviation is {worst:.2g} of its limit")


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_is_quiet_when_compiled(shared_folder: Path, precision: str) -> None:
    settings = {"enable_compilation": True, "precision": precision}
    work = {f"stage {stage}": _on(settings | {"zero_stage": stage}, shared_folder) for stage in (0, 1, 2, 3)}
    launch = Launch(shared_folder / f"selftest_compiled_{precision}", 2, work)
    for name in work:
        _assert_quiet(launch[name].value)
        print(precision, name, launch[name].value["margins"])


@pytest.mark.long
def test_finds_moments_that_deepspeeds_own_load_loses_on_nvme(shared_folder: Path) -> None:
    root = shared_folder / "lost"
    settings = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": str(root), "n_embd": 256}
    work = {"lost": _on(settings | {"checkpoint_format": "deepspeed"}, root, search=True)}
    told = Launch(shared_folder / "selftest_lost", 2, work)["lost"].value
    print(told["said"])
    assert told["result"] == "failed"
    assert {"exp_avg after loading", "exp_avg_sq after loading"} <= {each["what"] for each in told["failed"]}
    assert told["blame"] == ["offload_optimizer nvme", "checkpoint_format deepspeed", "zero_stage 3"]
