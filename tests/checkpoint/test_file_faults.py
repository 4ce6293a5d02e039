"""Whatever happens to the files of a checkpoint, in writing or later: it is named, and a whole one is taken."""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dsllama.checkpoint.catalog import list_checkpoints, open_checkpoint
from tests.conftest import Run, TinyData
from tests.file_faults import DAMAGES, FILES, FOR_GOOD, OPERATIONS, Failure, built, damage, failures
from tests.launches import Call, Ended, Launch

pytestmark = pytest.mark.long
EACH, UPDATES = 4, 12
FAILURES = failures(60)


class FileFaults:
    """One run of two ranks that meets no fault, and as many as there are faults, with all resumed afterwards."""

    def __init__(self, folder: Path, data: TinyData) -> None:
        self.folder = folder
        self.settings = {
            **data.settings, "zero_stage": 1, "training_tokens": UPDATES * 256, "token_ckpt": EACH * 256,
            "load_ckpt": "auto", "keep_last": 2, "schedule": "constant",
        }  # fmt: skip
        self.runs = {"whole": Run(folder / "whole", {**self.settings, "keep_last": 10})}
        counting = {
            f"counted_{kind}": self._failing(f"counted_{kind}", Failure(0, kind, 0, -1, 0.0, 0), 0)
            for kind in OPERATIONS
        }
        self.whole = Launch(folder / "launch_whole", 2, {"whole": self.runs["whole"].words(), **counting})
        self.whole.make()
        self.made = {kind: [value[2] for value in self.whole[f"counted_{kind}"].values] for kind in OPERATIONS}
        failing, resumed, unreadable = {}, {}, {}
        for failure in FAILURES:
            name, made = str(failure), self.made[failure.operation][failure.rank]
            if not made:  # only the first rank makes folders, publishes and removes
                failure, made = replace(failure, rank=0), self.made[failure.operation][0]
            failing[name] = self._failing(name, failure, 1 + int(failure.share * made))
            longer = {**self.settings, "training_tokens": (UPDATES + 4) * 256}
            resumed[name] = Run(self.runs[name].folder, longer).words()
        for file in FILES:
            for how in DAMAGES:
                name = f"{file} {how}"
                run = self.runs[name] = Run(folder / name.replace(" ", "_"), self.settings)
                shutil.copytree(self.runs["whole"].folder, run.folder, copy_function=os.link)
                damage(run.checkpoint(UPDATES) / file, how)
                if how == "unreadable":
                    place = {"below": str(run.checkpoint(UPDATES) / file), "rank": -1, "operation": "r", "after": 1}
                    fault = {"words": run.words(), **place, "error": errno.EIO, "times": FOR_GOOD}
                    unreadable[name] = Call("tests.file_faults:train", fault)
                else:
                    unreadable[name] = run.words()
        # A longer one of the whole, for what the resumed ones must come to.
        self.runs["longer"] = Run(folder / "longer", {**self.settings, "training_tokens": (UPDATES + 4) * 256})
        self.failing = Launch(folder / "launch_failing", 2, {**failing, "longer": self.runs["longer"].words()})
        self.resumed = Launch(folder / "launch_resumed", 2, resumed, [self.failing])
        self.damaged = Launch(folder / "launch_damaged", 2, unreadable)

    def _failing(self, name: str, failure: Failure, after: int) -> Call:
        run = self.runs[name] = Run(self.folder / name.replace(" ", "_"), self.settings)
        return Call(
            "tests.file_faults:train",
            {
                "words": run.words(), "below": str(run.folder / "checkpoints"), "rank": failure.rank,
                "operation": failure.operation, "error": failure.error, "after": after, "times": failure.times,
            },
        )  # fmt: skip


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData):
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LD_PRELOAD", str(built(folder)))
        yield FileFaults(folder, tiny_data)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(faults: FileFaults, file: str, how: str) -> None:
    run, ended = faults.runs[f"{file} {how}"], faults.damaged[f"{file} {how}"]
    said = ended.said + ended.complained
    assert "Traceback" not in said
    damaged = run.folder / "checkpoints" / f"update_{UPDATES:07d}"
    passed_over = re.search(rf"passing over the damaged checkpoint {re.escape(str(damaged))}: (.*)", said)
    if passed_over is None:  # a letter of a number, as e for E, which is no other number
        assert how.startswith(("bit ", "page ")) and f"update_{UPDATES:07d}: update {UPDATES}" in said, said
        return
    assert file in passed_over[1]
    assert f"update_{UPDATES - EACH:07d}: update {UPDATES - EACH}" in said
    assert run.losses() == faults.runs["whole"].losses()
    assert not list(open_checkpoint(damaged).damages()), "it was not made anew"


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_a_disk_that_fails_while_a_checkpoint_is_written_costs_that_one_only(
    faults: FileFaults, failure: Failure
) -> None:
    ended, run = faults.failing[str(failure)], faults.runs[str(failure)]
    said = ended.said + ended.complained
    code, failed, _ = max(ended.values, key=lambda value: value[1])
    assert "Traceback" not in said, said
    assert failed >= 1
    assert code == 0 or os.strerror(failure.error) in said, said
    went_on = faults.resumed[str(failure)]
    assert went_on.code == 0, went_on.said + went_on.complained
    assert run.losses() == faults.runs["longer"].losses()
    found = list_checkpoints(run.folder / "checkpoints")
    assert [damage for path in found for damage in open_checkpoint(path).damages()] == []
    assert reported(ended, went_on) >= {path.name for path in found} >= {f"update_{UPDATES + 4:07d}"}


def reported(*ends: Ended) -> set[str]:
    """The names of the checkpoints that were said to be saved."""
    return {name for ended in ends for name in re.findall(r"^saved \S*(update_\d+) \(", ended.said, re.MULTILINE)}
