"""Some two hundred ways to get it wrong: each ends with exit code 2 and one screen that names what, why and what to do.

They go through the same `main` as `deepspeed launch/train.py` and `dsllama`; a few go through the real launcher.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsllama import cli
from dsllama.data.encode import encode
from dsllama.data.tokenizer import train_tokenizer
from dsllama.training.run import main as train
from tests.conftest import REPOSITORY, TinyData, deepspeed_command, one_clear_screen, options, run, starts_processes

Prepare = Callable[[Path, dict[str, Any]], None]


def overlay(content: Any) -> Prepare:
    """Lay a DeepSpeed JSON over the configuration."""

    def prepare(folder: Path, settings: dict[str, Any]) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "overlay.json").write_text(text, encoding="utf-8")
        settings["deepspeed_overlay"] = folder / "overlay.json"

    return prepare


def config_file(text: str, name: str = "c.yaml") -> Prepare:
    """Give the settings in a file as well."""

    def prepare(folder: Path, settings: dict[str, Any]) -> None:
        (folder / name).write_text(text, encoding="utf-8")
        settings["config"] = folder / name

    return prepare


def shards(**arrays: Any) -> Prepare:
    """Replace the data set by these arrays."""

    def prepare(folder: Path, settings: dict[str, Any]) -> None:
        (folder / "bad").mkdir()
        for name, array in arrays.items():
            np.save(folder / "bad" / f"{name}.npy", array)
        settings["dataset_dir"] = folder / "bad"

    return prepare


def truncated_shard(folder: Path, settings: dict[str, Any]) -> None:
    shards(a=np.zeros(5000, np.uint16))(folder, settings)
    file = folder / "bad" / "a.npy"
    file.write_bytes(file.read_bytes()[:-100])


def garbage_shard(folder: Path, settings: dict[str, Any]) -> None:
    shards(a=np.zeros(5000, np.uint16))(folder, settings)
    (folder / "bad" / "b.npy").write_bytes(b"this is no array")


def bad_manifest(folder: Path, settings: dict[str, Any]) -> None:
    shards(a=np.zeros(5000, np.uint16))(folder, settings)
    (folder / "bad" / "manifest.json").write_text('{"format": "dsllama-shards-1", "tokens"', encoding="utf-8")


def other_tokenizer(folder: Path, settings: dict[str, Any]) -> None:
    """Data that were encoded with another tokenizer than the one that is named."""
    (folder / "text.txt").write_text("one text " * 2000, encoding="utf-8")
    train_tokenizer([folder / "text.txt"], folder / "other.json", vocab_size=280)
    encode([folder / "text.txt"], folder / "other.json", folder / "encoded", workers=1, progress=False)
    settings["dataset_dir"] = folder / "encoded"


def tokenizer(text: str) -> Prepare:
    def prepare(folder: Path, settings: dict[str, Any]) -> None:
        (folder / "tok.json").write_text(text, encoding="utf-8")
        settings["tokenizer_path"] = folder / "tok.json"

    return prepare


def notes_as_log(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "notes.txt").write_text("what I must not lose", encoding="utf-8")
    settings["log_file"] = folder / "notes.txt"


def file_in_the_way(**places: str) -> Prepare:
    """Settings that need folders where there is a file."""

    def prepare(folder: Path, settings: dict[str, Any]) -> None:
        (folder / "file").write_text("", encoding="utf-8")
        settings |= {name: folder / place for name, place in places.items()}

    return prepare


def manifest(text: str) -> Prepare:
    """Resume from a folder with nothing but this manifest."""

    def prepare(folder: Path, settings: dict[str, Any]) -> None:
        settings["load_ckpt"] = folder / "update_0000001"
        settings["load_ckpt"].mkdir()
        (settings["load_ckpt"] / "manifest.json").write_text(text, encoding="utf-8")

    return prepare


def mine(name: str, log_file: str) -> Prepare:
    """A file of the user's, and a log beside it."""

    def prepare(folder: Path, settings: dict[str, Any]) -> None:
        (folder / name).write_text("mine", encoding="utf-8")
        settings["log_file"] = folder / log_file

    return prepare


def circle(**places: str) -> Prepare:
    """Settings that name a link which leads to itself."""

    def prepare(folder: Path, settings: dict[str, Any]) -> None:
        for name, place in places.items():
            (folder / place).symlink_to(folder / place)
            settings[name] = folder / place

    return prepare


def some(**settings: Any) -> Prepare:
    """Only other settings."""
    return lambda folder, target: target.update(settings)


