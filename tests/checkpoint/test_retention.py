"""Which checkpoints stay, as policies say it, and that the only whole one always does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsllama.checkpoint.catalog import Checkpoint, list_checkpoints, open_checkpoint, update_of
from dsllama.checkpoint.retention import LOCK, Policy, Retention, tidy
from dsllama.cli import main
from dsllama.inference import load_model
from dsllama.locks import hold
from dsllama.training.run import main as train
from tests.campaign import UPDATES, Campaign, flip
from tests.conftest import Run, one_clear_screen, starts_processes

pytestmark = starts_processes


def saved(update: int, validation: float | None = None, state: str = "portable") -> Checkpoint:
    files = {"weights_00000.safetensors": {}} | ({} if state == "weights" else {"optimizer_00000.safetensors": {}})
    manifest = {"update": update, "tokens": 100 * update, "validation_loss": validation, "state": state, "files": files}
    return Checkpoint(Path(f"update_{update:07d}"), manifest)


@pytest.mark.parametrize(
    ("policy", "found", "kept"),
    [
        (Policy(2), [saved(u) for u in (1, 2, 3, 4)], [3, 4]),
        (Policy(9), [saved(u) for u in (1, 2)], [1, 2]),
        (Policy(1, every=300), [saved(u) for u in range(1, 9)], [3, 6, 8]),
        (Policy(1, every=300), [saved(u) for u in (2, 5, 7, 8)], [5, 7, 8]),  # the first beyond 300, 600
        (Policy(1, best=2), [saved(1, 3.0), saved(2, 2.0), saved(3, 2.5), saved(4, 2.7), saved(5)], [2, 3, 5]),
        # What holds only weights is no substitute.
        (Policy(1), [saved(1), saved(2), saved(3, state="weights")], [2]),
        (Policy(1), [saved(1, state="weights"), saved(2, state="weights")], [1, 2]),
        (Policy(1, weights=True), [saved(1, state="weights"), saved(2), saved(3)], [1, 3]),
        (Policy(1), [], []),
    ],
)
def test_a_policy_keeps(policy: Policy, found: list[Checkpoint], kept: list[int]) -> None:
    going = [c.update for c in policy.superfluous(reversed(found))]
    assert going == sorted(going)
    assert [c.update for c in found if c.update not in going] == kept


def updates(run: Run) -> list[int]:
    return [update_of(path) for path in list_checkpoints(run.folder / "checkpoints")]


def test_a_run_removes_what_it_need_not_keep(campaign: Campaign) -> None:
    run = campaign.run("keeping")
    validation = {int(row["update"]): float(row["validation_loss"]) for row in run.rows()}
    assert len(validation) == UPDATES  # each save followed an evaluation
    best = min(validation, key=lambda update: validation[update])
    assert updates(run) == sorted({6, 12, 18, best, 19, 20})
    said = campaign.ended("keeping").said
    assert "removed update_0000001 (keep_last 2)" in said
    assert list((run.folder / "checkpoints").glob(".*-update*")) == []


def test_a_run_keeps_the_weights_of_old_ones(campaign: Campaign, tmp_path: Path, capsys) -> None:
    run = campaign.run("keeping_weights")
    assert updates(run) == [5, 10, 15, 20]
    states = [open_checkpoint(run.checkpoint(update)).manifest["state"] for update in (5, 10, 15, 20)]
    assert states == ["weights", "weights", "weights", "portable"]
    whole = campaign.run("fp32_stage1").checkpoint(10)  # the same training, without any retention
    expected, found = load_model(whole).state_dict(), load_model(run.checkpoint(10)).state_dict()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert [file.name for file in run.checkpoint(10).glob("*.safetensors")] == ["weights_00000.safetensors"]
    again = Run(tmp_path, {**run.settings, "load_ckpt": run.checkpoint(10)})
    assert train(again.words()) == 2
    assert f"--init_from {run.checkpoint(10)}" in one_clear_screen(capsys.readouterr())


@pytest.fixture
def folder(campaign: Campaign, tmp_path: Path) -> Path:
    """The checkpoints of updates 10 and 20 of a run on two ranks, to be damaged."""
    return shutil.copytree(campaign.run("fp32_stage3", 2).folder / "checkpoints", tmp_path / "checkpoints")


def pruned(folder: Path, capsys: Any, *words: str) -> dict[str, list[str]]:
    assert main(["checkpoints", "prune", str(folder), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


OLDER, NEWER = "update_0000010", "update_0000020"


def test_pruning_by_hand(folder: Path, capsys) -> None:
    (folder / ".writing-update_0000030").mkdir()
    told = {"removed": [OLDER], "weights": [], "kept": [NEWER], "damaged": []}
    assert pruned(folder, capsys, "--keep_last", "1", "--dry_run") == told
    assert (folder / OLDER).exists() and (folder / ".writing-update_0000030").exists()
    weights = pruned(folder, capsys, "--keep_last", "1", "--keep_weights")
    assert weights == {"removed": [], "weights": [OLDER], "kept": [NEWER], "damaged": []}
    assert pruned(folder, capsys, "--keep_last", "1") == told
    assert [path.name for path in folder.glob("*update*")] == [NEWER]


def test_what_is_damaged_does_not_count_as_kept(folder: Path, capsys) -> None:
    flip(folder / NEWER / "optimizer_00001.safetensors")
    told = {"removed": [], "weights": [], "kept": [OLDER], "damaged": [NEWER]}
    assert pruned(folder, capsys, "--keep_last", "1") == told and (folder / NEWER).exists()
    assert pruned(folder, capsys, "--keep_last", "1", "--damaged") == told and not (folder / NEWER).exists()
    flip(folder / OLDER / "weights_00000.safetensors")
    assert main(["checkpoints", "prune", str(folder), "--keep_last", "1", "--damaged"]) == 2
    assert "nothing in it is removed" in capsys.readouterr().err and (folder / OLDER).exists()


def test_what_is_not_proved_damaged_is_not_removed_and_of_a_link_only_the_link(folder: Path, tmp_path, capsys) -> None:
    elsewhere = shutil.move(folder / OLDER, tmp_path / OLDER)
    (folder / OLDER).symlink_to(elsewhere)
    later = shutil.copytree(folder / NEWER, folder / "update_0000030")
    manifest = json.loads((later / "manifest.json").read_text())
    (later / "manifest.json").write_text(json.dumps({**manifest, "format": "dsllama-checkpoint-99"}))
    told = pruned(folder, capsys, "--keep_last", "1", "--damaged")
    assert told == {"removed": [OLDER], "weights": [], "kept": [NEWER], "damaged": [later.name]}
    assert later.exists() and not (folder / OLDER).is_symlink() and (elsewhere / "manifest.json").exists()


@pytest.mark.parametrize("words", [["--keep_last", "0"], ["--keep_last", "2", "--keep_every", "-3"], []])
def test_numbers_that_keep_nothing_are_refused(folder: Path, words: list[str], capsys) -> None:
    assert main(["checkpoints", "prune", str(folder), *words]) == 2
    assert (words or ["keep_last"])[-2:][0] in one_clear_screen(capsys.readouterr())


def test_a_folder_in_use_is_left_alone(folder: Path, capsys) -> None:
    with hold(folder / LOCK, "x", "", ""):
        assert main(["checkpoints", "prune", str(folder), "--keep_last", "1"]) == 2
    assert "is in use by another run: process" in one_clear_screen(capsys.readouterr())
    assert (folder / OLDER).exists()


def test_a_removal_that_fails_is_a_warning(folder: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    said: list[str] = []
    retention = Retention(Policy(1), folder, said.append)
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.rename", refuse)
        assert retention.apply() == []
    assert said == [f"could not remove {folder / OLDER}: Permission denied; it is left for the next time"]
    assert [c.path.name for c in retention.apply()] == [OLDER]


def test_what_was_cut_short_is_finished_later(folder: Path) -> None:
    """A removal after its rename, a save before it, and optimizer files whose manifest has gone on without them."""
    (folder / OLDER).rename(folder / f".removing-{OLDER}")
    shutil.copytree(folder / NEWER, folder / f".writing-{OLDER}")
    kept = (folder / NEWER / "optimizer_00000.safetensors").read_bytes()
    Retention(Policy(1, weights=True), folder, print).apply(saved(99))
    (folder / NEWER / "optimizer_00000.safetensors").write_bytes(kept)
    left = tidy(folder, print)
    assert [path.name for path in left] == [f".removing-{OLDER}", f".writing-{OLDER}"]
    assert sorted(path.name for path in folder.iterdir() if path.name != LOCK and path.name != "starts") == [NEWER]
    assert (
        not list((folder / NEWER).glob("optimizer_*"))
        and open_checkpoint(folder / NEWER).manifest["state"] == "weights"
    )
