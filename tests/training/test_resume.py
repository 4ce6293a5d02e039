"""A run that is resumed in new processes goes on as the one that never stopped; what cannot go on is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsllama.training.run import main as train
from tests.campaign import RESUMED, RESUMED_LONG, Campaign, halfway
from tests.conftest import Run, one_clear_screen, starts_processes

pytestmark = starts_processes


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *((name, ranks) for ranks in (1, 2) for name in RESUMED[ranks]),
        *(pytest.param(name, 1, marks=pytest.mark.long) for name in RESUMED_LONG),
    ],
)
def test_a_resumed_run_gives_the_same_losses_to_the_bit(campaign: Campaign, name: str, ranks: int) -> None:
    whole, resumed = campaign.losses(name, ranks), campaign.losses(f"{name}_resumed", ranks)
    assert resumed == {update: loss for update, loss in whole.items() if update > halfway(name)}


def test_a_finished_run_says_that_nothing_is_left(campaign: Campaign, capsys) -> None:
    finished = campaign.run("fp32_stage1")
    assert train(Run(finished.folder, {**finished.settings, "load_ckpt": "auto"}).words()) == 0
    assert "nothing is left to train" in capsys.readouterr().out


def damage(update: int, how: str) -> Callable[[Run], None]:
    def apply(trained: Run) -> None:
        folder = trained.checkpoint(update)
        file = max((folder / "engine").iterdir(), key=lambda p: p.stat().st_size)
        if how == "truncated":
            file.write_bytes(file.read_bytes()[:-1])
        elif how == "flipped":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        elif how == "missing":
            file.unlink()
        elif how == "no manifest":
            (folder / "manifest.json").unlink()
        else:
            (folder / "manifest.json").write_text(how, encoding="utf-8")

    return apply


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Run], Any]:
    def apply(trained: Run) -> None:
        file = trained.checkpoint(20) / "manifest.json"
        manifest = json.loads(file.read_text(encoding="utf-8"))
        change(manifest)
        file.write_text(json.dumps(manifest), encoding="utf-8")

    return apply


CHECKPOINTS: dict[str, tuple[list[Callable[[Run], Any]], dict[str, Any], list[str]]] = {
    "one that would be overwritten": ([], {}, ["holds 2 checkpoints", "--load_ckpt true"]),
    "another width": ([], {"load_ckpt": "true", "n_embd": 64}, ["n_embd = 64", "32"]),
    "another length": ([], {"load_ckpt": "true", "max_seq_len": 16}, ["max_seq_len = 16", "32"]),
    "another pace": (
        [],
        {"load_ckpt": "true", "tokens_per_update": 512, "warmup_iterations": 1},
        ["tokens_per_update = 512", "256"],
    ),
    "another stage": ([], {"load_ckpt": "true", "zero_stage": 3}, ["zero_stage", "1"]),
    "another precision": ([], {"load_ckpt": "true", "precision": "bf16"}, ["precision", "fp32"]),
    "another order of the data": ([], {"load_ckpt": "true", "shuffle": "true"}, ["shuffle", "True", "False"]),
    "other held-out data": ([], {"load_ckpt": "true", "validation_tokens": 500}, ["validation_tokens", "500"]),
    "asked for by name and truncated": (
        [damage(20, "truncated")],
        {"load_ckpt": "update_0000020"},
        ["bytes instead of", "update_0000010"],
    ),
    "asked for by name and a file missing": ([damage(20, "missing")], {"load_ckpt": "update_0000020"}, ["is missing"]),
    "asked for by name and one bit is another": (
        [damage(20, "flipped")],
        {"load_ckpt": "update_0000020"},
        ["checksum"],
    ),
    "newer ones lie ahead": (
        [],
        {"load_ckpt": "update_0000010"},
        ["update_0000020", "write over", "another --ckpt_dir"],
    ),
    "manifest gone": ([damage(20, "no manifest")], {"load_ckpt": "update_0000020"}, ["no manifest.json"]),
    "manifest torn": ([damage(20, '{"format":')], {"load_ckpt": "update_0000020"}, ["cannot be read"]),
    "manifest with another update": (
        [edited(lambda manifest: manifest.update(update=19))],
        {"load_ckpt": "update_0000020"},
        ["was changed after it was saved", "update_0000010"],
    ),
    "manifest without an entry": (
        [edited(lambda manifest: manifest["data"].clear())],
        {"load_ckpt": "update_0000020"},
        ["was changed after it was saved"],
    ),
    "folder of another name": (
        [lambda trained: trained.checkpoint(20).rename(trained.checkpoint(30))],
        {"load_ckpt": "update_0000030"},
        ["its manifest.json is of update 20"],
    ),
    "manifest of something else": (
        [damage(20, '{"format": "x", "files": {}}')],
        {"load_ckpt": "update_0000020"},
        ["format"],
    ),
    "none of them whole": (
        [damage(10, "truncated"), damage(20, "truncated")],
        {"load_ckpt": "true"},
        ["none of the 2"],
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_resumed_is_refused(name: str, campaign: Campaign, tmp_path: Path, capsys) -> None:
    damages, changes, expected = CHECKPOINTS[name]
    finished = campaign.run("fp32_stage1")
    copy = Run(tmp_path / "copy", {**finished.settings, **changes})
    shutil.copytree(finished.folder, copy.folder)
    for apply in damages:
        apply(copy)
    if str(changes.get("load_ckpt", "")).startswith("update_"):
        copy.settings["load_ckpt"] = copy.folder / "checkpoints" / changes["load_ckpt"]
    assert train(copy.words()) == 2
    message = one_clear_screen(capsys.readouterr())
    assert [word for word in expected if word not in message] == [], message