# Aliases of aliases: nine lines that are 9**9 letters when they are written out.
LAUGHS = "\n".join(["a: &a [x]", *(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghij"))])
LAUGHS += "\nn_layers: *j\n"

# what is wrong -> (how to get there, words that the message must hold)
TRAINING: dict[str, tuple[Prepare, list[str]]] = {
    # --- single fields
    "unknown option": (some(max_Ir="3e-4"), ["--max_Ir", "did you mean 'max_lr'"]),
    "no number": (some(max_lr="fast"), ["--max_lr", "'fast'", "not a number"]),
    "negative rate": (some(max_lr=-1), ["--max_lr", "greater than 0"]),
    "rate not finite": (some(max_lr="inf"), ["--max_lr", "finite"]),
    "rate nan": (some(min_lr="nan"), ["--min_lr", "finite"]),
    "fraction of a token": (some(tokens_per_update="1.5"), ["--tokens_per_update", "whole number"]),
    "zero batch": (some(batch_size=0), ["--batch_size", "greater than 0"]),
    "negative length": (some(max_seq_len=-32), ["--max_seq_len", "greater than 0"]),
    "no layers": (some(n_layers=0), ["--n_layers", "greater than 0"]),
    "beta of one": (some(beta1=1), ["--beta1", "less than 1"]),
    "dropout of one": (some(dropout="1.0"), ["--dropout", "less than 1"]),
    "negative clipping": (some(gradient_clipping=-1), ["--gradient_clipping", "greater than or equal to 0"]),
    "negative decay": (some(weight_decay=-0.1), ["--weight_decay", "greater than or equal to 0"]),
    "zero eps": (some(eps=0), ["--eps", "greater than 0"]),
    "theta of one": (some(theta=1), ["--theta", "greater than 1"]),
    "unknown schedule": (some(schedule="cos"), ["--schedule", "cosine, linear, constant"]),
    "unknown precision": (some(precision="bf8"), ["--precision", "bf16, fp16, fp32"]),
    "unknown stage": (some(zero_stage=4), ["--zero_stage", "0, 1, 2, 3"]),
    "unknown device": (some(offload_optimizer="disk"), ["--offload_optimizer", "none, cpu, nvme"]),
    "no boolean": (some(shuffle="perhaps"), ["--shuffle", "boolean"]),
    "multiplier of one": (some(model_gen_multiplier=1), ["--model_gen_multiplier", "greater than 1"]),
    "nucleus of nothing": (some(sample_top_p=0), ["--sample_top_p", "greater than 0"]),
    "no checkpoint ever": (some(token_ckpt=0), ["--token_ckpt", "greater than 0"]),
    "unknown suffix of a size": (some(training_tokens="45X"), ["--training_tokens", "45e9"]),
    "seed below zero": (some(seed=-1), ["--seed", "greater than or equal to 0"]),
    "seed that torch cannot take": (some(seed=2**63), ["--seed", "less than 2**63"]),
    "seed of 26 digits": (some(seed="9" * 26), ["--seed", "less than 2**63"]),
    "seed of 5,000 digits": (some(seed="9" * 5000), ["--seed", "less than 2**63"]),
    "tokens beyond counting": (some(training_tokens="1e400"), ["--training_tokens", "less than 2**63"]),
    "comma for a point": (some(max_lr="0,01"), ["--max_lr = '0,01'", "is not a number"]),
    "NUL in a path": (some(ckpt_dir="a\0b"), ["--ckpt_dir", "must not hold a NUL"]),
    "path of nothing": (some(log_file=" "), ["--log_file", "must not be empty"]),
    "path that is not UTF-8": (some(ckpt_dir="/tmp/a\udcff"), ["--ckpt_dir", "must be UTF-8"]),
    "variable that is not set": (some(ckpt_dir="$DSLLAMA_NOWHERE/x"), ["$DSLLAMA_NOWHERE", "does not have"]),
    "braces round a variable that is not set": (some(nvme_path="/x/${DSLLAMA_NOWHERE}"), ["${DSLLAMA_NOWHERE}"]),
    "home of nobody": (some(dataset_dir="~nobody_here/x"), ["--dataset_dir", "~nobody_here, a home that is not known"]),
    "prompt that is not UTF-8": (some(sample_prompts=["The", "\udcff"]), ["--sample_prompts", "must be UTF-8"]),
    # --- between fields
    "update does not divide": (some(tokens_per_update=1000), ["multiple of", "1024 or 960"]),
    "update smaller than a micro-step": (some(tokens_per_update=32), ["multiple of", "use tokens_per_update 64"]),
    "heads do not divide": (some(n_heads=5), ["n_embd", "multiple of n_heads = 5", "n_heads 4"]),
    "odd heads": (some(n_embd=36), ["odd size", "32 or 40"]),
    "kv heads do not divide": (some(n_kv_heads=3), ["n_kv_heads", "divide n_heads = 4", "2 or 4"]),
    "min above max": (some(min_lr=0.1), ["min_lr", "not be above max_lr"]),
    "warmup as long as the run": (some(warmup_iterations=20), ["warmup_iterations", "below the 20 updates", "use 1"]),
    "offload without zero": (some(zero_stage=0, offload_optimizer="cpu"), ["offload_optimizer", "needs zero_stage 1"]),
    "parameters off at stage 2": (some(zero_stage=2, offload_params="cpu"), ["offload_params", "zero_stage 3"]),
    "nvme at stage 2": (some(zero_stage=2, offload_optimizer="nvme", nvme_path="/n"), ["zero_stage 3"]),
    "nvme with files that would not bring it back": (
        some(zero_stage=3, offload_optimizer="nvme", nvme_path="/tmp", checkpoint_format="deepspeed"),
        ["checkpoint_format", "portable"],
    ),
    "unknown format of checkpoints": (some(checkpoint_format="pickle"), ["--checkpoint_format", "portable"]),
    "parameters on nvme in fp32": (
        some(zero_stage=3, offload_params="nvme", nvme_path="/tmp", precision="fp32"),
        ["offload_params = 'nvme'", "stores them as bf16", "--precision bf16"],
    ),
    "nvme nowhere": (some(zero_stage=3, offload_optimizer="nvme"), ["nvme_path", "must name a folder"]),
    "vocabulary too small": (some(vocab_size=100), ["vocab_size", "smaller than the tokenizer's"]),
    "fp16 without a GPU": (some(precision="fp16"), ["precision", "needs a GPU"]),
    # --- configuration files
    "no such file": (some(config="nowhere.yaml"), ["nowhere.yaml", "no such configuration file", "configs/"]),
    "broken YAML": (config_file("batch_size: [1"), ["c.yaml:", "cannot be read as YAML"]),
    "broken JSON": (config_file('{"batch_size": 1', "c.json"), ["c.json:1", "is not JSON"]),
    "key twice": (config_file("seed: 1\nseed: 2\n"), ["c.yaml:2", "'seed' is given twice"]),
    "JSON key twice": (config_file('{"seed": 1, "seed": 2}', "c.json"), ["'seed' twice"]),
    "a list": (config_file("- seed\n"), ["field: value"]),
    "template that was not filled in": (
        config_file("max_lr: {{ lr }}"),
        ["c.yaml:1", "a key must be a word", "quotes"],
    ),
    "list as key": (config_file("seed: 1\n[1, 2]: 3"), ["c.yaml:2", "a key must be a word"]),
    "mapping as key": (config_file("? {a: 1}\n: 1"), ["c.yaml:1", "a key must be a word"]),
    "a field named self": (config_file("self: 1"), ["c.yaml: self", "there is no such field"]),
    "key that is no text": (config_file("null: 1"), ["c.yaml: None", "there is no such field"]),
    "nested 5,000 deep": (
        config_file("a: " + "[" * 5000),
        ["c.yaml", "nested too deeply", "`field: value` lines only"],
    ),
    "JSON nested 5,000 deep": (config_file('{"a":' * 100_000, "c.json"), ["c.json", "nested too deeply"]),
    "date that there is not": (config_file("eps: 2024-13-45"), ["c.yaml: eps = '2024-13-45'", "is not a number"]),
    "tagged date that there is not": (
        config_file("eps: !!timestamp 2024-13-45"),
        ["month must be in", "leave its tag out"],
    ),
    "tag of Python's": (config_file("eps: !!python/object:os.system x"), ["c.yaml:1", "could not determine"]),
    "alias of nothing": (config_file("eps: *x"), ["c.yaml:1", "undefined alias"]),
    "tag that the value does not fit": (config_file("shuffle: !!bool maybe"), ["c.yaml", "holds a value that is none"]),
    "tag of nothing": (config_file('seed: !!int ""'), ["c.yaml", "holds a value that is none"]),
    "number to the base 60": (config_file("n_layers: 1:30"), ["c.yaml: n_layers = '1:30'", "is not a number"]),
    "count far below zero": (config_file("batch_size: '-1e99999999'"), ["batch_size", "so far below 0"]),
    "no number at all": (some(max_lr="snan"), ["--max_lr = 'snan'", "is not a number"]),
    "two documents": (config_file("eps: 1\n---\neps: 2"), ["c.yaml:2", "another document"]),
    "tab": (config_file("a:\n\t- b"), ["c.yaml:2", "cannot start any token", "mend that line"]),
    "control sign": (config_file("eps: \x01"), ["c.yaml", "special characters are not allowed"]),
    "aliases that would fill the memory": (config_file(LAUGHS), ["c.yaml: n_layers", "must be a valid integer"]),
    "seed of 26 digits in a file": (config_file("seed: " + "9" * 26), ["c.yaml: seed", "less than 2**63"]),
    "true for a number": (config_file("batch_size: true"), ["c.yaml: batch_size = True", "must be a valid integer"]),
    "true for a rate": (config_file("eps: true"), ["c.yaml: eps = True", "must be a valid number"]),
    "true for a stage": (config_file("zero_stage: true"), ["c.yaml: zero_stage = True", "one of 0, 1, 2, 3"]),
    "null for a number": (config_file("batch_size: null"), ["c.yaml: batch_size", "integer, and not null"]),
    "mapping for a number": (config_file("batch_size: {a: 1}"), ["batch_size = {'a': 1}", "must be a valid integer"]),
    "text for a list": (config_file("sample_prompts: The"), ["sample_prompts = 'The'", "must be a valid list"]),
    "numbers for prompts": (config_file("sample_prompts: [1]"), ["sample_prompts = [1]", "must be a valid string"]),
    "infinite eps": (config_file("eps: .inf"), ["c.yaml: eps = inf", "must be a finite number"]),
    "number of 400 digits": (config_file("eps: 1" + "0" * 400), ["c.yaml: eps", "must be a valid number"]),
    "not a number for a count": (config_file('{"batch_size": NaN}', "c.json"), ["batch_size = nan", "whole number"]),
    "half a pair in a prompt": (config_file('{"sample_prompts": ["\\ud800"]}', "c.json"), ["must be UTF-8"]),
    "NUL in a path of a file": (config_file('{"tensorboard_dir": "a\\u0000"}', "c.json"), ["must not hold a NUL"]),
    "list for a checkpoint": (config_file("load_ckpt: [a]"), ["load_ckpt = ['a']", "must be a valid string"]),
    "JSON that is a number": (config_file("5", "c.json"), ["c.json = 5", "an object { ... }", "configs/"]),
    "JSON with a comma too many": (
        config_file('{"seed": 1,}', "c.json"),
        ["c.json:1", "is not JSON", "mend that line"],
    ),
    "empty JSON": (config_file("", "c.json"), ["c.json:1", "is not JSON"]),
    "folder for a file": (lambda f, s: s.update(config=f), ["cannot be read (Is a directory)", "give a file"]),
    "not UTF-8": (
        lambda f, s: ((f / "c.yaml").write_bytes(b"\xff\xfe"), s.update(config=f / "c.yaml")),
        ["c.yaml", "0xff at 0", "convert it to UTF-8"],
    ),  # type: ignore[dict-item, func-returns-value]
    "unknown key in file": (config_file("n_layer: 2\n"), ["n_layer", "did you mean 'n_layers'"]),
    "wrong value in file": (config_file("eps: small\n"), ["c.yaml: eps", "'small'"]),
    # --- DeepSpeed overlays
    "no such overlay": (some(deepspeed_overlay="nowhere.json"), ["no such file", "ds_configs/zero2.json"]),
    "overlay is no JSON": (overlay("{"), ["overlay.json:1", "is not JSON"]),
    "overlay that is a list": (overlay([1]), ["overlay.json = [1]", "an object { ... }", "ds_configs/"]),
    "overlay nested 5,000 deep": (overlay('{"a":' * 100_000), ["overlay.json", "nested too deeply"]),
    "key of nothing like it": (overlay({"xyzzyx": 1}), ["xyzzyx", "no such key", "DeepSpeed's reference"]),
    "never print": (overlay({"steps_per_print": 0}), ["steps_per_print = 0", "greater than 0"]),
    "text for a count": (overlay({"steps_per_print": "inf"}), ["steps_per_print = 'inf'", "must be a valid integer"]),
    "true for a count": (overlay({"steps_per_print": True}), ["steps_per_print = True", "must be a valid integer"]),
    "true for a bucket": (
        overlay({"zero_optimization": {"reduce_bucket_size": True}}),
        ["reduce_bucket_size = True", "must be a valid integer"],
    ),
    "true for the clipping": (overlay({"gradient_clipping": True}), ["gradient_clipping = True", "valid number"]),
    "one for true": (overlay({"zero_optimization": {"overlap_comm": 1}}), ["overlap_comm = 1", "valid boolean"]),
    "text for true": (overlay({"wall_clock_breakdown": "yes"}), ["wall_clock_breakdown = 'yes'", "valid boolean"]),
    "level that there is not": (overlay({"log_level": "loud"}), ["log_level = 'loud'", "'debug'"]),
    "sums in bytes": (overlay({"communication_data_type": "fp8"}), ["communication_data_type = 'fp8'", "'fp32'"]),
    "more than all of it": (
        overlay({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.5}}}),
        ["ratio = 1.5", "less than or equal to 1"],
    ),
    "device that there is not": (
        overlay({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "disk"}}}),
        ["device = 'disk'", "'none', 'cpu' or 'nvme'"],
    ),
    "block of a negative size": (overlay({"aio": {"block_size": -1}}), ["aio.block_size = -1", "greater than 0"]),
    "number for a folder": (overlay({"tensorboard": {"output_path": 5}}), ["output_path = 5", "valid string"]),
    "buffers too few for the optimizer": (
        overlay({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "buffer_count": 1}}}),
        ["offload_optimizer.buffer_count = 1", "must be at least 4"],
    ),
    "buffers too small for parameters": (
        overlay({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "buffer_size": 1000}}}),
        ["offload_param.buffer_size = 1000", "must be at least 1048576"],
    ),
    "parameters read ahead": (
        overlay(
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 10, "offload_param": {"device": "nvme"}}}
        ),
        ["stage3_prefetch_bucket_size = 10", "reads ahead wrongly"],
    ),
    "number for nvme's folder": (
        overlay({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": 3}}}),
        ["nvme_path = 3", "must be a valid string"],
    ),
    "profile over a file of the user's": (
        overlay({"flops_profiler": {"enabled": True, "output_file": "README.md"}}),
        ["flops_profiler.output_file = 'README.md'", "would be written over"],
    ),
    "old name of the offload": (
        overlay({"zero_optimization": {"stage": 2, "cpu_offload": True}}),
        ["cpu_offload", 'write "offload_optimizer": {"device": "cpu"}', "leave it out"],
    ),
    "checkpoints of DeepSpeed's": (overlay({"checkpoint": {"foo": 1}}), ["checkpoint: has no effect", "of its own"]),
    "activation checkpointing of DeepSpeed's": (
        overlay({"activation_checkpointing": {"partition_activations": True}}),
        ["activation_checkpointing: has no effect here", "the field activation_checkpointing"],
    ),
    "bias that is not corrected": (
        overlay({"optimizer": {"params": {"bias_correction": False}}}),
        ["optimizer.params.bias_correction: has no effect", "leave it out"],
    ),
    "betas that are none": (overlay({"optimizer": {"params": {"betas": [True, 1]}}}), ["betas = [True, 1]", "number"]),
    "overlay with a typo": (overlay({"gradient_clipp1ng": 1}), ["gradient_clipp1ng", "'gradient_clipping'"]),
    "typo in depth": (
        overlay({"zero_optimization": {"reduce_bucket": 1}}),
        ["zero_optimization.reduce_bucket", "'reduce_bucket_size'"],
    ),
    "typo deeper": (
        overlay({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}),
        ["offload_optimizer.devise", "'device'"],
    ),
    "other batch": (overlay({"train_batch_size": 7}), ["train_batch_size = 7", "gives 8"]),
    "other accumulation": (overlay({"gradient_accumulation_steps": 3}), ["gradient_accumulation_steps = 3", "gives 4"]),
    "other rate": (overlay({"optimizer": {"params": {"lr": 1.0}}}), ["optimizer.params.lr = 1.0", "gives 0.01"]),
    "other precision": (overlay({"fp16": {"enabled": True}}), ["fp16.enabled = True", "precision"]),
    "masters in bf16": (
        overlay({"bf16": {"bf16_master_weights_and_grads": True}}),
        ["bf16.bf16_master_weights_and_grads = True", "must be false", "leave it out"],
    ),
    "masters in fp16": (
        overlay({"fp16": {"fp16_master_weights_and_grads": True}}),
        ["fp16.fp16_master_weights_and_grads = True", "must be false"],
    ),
    "moments in bf16": (overlay({"bf16": {"bf16_optimizer_states": True}}), ["bf16.bf16_optimizer_states = True"]),
    "sums in bf16": (overlay({"data_types": {"grad_accum_dtype": "bf16"}}), ['must be "fp32"', "accumulate in fp32"]),
    "no look at the gradients": (
        overlay({"bf16": {"check_grad_overflow": False}, "zero_optimization": {"compute_grad_norm": False}}),
        ["bf16.check_grad_overflow", "zero_optimization.compute_grad_norm", "must be true"],
    ),
    "autocast": (overlay({"torch_autocast": {"enabled": True}}), ["torch_autocast.enabled", "precision decides"]),
    "sum over ranks": (overlay({"gradient_allreduce_op": "sum"}), ['must be "mean"', "mean over all tokens"]),
    "scaled before the sum": (
        overlay({"prescale_gradients": True, "gradient_predivide_factor": 3}),
        ["prescale_gradients", "gradient_predivide_factor = 3", "must be 1.0"],
    ),
    "other clipping": (overlay({"gradient_clipping": 5}), ["gradient_clipping = 5", "gives 1.0"]),
    "other scheduler": (overlay({"scheduler": {"type": "WarmupLR"}}), ["scheduler.type", "DsllamaScheduler"]),
    "other stage": (
        lambda f, s: (overlay({"zero_optimization": {"stage": 3}})(f, s), s.update(zero_stage=2)),
        ["zero_optimization.stage = 3", "gives 2"],
    ),  # type: ignore[dict-item, func-returns-value]
    "stage that is a boolean": (overlay({"zero_optimization": {"stage": True}}), ["stage = True", "0, 1, 2 or 3"]),
    "stage that is a list": (overlay({"zero_optimization": {"stage": [2]}}), ["stage = [2]", "0, 1, 2 or 3"]),
    "stage that is text": (overlay({"zero_optimization": {"stage": "2"}}), ["stage = '2'", "0, 1, 2 or 3"]),
    "stage that is a fraction": (overlay({"zero_optimization": {"stage": 0.0}}), ["stage = 0.0", "0, 1, 2 or 3"]),
    "parameters off at stage 0": (
        overlay({"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}}),
        ["needs zero_stage 3, not 0"],
    ),
    "stage of nine": (overlay({"zero_optimization": {"stage": 9}}), ["stage", "0, 1, 2 or 3"]),
    "auto that nothing derives": (
        overlay({"zero_optimization": {"sub_group_size": "auto"}}),
        ["sub_group_size", "nothing derives"],
    ),
    "section that is none": (overlay({"zero_optimization": 2}), ["zero_optimization", "must be a section"]),
    "monitor that is not installed": (overlay({"comet": {"enabled": True}}), ["comet.enabled", "pip install comet_ml"]),
    "value that DeepSpeed refuses": (
        overlay({"zero_optimization": {"reduce_bucket_size": -5}}),
        ["reduce_bucket_size = -5", "greater than 0"],
    ),
    # --- data
    "no data": (some(dataset_dir="/nowhere/at/all"), ["/nowhere/at/all"]),
    "no shards": (shards(), ["bad", ".npy"]),
    "float shard": (shards(a=np.zeros(5000)), ["a.npy", "float64"]),
    "square shard": (shards(a=np.zeros((50, 100), np.uint16)), ["a.npy", "dimension"]),
    "object shard": (shards(a=np.array([{}], dtype=object)), ["a.npy", "object"]),
    "truncated shard": (truncated_shard, ["a.npy"]),
    "no array": (garbage_shard, ["b.npy"]),
    "mixed types": (shards(a=np.zeros(5000, np.uint16), b=np.zeros(5000, np.uint32)), ["uint16", "uint32"]),
    "ids outside the vocabulary": (shards(a=np.full(5000, 60000, np.uint16)), ["a.npy", "60,000"]),
    "less than one update": (shards(a=np.zeros(200, np.uint16)), ["200", "256"]),
    "all of it held out": (some(validation_tokens=8000), ["validation_tokens"]),
    "bad manifest": (bad_manifest, ["manifest.json", "cannot be read"]),
    # --- tokenizer
    "no tokenizer": (some(tokenizer_path="nowhere.json"), ["nowhere.json", "dsllama tokenizer"]),
    "tokenizer that is none": (tokenizer("{}"), ["tok.json", "dsllama tokenizer"]),
    "tokenizer without special tokens": (
        tokenizer('{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'),
        ["tok.json", "<SOS>"],
    ),
    "another tokenizer than the data's": (other_tokenizer, ["tokenizer_path", "not the tokenizer that encoded"]),
    # --- log file
    "log file that is something else": (notes_as_log, ["log_file", "a log of ours"]),
    "log file where the plot goes": (some(log_file="loss.PNG"), ["log_file", ".png"]),
    "log beside a picture of the user's": (
        mine("cat.png", log_file="cat.csv"),
        ["cat.png beside it", "move that away"],
    ),
    "log beside notes of the user's": (mine("a.samples.txt", log_file="a.csv"), ["a.samples.txt beside it"]),
    "log that is no file": (some(log_file="/dev/full"), ["log_file = '/dev/full'", "must be a new file"]),
    "log through a link in a circle": (circle(log_file="loop"), ["log_file", "must be a new file"]),
    "log of a name too long": (some(log_file="x" * 250 + ".csv"), ["cannot be used (File name too long)", "a shorter"]),
    "tokenizer of a name too long": (some(tokenizer_path="x" * 300), ["File name too long", "give a shorter name"]),
    # --- checkpoints
    "nothing to resume": (some(load_ckpt="true"), ["holds no checkpoint", "--load_ckpt false"]),
    "resume from nowhere": (some(load_ckpt="/nowhere/update_1"), ["/nowhere/update_1", "no such folder"]),
    "checkpoint folder in the way": (file_in_the_way(ckpt_dir="file/c"), ["ckpt_dir", "a part of the path is a file"]),
    "file for the checkpoints": (file_in_the_way(ckpt_dir="file"), ["ckpt_dir", "needs a folder where a file is"]),
    "file for the events": (file_in_the_way(tensorboard_dir="file"), ["tensorboard_dir", "needs a folder"]),
    "events below a file": (file_in_the_way(tensorboard_dir="file/t"), ["tensorboard_dir", "a part of the path"]),
    "log below a file": (file_in_the_way(log_file="file/log.csv"), ["log_file", "needs a folder where a file is"]),
    "manifest that is a list": (manifest("[]"), ["is not a whole checkpoint", "TypeError"]),
    "manifest of little": (manifest('{"update": 3}'), ["is not a whole checkpoint", "KeyError: 'format'"]),
    "manifest of another format": (manifest('{"format": "x-9"}'), ["its format is 'x-9'"]),
    "manifest nested 5,000 deep": (manifest("[" * 100_000), ["is not a whole checkpoint", "RecursionError"]),
}

VERBS: dict[str, tuple[list[str], list[str]]] = {
    "unknown verb": (["trian"], ["trian"]),
    "no verb": ([], ["VERB"]),
    "text that does not exist": (["tokenizer", "nowhere.txt", "--out", "t.json"], ["nowhere.txt"]),
    "vocabulary of nothing": (
        ["tokenizer", "README.md", "--out", "t.json", "--vocab_size", "9"],
        ["vocab_size", "266"],
    ),
    "no tokenizer to encode with": (["encode", "tests", "--tokenizer", "nowhere.json", "--out", "o"], ["tests"]),
    "checkpoint that is none": (["generate", "--checkpoint", "tests", "--prompt", "x"], ["tests", "manifest.json"]),
    "export of nothing": (["export", "--checkpoint", "nowhere", "--out", "o"], ["nowhere"]),
    "seed that torch cannot take": (
        ["generate", "--checkpoint", "tests", "--prompt", "x", "--seed", "9" * 26],
        ["--seed", "less than 2**63"],
    ),
    "prompt that is not UTF-8": (["generate", "--checkpoint", "x", "--prompt", "\udcff"], ["--prompt", "UTF-8"]),
    "checkpoint with a NUL": (["generate", "--checkpoint", "a\0", "--prompt", "x"], ["--checkpoint", "NUL"]),
    "export to a home of nobody": (["export", "--checkpoint", "x", "--out", "~nobody_here/x"], ["--out", "a home"]),
    "export to nothing": (["export", "--checkpoint", "x", "--out", ""], ["--out", "must not be empty"]),
    "plot at a variable that is not set": (["plot-schedule", "--out", "$DSLLAMA_NOWHERE"], ["$DSLLAMA_NOWHERE"]),
    "word too many": (["config", "extra"], ["extra: is a word too many", "dsllama config --help"]),
    "option of another verb": (
        ["corpus", "--out", "x", "--vocab_size", "3"],
        ["--vocab_size: there is no such option", "known: "],
    ),
    "option of nothing like it": (
        ["config", "--learning_rate", "3"],
        ["--learning_rate: there is no such option", "dsllama config --help"],
    ),
    "value that looks like an option": (["config", "--max_lr", "-x"], ["--max_lr", "--option=-value"]),
    "world far below nothing": (["config", "--world_size=-1e5000"], ["--world_size", "so far below 0"]),
    "divisors that take minutes": (
        ["config", "--n_embd", "4e18", "--n_heads", "7"],
        ["n_embd = 4000000000000000000", "multiple of n_heads = 7"],
    ),
    "seed below nothing": (
        ["generate", "--checkpoint", "tests", "--prompt", "x", "--seed=-9223372036854775809"],
        ["tests", "manifest.json"],
    ),
    "rate that is infinite": (["plot-schedule", "--max_lr", "inf"], ["--max_lr", "must be a finite number"]),
    "plot over a file of the user's": (["plot-schedule", "--out", "README.md"], ["exists already", "--overwrite"]),
    "plot over a folder of the user's": (["plot-schedule", "--out", "tests"], ["exists already", "name a .png file"]),
    "tokenizer over its own text": (
        ["tokenizer", "README.md", "--out", "README.md", "--overwrite"],
        ["--out", "is one of the inputs"],
    ),
    "tokenizer over a device": (["tokenizer", "tests", "--out", "/dev/null", "--overwrite"], ["is no regular file"]),
    "vocabulary beyond memory": (["tokenizer", "x", "--out", "t", "--vocab_size", "1e10"], ["at most 10,000,000"]),
    "name too long": (["generate", "--checkpoint", "x" * 300, "--prompt", "x"], ["give a shorter name"]),
    "export over something else": (["export", "--checkpoint", "x", "--out", "tests"], ["x"]),
    "ranks of nothing": (["quickstart", "--ranks", "0"], ["--ranks = 0", "must be from 1 to"]),
    "ranks beyond the machine": (["quickstart", "--ranks", "4096"], ["--ranks = 4096", "the cores"]),
    "vocabulary smaller than the tokenizer's": (
        ["config", "--vocab_size", "100", "--tokenizer_path", "tests/golden/deepspeed.json"],
        ["tests/golden/deepspeed.json", "is not a tokenizer"],
    ),
    "plot over a folder": (["plot-schedule", "--out", "README.md/a"], ["README.md", "a part of the path"]),
    "plot that is no picture": (["plot-schedule", "--out", "/tmp/a.xyz"], ["--out", "xyz", "name a .png file"]),
    "vocabulary beyond counting": (["tokenizer", "x", "--out", "t", "--vocab_size", "1e30"], ["less than 2**63"]),
    "workers of nothing": (
        ["encode", "tests", "--tokenizer", "t.json", "--out", "o", "--workers", "0"],
        ["workers", "at least 1"],
    ),
    "quickstart's unknown field": (["quickstart", "n_layer=6"], ["n_layer", "did you mean 'n_layers'"]),
    "quickstart's words apart": (["quickstart", "n_layer=6", "--fresh", "max_Ir=1"], ["'n_layers'", "'max_lr'"]),
    "quickstart's half a word": (["quickstart", "n_layers"], ["n_layers", "FIELD=VALUE"]),
    "half a schedule": (["plot-schedule", "--training_steps", "10", "--warmup_steps", "20"], ["warmup_steps"]),
    "no world": (["config", "--world_size", "x"], ["world_size"]),
    "batch that does not divide": (["config", "--world_size", "3"], ["4 x 2048 x 3 = 24576", "516096 or 540672"]),
}


def each_has_a_remedy(message: str) -> bool:
    """Whether each problem in a message is followed by what to do about it."""
    numbered = len(re.findall(r"^  \d+\. ", message, re.MULTILINE))
    return len(re.findall(r"^      -> .{5}", message, re.MULTILINE)) == (numbered or 1)


@pytest.mark.parametrize("name", TRAINING)
def test_training_refuses_with_a_clear_message(name: str, tiny_data: TinyData, tmp_path: Path, capsys) -> None:
    prepare, expected = TRAINING[name]
    settings = {**tiny_data.settings, "ckpt_dir": tmp_path / "checkpoints", "log_file": tmp_path / "log.csv"}
    prepare(tmp_path, settings)
    if "config" in settings:  # the file's own values must reach the checks
        settings = {k: v for k, v in settings.items() if k not in ("batch_size", "eps", "n_layers", "sample_prompts")}
    assert train(options(settings)) == 2
    message = one_clear_screen(capsys.readouterr())
    assert [word for word in expected if word not in message] == [], message
    assert each_has_a_remedy(message), message


@pytest.mark.parametrize("name", VERBS)
def test_verbs_refuse_with_a_clear_message(name: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    words, expected = VERBS[name]
    assert cli.main(words) == 2
    message = one_clear_screen(capsys.readouterr())
    assert [word for word in expected if word not in message] == [], message
    assert each_has_a_remedy(message), message


def test_everything_that_is_wrong_is_said_at_once(tiny_data: TinyData, tmp_path: Path, capsys) -> None:
    settings = {
        **tiny_data.settings,
        "tokenizer_path": "no.json",
        "dataset_dir": "/no/data",
        "load_ckpt": "/no/checkpoint",
        "deepspeed_overlay": "no_overlay.json",
        "ckpt_dir": tmp_path / "c",
        "log_file": tmp_path / "l.csv",
    }
    assert train(options(settings)) == 2
    message = one_clear_screen(capsys.readouterr())
    assert all(part in message for part in ("no.json", "/no/data", "/no/checkpoint", "no_overlay.json"))


@starts_processes
def test_the_launcher_passes_the_message_and_the_code_on(tiny_data: TinyData, tmp_path: Path) -> None:
    settings = {**tiny_data.settings, "n_heads": 5, "max_Ir": 1}
    result = run(*deepspeed_command(2, "launch/train.py", *options(settings)))
    assert result.returncode == 2
    assert result.stderr.count("did you mean 'max_lr'") == 1 and "Traceback" not in result.stderr
