"""What `dsllama checkpoints` says of a folder, and how a checkpoint is read in one process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsllama.checkpoint.catalog import digest, open_checkpoint
from dsllama.checkpoint.fragments import KINDS, Fragment, Source, Writer
from dsllama.cli import main
from dsllama.inference import export_checkpoint, load_model
from tests.campaign import Campaign, flip
from tests.conftest import one_clear_screen, starts_processes

pytestmark = starts_processes


@pytest.fixture
def folder(campaign: Campaign, tmp_path: Path) -> Path:
    """The checkpoints of updates 10 and 20 of a ZeRO-3 run on two ranks, to be damaged."""
    return shutil.copytree(campaign.run("fp32_stage3", 2).folder / "checkpoints", tmp_path / "checkpoints")


def told(capsys: Any, *words: Any) -> tuple[int, list[dict[str, Any]]]:
    code = main(["checkpoints", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_list_says_what_there_is(folder: Path, capsys) -> None:
    assert main(["checkpoints", "list", str(folder)]) == 0
    older, newer = capsys.readouterr().out.splitlines()
    assert older.startswith("update_0000010  2.56K tokens  loss ") and "ZeRO-3, 2 ranks, fp32" in older
    assert newer.startswith("update_0000020") and newer.endswith("whole")
    rows = (folder.parent / "log.csv", *told(capsys, "list", folder)[1])
    assert [row["update"] for row in rows[1:]] == [10, 20]
    assert rows[2]["bytes"] == sum(
        f.stat().st_size for f in (folder / "update_0000020").iterdir() if f.name != "manifest.json"
    )


def test_what_is_damaged_is_found_by_reading_and_named(folder: Path, capsys) -> None:
    assert told(capsys, "verify", folder)[0] == 0
    flip(folder / "update_0000010" / "weights_00001.safetensors")
    (folder / "update_0000020" / "optimizer_00000.safetensors").unlink()
    assert [row["problems"] for row in told(capsys, "list", folder)[1]] == [
        [],
        ["optimizer_00000.safetensors is missing"],
    ]
    code, (older, newer) = told(capsys, "verify", folder)
    assert code == 1 and "weights_00001.safetensors is damaged in block 0 (" in older["problems"][0]
    assert newer["problems"] == ["optimizer_00000.safetensors is missing"]
    assert main(["checkpoints", "verify", str(folder / "update_0000010")]) == 1
    assert "damaged: weights_00001" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["list", "nowhere"], ["verify", "setup.py"], ["list"], ["show", "x"], []])
def test_a_mistake_is_said(words: list[str], capsys) -> None:
    assert main(["checkpoints", *words]) == 2
    one_clear_screen(capsys.readouterr())


def test_a_model_is_taken_from_the_newest_that_is_whole(folder: Path, tmp_path: Path, capsys, caplog) -> None:
    flip(folder / "update_0000020" / "weights_00001.safetensors")
    for model in (load_model(folder), load_model(folder / "update_0000010")):
        with Source(folder / "update_0000010", open_checkpoint(folder / "update_0000010").manifest) as source:
            assert all(torch.equal(source.read(name), weight) for name, weight in model.named_parameters())
    assert "passing over the damaged checkpoint" in caplog.text
    exported = load_file(export_checkpoint(folder, tmp_path / "hf") / "model.safetensors")
    assert torch.equal(exported["lm_head.weight"], model.lm_head.weight.detach())
    words = ["generate", "--checkpoint", str(folder / "update_0000020"), "--prompt", "the"]
    assert main(words) == 2
    assert "weights_00001.safetensors is damaged in block 0 (" in one_clear_screen(capsys.readouterr())


def test_checkpoints_are_found_through_links_and_beside_other_manifests(folder: Path, tmp_path: Path, capsys) -> None:
    (folder / "manifest.json").write_text('{"format": "of something else"}')
    (tmp_path / "best").symlink_to(folder / "update_0000010")
    assert [row["update"] for row in told(capsys, "list", folder)[1]] == [10, 20]
    assert open_checkpoint(folder).update == 20 and open_checkpoint(tmp_path / "best").path.name == "update_0000010"
    (folder / "update_0000010" / "manifest.json").unlink()
    os.mkfifo(folder / "update_0000010" / "manifest.json")
    assert told(capsys, "list", folder)[1][0]["problems"] == ["it has no manifest.json"]


def test_only_the_weights_are_needed_for_a_model(folder: Path) -> None:
    expected = load_model(folder / "update_0000010").state_dict()
    for file in (folder / "update_0000010").glob("optimizer_*"):
        content = bytearray(file.read_bytes())
        file.write_bytes(bytes(len(content)))
    found = load_model(folder / "update_0000010").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_with_weights_and_moments_together_are_still_read(folder: Path) -> None:
    newer = folder / "update_0000020"
    source = Source(newer, manifest := open_checkpoint(newer).manifest)
    pieces = [Fragment(name, kind, shape, 0, shape.numel()) for name, shape in _shapes(source) for kind in KINDS]
    old = shutil.copytree(newer, folder / "update_0000030")
    with Writer(old / "state_00000.safetensors", pieces, {"cpu": torch.arange(7, dtype=torch.uint8)}) as writer:
        for piece in pieces:
            writer.add(source.read(piece.name, piece.kind))
        files = {"config.yaml": manifest["files"]["config.yaml"], "state_00000.safetensors": writer.finish()}
    manifest = {**manifest, "format": "dsllama-checkpoint-3", "update": 30, "files": files}
    (old / "manifest.json").write_text(json.dumps({**manifest, "digest": digest(manifest)}))
    opened = open_checkpoint(folder)
    assert opened.path == old and list(opened.damages()) == []
    with Source(old, opened.manifest) as again:
        assert all(torch.equal(again.read(p.name, p.kind), source.read(p.name, p.kind)) for p in pieces)
        assert dict(again.own(0))["cpu"].tolist() == list(range(7))


def _shapes(source: Source) -> list[tuple[str, torch.Size]]:
    return [(name, torch.Size(shape)) for name, shape in source.shapes.items()]
