"""The recipes for small GPUs train as the same run without offload does, and go on from each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.campaign import HALF, RECIPES, Campaign, switches
from tests.conftest import Run, TinyData, starts_processes
from tests.launches import Launch

pytestmark = starts_processes
ROOT = Path(__file__).resolve().parents[2]
# bf16's last bit is 4e-3; the optimizer on a CPU rounds its fp32 otherwise than torch's.
TOLERANCE = 1e-4
OFFLOADS = sorted(file.stem for file in (ROOT / "ds_configs").glob("*.json") if "offload_" in file.read_text())
TIGHT = "tight"


def stage(recipe: str) -> int:
    """Of a ready overlay."""
    if recipe == TIGHT:
        return 3
    found: int = json.loads((ROOT / "ds_configs" / f"{recipe}.json").read_text())["zero_optimization"]["stage"]
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_as_without_offload(campaign: Campaign, name: str) -> None:
    assert campaign.losses(name, 2) == pytest.approx(campaign.losses(f"bf16_stage{stage(name)}", 2), rel=TOLERANCE)


@pytest.mark.parametrize(("name", "before"), switches(RECIPES))
def test_a_run_goes_on_with_another_recipe(campaign: Campaign, name: str, before: str) -> None:
    whole, went_on = campaign.losses(name, 2), campaign.losses(f"{name}_after_{before}", 2)
    assert went_on == pytest.approx({u: loss for u, loss in whole.items() if u > HALF // 2}, rel=TOLERANCE)
    assert "the state is taken up by name" in campaign.ended(f"{name}_after_{before}", 2).said


def test_nothing_is_lost_on_nvme(campaign: Campaign) -> None:
    assert campaign.losses("wide_on_nvme", 2) == pytest.approx(campaign.losses("wide", 2), rel=TOLERANCE)


class Wide:
    """All recipes, NVMe too, on a model that is wide enough for DeepSpeed to swap it, on one and on two ranks; and one
    whose weights have to leave memory again at once."""

    updates, half = 8, 4

    def __init__(self, root: Path, data: TinyData) -> None:
        self.runs: dict[str, Run] = {}
        self.launches: dict[str, Launch] = {}
        common = {
            **data.settings, "n_embd": 640, "n_layers": 3, "precision": "bf16", "nvme_path": str(root / "nvme"),
            "training_tokens": self.updates * 256, "token_ckpt": self.half * 256,
            "max_lr": 5e-4, "min_lr": 1e-4,  # at a large rate two stages without offload differ by 2e-3 in bf16
        }  # fmt: skip
        overlay = json.loads((ROOT / "ds_configs/zero3_nvme_all.json").read_text())
        names = ("max_live_parameters", "max_reuse_distance")
        overlay["zero_optimization"] |= {f"stage3_{name}": 2_000_000 for name in names}
        (root / "tight.json").write_text(json.dumps(overlay))
        for ranks in (1, 2):
            settings = {f"none{stage}": {"zero_stage": stage} for stage in (2, 3)}
            settings |= {name: {"deepspeed_overlay": f"ds_configs/{name}.json"} for name in OFFLOADS}
            settings |= {TIGHT: {"deepspeed_overlay": str(root / "tight.json")}}
            whole = self._launch(root / f"whole_{ranks}", common, ranks, settings)
            sources = {f"{name} after {before}": (name, before) for name, before in switches(OFFLOADS)}
            sources |= {f"{name} after {name}": (name, name) for name in [*OFFLOADS, TIGHT]}
            resumed = {
                name: {**settings[after], "load_ckpt": self.runs[f"{before} {ranks}"].checkpoint(self.half)}
                for name, (after, before) in sources.items()
            }
            self._launch(root / f"resumed_{ranks}", common, ranks, resumed, [whole])

    def _launch(self, folder: Path, common: Any, ranks: int, settings: Any, after: Any = ()) -> Launch:
        runs = {name: Run(folder / name.replace(" ", "_"), {**common, **own}) for name, own in settings.items()}
        launch = Launch(folder, ranks, {name: run.words() for name, run in runs.items()}, after)
        self.runs |= {f"{name} {ranks}": run for name, run in runs.items()}
        self.launches |= {f"{name} {ranks}": launch for name in runs}
        return launch

    def losses(self, name: str, ranks: int) -> dict[int, float]:
        """Of a finished training."""
        ended = self.launches[f"{name} {ranks}"][name]
        assert ended.code == 0, ended.said + ended.complained
        return self.runs[f"{name} {ranks}"].losses()


@pytest.fixture(scope="session")
def wide(shared_folder: Path, tiny_data: TinyData) -> Wide:
    (shared_folder / "wide").mkdir(exist_ok=True)
    return Wide(shared_folder / "wide", tiny_data)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [*OFFLOADS, TIGHT])
def test_every_recipe_trains_as_without_offload(wide: Wide, name: str, ranks: int) -> None:
    expected = wide.losses(f"none{stage(name)}", ranks)
    assert wide.losses(name, ranks) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "before"), [*switches(OFFLOADS), *((name, name) for name in [*OFFLOADS, TIGHT])])
def test_every_recipe_goes_on_from_itself_and_from_another(wide: Wide, name: str, before: str, ranks: int) -> None:
    whole, went_on = wide.losses(name, ranks), wide.losses(f"{name} after {before}", ranks)
    rest = {update: loss for update, loss in whole.items() if update > wide.half}
    assert went_on == (rest if name == before else pytest.approx(rest, rel=TOLERANCE))
