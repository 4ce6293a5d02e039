"""Tiny trainings that many test files look at: whole ones and resumed ones, on one and on two ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsllama.training.engine import world_from_environment
from tests import crashes, gradients
from tests.conftest import TINY, Run, TinyData
from tests.launches import Call, Ended, Launch, Words

STAGES = (0, 1, 2, 3)
UPDATES = 20
HALF = UPDATES // 2
# CPUs without bf16 units take several times as long for it: but for one, those are shorter.
_SHORT = {"training_tokens": HALF * 256, "token_ckpt": HALF // 2 * 256}
EVERY_STAGE: dict[str, dict[str, Any]] = {
    **{f"fp32_stage{stage}": {"zero_stage": stage} for stage in STAGES},
    **{f"bf16_stage{stage}": {"zero_stage": stage, "precision": "bf16", **_SHORT} for stage in STAGES},
    "bf16_stage1": {"zero_stage": 1, "precision": "bf16"},
}
# The same trainings, with the files that the engine itself writes; on two ranks.
OWN_FILES = {
    f"{name}_own_files": {**EVERY_STAGE[name], "checkpoint_format": "deepspeed"}
    for name in ("bf16_stage1", "bf16_stage2", "fp32_stage3")
}
# Ready overlays for small GPUs, each beside the same stage without offload; and a switch to the next one at a resume.
RECIPES = {
    name: {"precision": "bf16", "deepspeed_overlay": f"ds_configs/{name}.json", **_SHORT}
    for name in ("zero2_cpu_offload", "zero3_cpu_optimizer", "zero3_cpu_offload")
}
# Wide enough for DeepSpeed to swap, and such that on two ranks a gradient begins at an odd address.
WIDE = {
    "n_embd": 640,
    "n_layers": 1,
    "precision": "bf16",
    "zero_stage": 3,
    "training_tokens": 3 * 256,
    "max_lr": 1e-3,
    "warmup_iterations": 1,
}
OFFLOADED = {
    **{"vocab_size": 4096, "n_embd": 128, "n_heads": 8, "n_layers": 2, "batch_size": 2, "max_seq_len": 64},
    **{"tokens_per_update": 512, "training_tokens": 51200, "warmup_iterations": 1, "tokenizer_path": "none.json"},
}
_LONGER = {"training_tokens": 24 * 256}
_ONE_CHECKPOINT = {"token_ckpt": "1G"}  # the last one
# That of a run that is killed; see test_crashes.py.
NEVER_KILLED = {"zero_stage": 1, "training_tokens": 120 * 256, **crashes.SETTINGS, **_ONE_CHECKPOINT}
TRAININGS: dict[str, dict[str, Any]] = {
    **EVERY_STAGE,
    **OWN_FILES,
    "dropout": {"zero_stage": 1, "dropout": 0.2},
    # Into a second epoch.
    "shuffled": {"zero_stage": 1, "shuffle": "true", "training_tokens": 40 * 256},
    "one_at_a_time": {"zero_stage": 2, "batch_size": 1, **_ONE_CHECKPOINT},
    "no_clipping": {"zero_stage": 0, "gradient_clipping": 0, **_ONE_CHECKPOINT},
}
ON_ONE_RANK: dict[str, dict[str, Any]] = {
    "own_files": {"checkpoint_format": "deepspeed", **_SHORT},
    "huge_rate": {"precision": "bf16", "max_lr": 3e3, "min_lr": 0, "warmup_iterations": 1},
    # Each update multiplies the weights by -1e41.
    "huge_decay": {
        "token_ckpt": 256,
        "max_lr": 1e38,
        "weight_decay": 1000,
        "warmup_iterations": 1,
        "schedule": "constant",
    },
    "diverging": {"zero_stage": 0, "token_ckpt": 256, "max_lr": 1e30, "schedule": "constant", "gradient_clipping": 0},
    "keeping": {
        **{"token_ckpt": 256, "keep_last": 2, "keep_every": 6 * 256, "keep_best": 1},
        **{"validation_tokens": 500, "eval_interval": 7},
    },
    "keeping_weights": {"zero_stage": 1, "token_ckpt": 5 * 256, "keep_last": 1, "keep_weights": "true"},
    "short_of_time": {
        **{"max_run_time": 4, "grace_period": 1e-3, "training_tokens": 10**6 * 256},
        "token_ckpt": 10 * 256,
    },
    "reporting": {
        "validation_tokens": 1000,
        "eval_interval": 5,
        "sample_prompts": ["the dog", "the dog"],
        "sample_tokens": 4,
        "seed": 3,
    },
}
# In these, no file can become larger than a checkpoint's.
ON_TWO_RANKS: dict[str, dict[str, Any] | Call] = {
    "no_room": Call("tests.engine_tasks:limit_files", {"size": 2**16}),
    "full_disk": {"zero_stage": 2},
    "full_disk_stops": {"zero_stage": 3, "on_failed_save": "stop"},
    "full_disk_own_files": {"zero_stage": 1, "checkpoint_format": "deepspeed"},
    "room": Call("tests.engine_tasks:limit_files"),
    **RECIPES,
}
# How fp32_stage0 on one rank goes on, on two.
MOVED = {"zero_stage": 3, "batch_size": 1}
# Whose weights others begin with, and how those go on.
BEGUN_WITH = ["fp32_stage1", "bf16_stage1_own_files"]
BEGUN = {"zero_stage": 3, "seed": 4711, "training_tokens": 6 * 256, "warmup_iterations": 2, **_ONE_CHECKPOINT}
# On two ranks, where the state is spread, everything is made and resumed; on one the rest only where `long` asks.
LONG = ["bf16_stage0", "bf16_stage2", "bf16_stage3"]
RESUMED = {
    1: ["fp32_stage0", "fp32_stage1", "bf16_stage1", "dropout", "shuffled"],
    2: [*EVERY_STAGE, *OWN_FILES, "dropout", "shuffled"],
}
RESUMED_LONG = [name for name in RESUMED[2] if name not in RESUMED[1] and name not in OWN_FILES]


def on_one_and_two_ranks(prefix: str, stages: Sequence[int] = STAGES) -> Any:
    """The decorator of a test that looks at trainings prefix + stage: `stage` and `ranks` are its parameters."""
    cases = [
        pytest.param(stage, ranks, marks=[pytest.mark.long] if ranks == 1 and f"{prefix}{stage}" in LONG else [])
        for ranks in (1, 2)
        for stage in stages
    ]
    return pytest.mark.parametrize(("stage", "ranks"), cases)


class Campaign:
    """Trainings and calls by name and number of ranks, in launches that start when somebody first looks."""

    def __init__(self, root: Path, data: TinyData) -> None:
        self.root, self.data = root, data
        self.runs: dict[tuple[str, int], Run] = {}
        self.launches: dict[tuple[str, int], Launch] = {}
        root.mkdir(exist_ok=True)
        for ranks in (1, 2):
            alone = ranks == 1
            trainings = {n: s for n, s in TRAININGS.items() if not (alone and (n in LONG or n in OWN_FILES))} | (
                ON_ONE_RANK if alone else ON_TWO_RANKS
            )
            if not alone:
                swapped = {"deepspeed_overlay": "ds_configs/zero3_nvme.json", "nvme_path": str(root / "nvme_wide")}
                trainings |= {"wide": WIDE, "wide_on_nvme": WIDE | swapped, "never_killed": NEVER_KILLED}
            whole = [self._launch(f"whole_{ranks}", ranks, trainings, self._calls(f"whole_{ranks}", ranks))]
            resumed = self._resumed(RESUMED[ranks], ranks)
            calls: dict[str, Call] = {}
            if not alone:
                resumed |= {"moved": {**MOVED, "load_ckpt": self.runs["fp32_stage0", 1].checkpoint(HALF)}}
                whole.append(self.launches["fp32_stage0", 1])
                resumed |= {"fallen_back": {**EVERY_STAGE["fp32_stage2"], "load_ckpt": "auto", **_LONGER}}
                places = {"source": self.runs["fp32_stage2", 2].folder, "target": self.root / "resumed_2/fallen_back"}
                for name, before in switches(RECIPES):
                    source = self.runs[before, 2].checkpoint(HALF // 2)
                    resumed |= {f"{name}_after_{before}": {**RECIPES[name], "load_ckpt": source}}
                calls["damage"] = Call("tests.campaign:damage", {name: str(place) for name, place in places.items()})
                resumed |= {
                    f"begun_with_{name}": {**BEGUN, "init_from": self.runs[name, 2].folder / "checkpoints"}
                    for name in BEGUN_WITH
                }
            self._launch(f"resumed_{ranks}", ranks, resumed, calls, whole)
            if alone:
                # Not added to `whole`, which the launch of the resumed ones waits for.
                more = self._launch("long", 1, {name: TRAININGS[name] for name in LONG}, {})
                self._launch("resumed_long", 1, self._resumed(RESUMED_LONG, 1), {}, [*whole, more])

    def ended(self, name: str, ranks: int = 1) -> Ended:
        """How a training or a call ended."""
        return self.launches[name, ranks][name]

    def run(self, name: str, ranks: int = 1) -> Run:
        """A training that is finished."""
        ended = self.ended(name, ranks)
        assert ended.code == 0, ended.said + ended.complained
        return self.runs[name, ranks]

    def losses(self, name: str, ranks: int = 1) -> dict[int, float]:
        """The loss of each update of a finished training."""
        return self.run(name, ranks).losses()

    def _calls(self, launch: str, ranks: int) -> dict[str, Call]:
        calls, runs = gradients.work(self.root / launch, self.data, ranks)
        self.runs |= {(name, ranks): run for name, run in runs.items()}
        calls["refused_loads"] = Call("tests.topologies:refused", {"folder": str(self.root / launch / "refused_loads")})
        calls["unwritable_script"] = Call(
            "tests.topologies:unwritable_script", {"folder": str(self.root / launch / "unwritable_script")}
        )
        if ranks == 2:
            calls["swap_folders"] = Call("tests.engine_tasks:swap_folders", {"place": str(self.root / "nvme")})
        if ranks == 1:
            calls |= {f"rates{stage}": Call("tests.applied_rates:rates", {"stage": stage}) for stage in STAGES}
            settings = {
                **self.data.settings,
                "tokenizer_path": self.root / f"{launch}_tokenizer.json",
                **_ONE_CHECKPOINT,
            }
            run = self.runs["without_tokenizer", 1] = Run(self.root / launch / "without_tokenizer", settings)
            arguments = {"words": run.words(), "tokenizer": str(self.data.tokenizer.path)}
            overlay = self.root / f"{launch}_param_dtype.json"
            overlay.write_text('{"data_types": {"param_dtype": "bf16"}}', encoding="utf-8")
            refused = Run(self.root / launch / "refused", {**self.data.settings, "deepspeed_overlay": overlay})
            calls["refused_by_the_engine"] = Call("dsllama.training.run:main", {"argv": refused.words()})
            calls["without_tokenizer"] = Call("tests.engine_tasks:train_without_tokenizer", arguments)
            recipe = {**OFFLOADED, "deepspeed_overlay": "ds_configs/zero2_cpu_offload.json"}
            calls["measured"] = Call("tests.engine_tasks:measured", {"settings": recipe})
            calls["partitioned"] = Call("tests.partitioned_model:report")
        return calls

    def _resumed(self, names: list[str], ranks: int) -> dict[str, dict[str, Any]]:
        sources = {name: self.runs[name, ranks].checkpoint(halfway(name)) for name in names}
        # Whatever the format that it was saved in, a resumed run saves in the one that it is told to.
        common = {"checkpoint_format": "portable"}
        return {
            f"{name}_resumed": {**TRAININGS[name], **common, "load_ckpt": source} for name, source in sources.items()
        }

    def _launch(
        self,
        name: str,
        ranks: int,
        trainings: Mapping[str, dict[str, Any] | Call],
        calls: dict[str, Call],
        after: Sequence[Launch] = (),
    ) -> Launch:
        folder = self.root / name
        work: dict[str, Words | Call] = {**calls}
        for training, settings in trainings.items():
            if isinstance(settings, Call):
                work[training] = settings
                continue
            run = self.runs[training, ranks] = Run(folder / training, {**self.data.settings, **settings})
            work[training] = run.words()
        launch = Launch(folder, ranks, work, after)
        self.launches |= {(piece, ranks): launch for piece in work}
        return launch


def switches(names: Iterable[str]) -> list[tuple[str, str]]:
    """(recipe, recipe whose checkpoint it goes on from): each in turn, the first after the last."""
    names = list(names)
    return list(zip(names, [names[-1], *names[:-1]], strict=True))


def halfway(name: str) -> int:
    """The update of a training's first checkpoint, from which it is resumed."""
    return {**TINY, **TRAININGS[name]}["token_ckpt"] // TINY["tokens_per_update"]


def damage(source: str, target: str) -> None:
    """A copy of a run, with one bit another in the moments of its last checkpoint."""
    if world_from_environment()[0] == 0:  # the other rank sees it after the trainings in between
        shutil.copytree(source, target)
        flip(Path(target) / "checkpoints" / f"update_{UPDATES:07d}" / "optimizer_00001.safetensors")


def flip(file: Path) -> None:
    """Change a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
