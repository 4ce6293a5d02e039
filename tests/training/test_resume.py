"""A run that is resumed in new processes goes on as the one that never stopped; what cannot go on is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsllama.checkpoint.catalog import list_checkpoints, open_checkpoint
from dsllama.inference import load_model
from dsllama.training import engine as deepspeed_engine
from dsllama.training.run import main as train
from tests.campaign import BEGUN, BEGUN_WITH, HALF, OWN_FILES, RESUMED, RESUMED_LONG, UPDATES, Campaign, flip, halfway
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


def test_a_run_goes_on_with_other_ranks_stage_and_micro_batch_and_says_so(campaign: Campaign) -> None:
    whole, moved = campaign.losses("fp32_stage0"), campaign.losses("moved", 2)
    assert moved == pytest.approx({update: loss for update, loss in whole.items() if update > HALF}, rel=1e-5)
    said = campaign.ended("moved", 2).said
    assert "topology     ranks 1 -> 2, zero_stage 0 -> 3, batch_size 2 -> 1: the state is taken up by name" in said


def test_a_damaged_checkpoint_is_passed_over_in_the_same_start(campaign: Campaign) -> None:
    whole, fallen_back = campaign.losses("fp32_stage2", 2), campaign.run("fallen_back", 2)
    resumed = fallen_back.losses()  # the log is the copied run's, and then this one's
    assert {update: loss for update, loss in resumed.items() if update <= UPDATES} == whole and len(resumed) == 24
    said = campaign.ended("fallen_back", 2).said
    damaged, older = fallen_back.checkpoint(20), fallen_back.checkpoint(10)
    assert f"passing over the damaged checkpoint {damaged}: optimizer_00001.safetensors is damaged in block 0 (" in said
    assert f"resuming     {older}: update 10" in said
    assert "11/24" in said and "10/24" not in said
    assert list(open_checkpoint(damaged).damages()) == []
    assert len(list(damaged.parent.glob("damaged-update_0000020-*"))) == 1


@pytest.mark.parametrize("name", BEGUN_WITH)
def test_a_run_begins_with_the_weights_of_another(campaign: Campaign, name: str) -> None:
    run, source = campaign.run(f"begun_with_{name}", 2), campaign.run(name, 2)
    model = load_model(source.folder / "checkpoints")
    rows = torch.from_numpy(campaign.data.tokens[:257].astype("int64"))
    with torch.no_grad():
        expected = float(model(rows[:-1].view(8, 32), rows[1:].view(8, 32)))
    first, *_ = run.rows()
    assert float(first["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(first["learning_rate"]) == pytest.approx(0.005) and len(run.rows()) == 6
    assert f"weights      {source.folder / 'checkpoints'}/update_" in campaign.ended(f"begun_with_{name}", 2).said
    assert open_checkpoint(run.folder / "checkpoints").manifest["optimizer_step"] == 6


def test_a_run_begins_with_the_newest_weights_that_are_whole(
    campaign: Campaign, tmp_path: Path, capsys, caplog
) -> None:
    source = shutil.copytree(campaign.run("fp32_stage1").folder / "checkpoints", tmp_path / "source")
    flip(source / "update_0000020" / "weights_00000.safetensors")
    run = Run(tmp_path / "run", {**campaign.run("fp32_stage1").settings, **BEGUN, "zero_stage": 1, "init_from": source})
    assert train(run.words()) == 0
    assert "weights_00000.safetensors is damaged in block 0 (" in caplog.text
    assert f"beginning with {source}/update_0000010" in caplog.text and len(run.rows()) == 6


def test_a_finished_run_says_that_nothing_is_left(campaign: Campaign, capsys) -> None:
    finished = campaign.run("fp32_stage1")
    assert train(Run(finished.folder, {**finished.settings, "load_ckpt": "auto"}).words()) == 0
    assert "nothing is left to train" in capsys.readouterr().out


@pytest.mark.parametrize("name", OWN_FILES)
def test_the_engines_own_files_are_followed_by_those_that_are_asked_for(campaign: Campaign, name: str) -> None:
    own, resumed = (campaign.run(n, 2) for n in (name, f"{name}_resumed"))
    saved = list_checkpoints(own.folder / "checkpoints")[-1]
    assert (saved / "engine").is_dir()
    assert not open_checkpoint(saved).portable
    assert open_checkpoint(resumed.folder / "checkpoints").portable


@pytest.mark.parametrize("changes", [{"zero_stage": 3}, {"precision": "bf16"}])
def test_the_engines_own_files_are_refused_in_another_topology(
    campaign: Campaign, changes: dict[str, Any], tmp_path: Path, capsys
) -> None:
    finished = campaign.run("own_files")
    copy = Run(tmp_path / "copy", {**finished.settings, **changes, "load_ckpt": "true"})
    shutil.copytree(finished.folder, copy.folder)
    assert train(copy.words()) == 2
    message = one_clear_screen(capsys.readouterr())
    assert next(iter(changes)) in message
    assert "checkpoint_format portable" in message


@pytest.mark.parametrize("number", [1, 2])
def test_checkpoints_of_earlier_formats_are_whole(campaign: Campaign, number: int, tmp_path: Path) -> None:
    saved = list_checkpoints(campaign.run("own_files").folder / "checkpoints")[-1]
    copy = shutil.copytree(saved, tmp_path / saved.name)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["state"], manifest["digest"]
    manifest["format"] = f"dsllama-checkpoint-{number}"
    if number == 1:
        manifest["topology"] = manifest.pop("parallel_layout")
    else:
        text = json.dumps(manifest, sort_keys=True)
        manifest["digest"] = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    opened = open_checkpoint(copy)
    assert not opened.portable
    assert opened.manifest["parallel_layout"]["ranks"] == 1
    assert load_model(copy).state_dict().keys() == load_model(saved).state_dict().keys()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_state_that_comes_out_otherwise_is_refused_on_every_rank(campaign: Campaign, ranks: int) -> None:
    for rank, told in enumerate(campaign.ended("refused_loads", ranks).values):
        assert "the loss of the pinned sequence is" in told["untrue"], rank
        assert "was 7.0" in told["untrue"]
        assert f"weights_{ranks - 1:05d}.safetensors is damaged in block 0 (" in told["flipped"], rank
        assert told["whole"] == ""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_cannot_copy_deepspeeds_script_leaves_nobody_waiting(campaign: Campaign, ranks: int) -> None:
    first, *others = campaign.ended("unwritable_script", ranks).values
    assert "zero_to_fp32.py" in first
    assert others == [""] * (ranks - 1)


@pytest.mark.parametrize("name", ["full_disk", "full_disk_stops", "full_disk_own_files"])
def test_a_disk_that_takes_no_checkpoint_ends_every_rank_and_loses_nothing(campaign: Campaign, name: str) -> None:
    ended, folder = campaign.ended(name, 2), campaign.runs[name, 2].folder / "checkpoints"
    assert ended.code == 1
    failed = 10 if name == "full_disk_stops" else UPDATES
    assert f"training stopped: the checkpoint of update {failed} could not be written: rank 0: " in ended.complained
    assert ("not saved    the checkpoint of update 10" in ended.said) == (failed == UPDATES)
    assert f"{failed}/{UPDATES}" in ended.said and f"{failed + 1}/{UPDATES}" not in ended.said
    assert list_checkpoints(folder) == [] and list(folder.glob(".writing*")) == []


def test_a_save_that_fails_is_made_up_for_by_the_next(campaign: Campaign, tmp_path: Path, capsys) -> None:
    run = Run(tmp_path / "run", campaign.run("fp32_stage1").settings)
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / ".writing-update_0000010").write_text("a file where a folder is needed")
    assert train(run.words()) == 0
    assert "not saved    the checkpoint of update 10 could not be written: rank 0: " in capsys.readouterr().out
    assert list_checkpoints(run.folder / "checkpoints") == [run.checkpoint(20)]
    assert run.losses() == campaign.losses("fp32_stage1")


def test_a_folder_that_vanishes_is_not_made_anew(campaign: Campaign, tmp_path: Path, capsys, monkeypatch) -> None:
    run = Run(tmp_path / "run", campaign.run("fp32_stage1").settings)
    weights_are_finite = deepspeed_engine.weights_are_finite

    def vanish(engine: Any) -> bool:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        return weights_are_finite(engine)

    monkeypatch.setattr(deepspeed_engine, "weights_are_finite", vanish)
    assert train(run.words()) == 1
    printed = capsys.readouterr()
    assert "not saved    the checkpoint of update 10 could not be written" in printed.out
    assert "training stopped: the checkpoint of update 20 could not be written" in printed.err
    assert not (run.folder / "checkpoints").exists()


def test_a_folder_in_the_place_of_the_one_that_vanished_is_not_written_to(
    campaign: Campaign, tmp_path: Path, capsys, monkeypatch
) -> None:
    run = Run(tmp_path / "run", campaign.run("fp32_stage1").settings)
    weights_are_finite = deepspeed_engine.weights_are_finite

    def replace(engine: Any) -> bool:
        folder = run.folder / "checkpoints"
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        return weights_are_finite(engine)

    with monkeypatch.context() as patched:
        patched.setattr(deepspeed_engine, "weights_are_finite", replace)
        patched.setitem(run.settings, "on_failed_save", "stop")
        assert train(run.words()) == 1
    assert "it has vanished, or another is in its place" in capsys.readouterr().err
    assert list((run.folder / "checkpoints").iterdir()) == []


def test_a_disk_without_room_for_one_checkpoint_is_refused_beforehand(
    campaign: Campaign, tmp_path: Path, capsys, monkeypatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    run = Run(tmp_path / "run", campaign.run("fp32_stage1").settings)
    assert train(run.words()) == 2
    assert "has 1.05 MB free, and a checkpoint takes 1." in one_clear_screen(capsys.readouterr())


def damaged(update: int, how: str) -> Callable[[Run], None]:
    def apply(trained: Run) -> None:
        folder = trained.checkpoint(update)
        file = folder / "weights_00000.safetensors"
        if how == "truncated":
            file.write_bytes(file.read_bytes()[:-1])
        elif how == "flipped":
            flip(file)
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
    "another order of the data": ([], {"load_ckpt": "true", "shuffle": "true"}, ["shuffle", "True", "False"]),
    "other held-out data": ([], {"load_ckpt": "true", "validation_tokens": 500}, ["validation_tokens", "500"]),
    "asked for by name and truncated": (
        [damaged(20, "truncated")],
        {"load_ckpt": "update_0000020"},
        ["bytes instead of", "update_0000010"],
    ),
    "asked for by name and a file missing": ([damaged(20, "missing")], {"load_ckpt": "update_0000020"}, ["is missing"]),
    "asked for by name and one bit is another": (
        [damaged(20, "flipped")],
        {"load_ckpt": "update_0000020"},
        ["weights_00000.safetensors is damaged in block 0 ("],
    ),
    "newer ones lie ahead": (
        [],
        {"load_ckpt": "update_0000010"},
        ["update_0000020", "write over", "another --ckpt_dir"],
    ),
    "manifest gone": ([damaged(20, "no manifest")], {"load_ckpt": "update_0000020"}, ["no manifest.json"]),
    "manifest torn": ([damaged(20, '{"format":')], {"load_ckpt": "update_0000020"}, ["cannot be read"]),
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
        [damaged(20, '{"format": "x", "files": {}}')],
        {"load_ckpt": "update_0000020"},
        ["format"],
    ),
    "other weights to begin with": (
        [],
        {"ckpt_dir": "elsewhere", "init_from": "update_0000020", "n_embd": 64, "theta": 500},
        ["n_embd = 64", "32"],
    ),
    "nothing to begin with": ([], {"ckpt_dir": "elsewhere", "init_from": "update_0000030"}, ["there is no such"]),
    "a place for its notes that is a file": (
        [lambda trained: (trained.folder / "elsewhere").mkdir(), lambda t: (t.folder / "elsewhere/starts").touch()],
        {"ckpt_dir": "copy/elsewhere"},
        ["starts", "is a file"],
    ),
    "damaged weights to begin with": (
        [damaged(20, "flipped")],
        {"ckpt_dir": "elsewhere", "init_from": "update_0000020"},
        ["init_from", "weights_00000.safetensors is damaged in block 0 ("],
    ),
    "the newest damaged and no other": (
        [damaged(10, "missing"), damaged(20, "flipped")],
        {"load_ckpt": "true"},
        ["none of the 2"],
    ),
    "none of them whole": (
        [damaged(10, "truncated"), damaged(20, "truncated")],
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
    for field in ("load_ckpt", "init_from"):
        if str(changes.get(field, "")).startswith("update_"):
            copy.settings[field] = copy.folder / "checkpoints" / changes[field]
    words = copy.words()
    if "ckpt_dir" in changes:
        words += ["--ckpt_dir", str(tmp_path / changes["ckpt_dir"])]
    assert train(words) == 2
    message = one_clear_screen(capsys.readouterr())
    assert [word for word in expected if word not in message] == [], message
