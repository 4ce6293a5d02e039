"""The configuration: textbook defaults, readable sizes, round trips, derived numbers, and the DeepSpeed JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllama.config import TrainingConfig, load_config
from dsllama.deepspeed_config import deepspeed_config
from dsllama.derived import derive
from dsllama.errors import UserError
from dsllama.rules import check_world_size
from dsllama.sizes import parse_count

ROOT = Path(__file__).resolve().parent.parent
READY = sorted(ROOT.glob("configs/*.yaml"))
OVERLAYS = sorted(ROOT.glob("ds_configs/*.json"))


def ds_json(world_size: int = 8, **fields: Any) -> dict[str, Any]:
    config = TrainingConfig(**fields)
    return deepspeed_config(config, derive(config, world_size, 8192), "cpu")


def test_the_textbooks_fields_have_its_defaults() -> None:
    config = TrainingConfig()
    textbook = dict(
        batch_size=4,
        max_seq_len=2048,
        tokens_per_update=2**19,
        n_embd=2048,
        n_heads=32,
        n_layers=24,
        multiple_of=256,
        eps=1e-5,
        theta=10_000,
        dropout=0.0,
        warmup_iterations=500,
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        training_tokens=45_000_000_000,
        eval_interval=32,
        model_gen_multiplier=1.5,
        token_ckpt=1_000_000_000,
    )
    assert {name: getattr(config, name) for name in textbook} == textbook


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("45e9", 45_000_000_000),
        ("2**19", 524288),
        ("512K", 524288),
        ("1_000", 1000),
        ("2M", 2 * 2**20),
        ("45B", 45 * 10**9),
        ("1.5e3", 1500),
        (7, 7),
        (7.0, 7),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_may_be_written_as_people_do(text: Any, number: int) -> None:
    assert (
        TrainingConfig(
            training_tokens=text, warmup_iterations=0, tokens_per_update=1, max_seq_len=1, batch_size=1
        ).training_tokens
        == number
        == parse_count(text)
    )


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
@pytest.mark.parametrize("source", READY, ids=lambda p: p.name)
def test_a_configuration_survives_its_file(source: Path, name: str, tmp_path: Path) -> None:
    config = load_config(source)
    config.save(tmp_path / name)
    assert load_config(tmp_path / name) == config


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.floats(1e-9, 1e3),
    st.integers(0, 2**63 - 1),
    # What a shell takes otherwise, and what is no path, has a test of its own.
    st.text(st.characters(exclude_characters="\0$~", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
        str.strip
    ),
    st.lists(st.text(max_size=9), max_size=3),
)
def test_any_value_survives_yaml_and_json(rate: float, seed: int, path: str, prompts: list[str]) -> None:
    import tempfile

    config = TrainingConfig(max_lr=rate, min_lr=rate / 3, seed=seed, dataset_dir=path, sample_prompts=prompts)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("c.yaml", "c.json"):
            config.save(Path(folder) / name)
            assert load_config(Path(folder) / name) == config


def test_overrides_win_over_the_file_and_are_named_when_wrong(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("max_lr: 1.0e-3\nn_layers: 3\n")
    config = load_config(tmp_path / "c.yaml", {"n_layers": 5})
    assert (config.max_lr, config.n_layers) == (1e-3, 5)
    with pytest.raises(UserError, match="--n_layers") as raised:
        load_config(tmp_path / "c.yaml", {"n_layers": -5})
    assert len(raised.value.problems) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 64), st.integers(1, 512), st.integers(1, 64), st.integers(1, 2**21))
def test_suggested_values_really_divide(batch: int, length: int, world_size: int, tokens: int) -> None:
    config = TrainingConfig(batch_size=batch, max_seq_len=length, tokens_per_update=batch * length, warmup_iterations=0)
    config = config.model_copy(update={"tokens_per_update": tokens})
    for problem in check_world_size(config, world_size):
        parts = problem.remedy.removeprefix("use ").split(", or ")
        assert parts[0].startswith("tokens_per_update ")
        for value in parts[0].removeprefix("tokens_per_update ").split(" or "):
            assert check_world_size(config.model_copy(update={"tokens_per_update": int(value)}), world_size) == []
        for part in parts[1:]:
            for value in part.removeprefix("batch_size ").removesuffix(" ranks").split(" or "):
                changed = config.model_copy(update={"batch_size": int(value)}) if "batch" in part else config
                assert check_world_size(changed, world_size if "batch" in part else int(value)) == []


def test_derived_numbers_are_the_closed_forms() -> None:
    derived = derive(TrainingConfig(), 8, 8192)
    # Llama's shape by hand: 24 blocks of 4 D*D + 3 D*5632 + 2 D, final norm, head, embedding; D = 2048.
    blocks = 24 * (4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048) + 2048
    assert derived.parameters_without_embedding == blocks + 8192 * 2048
    assert derived.parameters == blocks + 2 * 8192 * 2048
    assert derived.flops_per_token == 6 * (blocks + 8192 * 2048) + 12 * 24 * 2048 * 2048
    assert (derived.gradient_accumulation_steps, derived.updates) == (8, 85_831)


def test_every_budget_of_two_decimals_is_a_whole_number() -> None:
    for hundredths in range(1, 2000):
        text = f"{hundredths // 100}.{hundredths % 100:02d}"
        assert parse_count(f"{text}B") == parse_count(f"{text}e9") == hundredths * 10**7
    assert (parse_count("0.5K"), parse_count(" 1_000 "), parse_count("2**19")) == (512, 1000, 524288)


def test_what_people_type_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = TrainingConfig(
        dataset_dir="~/data", ckpt_dir="${SCRATCH}/run", log_file="$SCRATCH/log.csv", load_ckpt="AUTO"
    )
    places = (config.dataset_dir, config.ckpt_dir, config.log_file)
    assert places == ("/home/me/data", "/scratch/me/run", "/scratch/me/log.csv")
    assert config.load_ckpt == "auto" and TrainingConfig(load_ckpt="$SCRATCH/run/update_1").load_ckpt == (
        "/scratch/me/run/update_1"
    )
    assert TrainingConfig(precision="BF16", schedule="Linear", zero_stage="2").zero_stage == 2
    # What is there under its literal name is meant.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$SCRATCH").mkdir()
    assert TrainingConfig(ckpt_dir="$SCRATCH").ckpt_dir == "$SCRATCH"


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_a_file_with_a_byte_order_mark_is_read(name: str, tmp_path: Path) -> None:
    TrainingConfig(seed=7).save(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert load_config(tmp_path / name).seed == 7


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_deepspeed_json_is_complete_and_says_what_the_configuration_says(
    world_size: int, stage: int, precision: str
) -> None:
    # DeepSpeed's own class has read it: deepspeed_config raises otherwise.
    content = ds_json(world_size, zero_stage=stage, precision=precision, gradient_clipping=0.5)
    batch = [content[k] for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    assert batch == [256, 4, 64 // world_size]
    assert '"auto"' not in json.dumps(content)
    assert content["gradient_clipping"] == 0.5
    # DeepSpeed's own stage 0 computes wrong updates in half precision.
    assert content["zero_optimization"]["stage"] == (stage if precision == "fp32" else max(stage, 1))
    assert (content["bf16"]["enabled"], content["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")
    assert content["data_types"]["grad_accum_dtype"] == content["communication_data_type"] == "fp32"
    assert content["scheduler"] == {
        "type": "DsllamaScheduler",
        "params": {"schedule": "cosine", "training_steps": 85831, "warmup_steps": 500, "max_lr": 3e-4, "min_lr": 3e-5},
    }


def test_an_overlay_may_ask_for_stage_0_in_half_precision_and_for_another_type_of_the_sums(tmp_path: Path) -> None:
    overlay = tmp_path / "o.json"
    overlay.write_text('{"zero_optimization": {"stage": 0}, "communication_data_type": "bf16"}')
    content = ds_json(deepspeed_overlay=str(overlay), precision="bf16")
    assert content["zero_optimization"]["stage"] == 1 and content["communication_data_type"] == "bf16"
    with pytest.raises(UserError, match=r"zero_optimization.stage = 0: contradicts .* which gives 2"):
        ds_json(deepspeed_overlay=str(overlay), precision="bf16", zero_stage=2)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.name)
def test_every_ready_overlay_can_be_laid_over_a_configuration(overlay: Path) -> None:
    content = ds_json(deepspeed_overlay=str(overlay), nvme_path="/nvme" if "nvme" in overlay.name else None)
    asked = json.loads(overlay.read_text().replace('"auto"', '"/nvme"'))["zero_optimization"]
    assert content["zero_optimization"]["stage"] == asked["stage"]
    for part in ("offload_optimizer", "offload_param"):
        if part in asked:
            assert asked[part].items() <= content["zero_optimization"][part].items()


def test_an_overlay_may_repeat_or_leave_to_auto_what_is_derived_and_tune_the_rest(tmp_path: Path) -> None:
    overlay = tmp_path / "o.json"
    overlay.write_text(
        json.dumps(
            {
                "train_batch_size": "auto",
                "steps_per_print": "auto",
                "communication_data_type": None,
                "gradient_clipping": None,
                "train_micro_batch_size_per_gpu": 4,
                "bf16": {"enabled": "auto"},
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 123456, "allgather_bucket_size": "auto"},
                "optimizer": {"params": {"lr": "auto"}},
            }
        )
    )
    content = ds_json(deepspeed_overlay=str(overlay))
    assert content["zero_optimization"]["reduce_bucket_size"] == 123456
    silent = ds_json(zero_stage=2)
    for name in ("steps_per_print", "communication_data_type", "gradient_clipping"):
        assert content[name] == silent[name]
    assert content["zero_optimization"]["allgather_bucket_size"] == silent["zero_optimization"]["allgather_bucket_size"]
    assert content["train_batch_size"] == 256 and content["optimizer"]["params"]["lr"] == 3e-4


@pytest.mark.parametrize("path", READY, ids=lambda p: p.name)
def test_ready_configurations_run_on_their_number_of_gpus(path: Path) -> None:
    config = load_config(path)
    for world_size in (1, 2) if path.name == "quickstart.yaml" else (1, 2, 4, 8, 16):
        deepspeed_config(config, derive(config, world_size, 8192), "cuda")
