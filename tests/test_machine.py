"""What the first command does on machines that are not here: other numbers of GPUs, drivers, compilers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsllama import machine, quickstart
from dsllama.cluster.launch import Place, command, environment
from dsllama.config import load_config
from dsllama.deepspeed_config import deepspeed_config
from dsllama.derived import derive
from dsllama.errors import UserError
from dsllama.training import engine
from tests.conftest import REPOSITORY

READY = load_config(REPOSITORY / "configs" / "quickstart.yaml")


@pytest.mark.parametrize("gpus", range(1, 17))
def test_the_quickstart_fits_any_number_of_gpus(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    ranks = quickstart.default_ranks(READY)
    assert gpus / 2 < ranks <= gpus
    config = READY.replace(batch_size=quickstart.fitting_batch(READY, ranks))
    derived = derive(config, ranks, 8192)  # raises where it does not divide
    assert derived.sequences_per_update == 16 and derived.updates == derive(READY, 1, 8192).updates


@pytest.mark.parametrize(
    ("visible", "gpus", "ranks", "expected"),
    [("2,3", 2, 2, "localhost:2,3"), ("5, 1", 2, 1, "localhost:5"), (None, 4, 2, "localhost:0,1")],
)
def test_a_launch_takes_the_gpus_that_are_visible(
    visible: str | None, gpus: int, ranks: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "environ", {**os.environ, **({"CUDA_VISIBLE_DEVICES": visible} if visible else {})})
    made = command(Place(processes=ranks), None, [])
    assert made[made.index("--include") + 1] == expected and "--num_gpus" not in made
    assert "CUDA_VISIBLE_DEVICES" not in environment(Place(processes=ranks))


def test_gpus_that_the_launcher_does_not_understand_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2a")
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES = 'GPU-8f2a'(.|\n)*nvidia-smi -L"):
        command(Place(processes=1), None, [])


def test_without_gpus_it_launches_ranks_on_the_cpu() -> None:
    assert "--num_gpus" in command(Place(processes=2), None, [])


@pytest.fixture
def a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NVIDIA driver that lists a GPU, which this torch cannot use."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncase $1 in -L) echo 'GPU 0: Tesla T4 (UUID: GPU-1)';; *) echo 470.57.02;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("cuda", "words"),
    [
        ("13.0", ["cannot use GPU 0: Tesla T4", "CUDA 13.0 needs a newer driver than 470.57.02", "update the driver"]),
        (None, ["is a CPU build, but this machine has GPU 0: Tesla T4", "TORCH=", "DS_ACCELERATOR=cpu"]),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_not_left_aside_in_silence(
    cuda: str | None, words: list[str], a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError) as caught:
        quickstart.check_torch()
    assert [word for word in words if word not in str(caught.value)] == []
    # The same for `deepspeed launch/train.py`, which would otherwise train on the CPU.
    assert engine.accelerator() == "cpu"
    json = deepspeed_config(READY, derive(READY, 1, 8192), "cpu")
    assert [problem.where for problem in engine.unsupported_here(READY, json)] == ["torch"]
    monkeypatch.setattr(engine, "_fell_back", False)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # now it is meant
    quickstart.check_torch()
    assert engine.unsupported_here(READY, json) == []


@pytest.mark.parametrize(
    ("capability", "fits"), [((7, 0), False), ((7, 5), True), ((8, 6), True), ((9, 0), True), ((12, 0), True)]
)
def test_a_gpu_for_which_torch_has_no_code_is_named(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    problem = machine.unusable_gpu()
    assert (problem is None) == fits
    assert fits or "no code for Tesla V100 (sm_70)" in str(problem)


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_the_quickstart_takes_the_half_precision_that_the_gpu_has(
    has_bf16: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert quickstart._configuration(tmp_path, {}, None, 1).precision == precision
    assert quickstart._configuration(tmp_path, {"precision": "fp32"}, None, 1).precision == "fp32"


def test_a_missing_compiler_is_found_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = READY.replace(enable_compilation=True)
    json = deepspeed_config(config, derive(config, 1, 8192), "cuda")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert ["a C compiler (gcc)" in str(problem) for problem in engine.unsupported_here(config, json)] == [True]
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: "/nowhere")
    assert ["/nowhere/Python.h" in str(problem) for problem in engine.unsupported_here(config, json)] == [True]


def test_a_long_update_says_when_its_row_is_to_be_expected(capsys: pytest.CaptureFixture[str]) -> None:
    from dsllama.training.trainer import Trainer

    trainer = SimpleNamespace(world=SimpleNamespace(is_main=True))
    Trainer._say_when(trainer, 0.1, 64)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    Trainer._say_when(trainer, 30.0, 64)  # type: ignore[arg-type]
    assert "in about 31m30s: an update is 64 micro-steps, the first took 30s" in capsys.readouterr().out
