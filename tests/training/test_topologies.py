"""A checkpoint by name goes on from in any other topology, as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.conftest import starts_processes
from tests.topologies import BEFORE, FILES, LONG_PAIRS, NVME_PAIRS, PAIRS, Moves, Topology

pytestmark = starts_processes


@pytest.fixture(scope="session")
def moves(shared_folder: Path) -> Moves:
    return Moves(shared_folder / "moves", PAIRS)


@pytest.fixture(scope="session")
def all_moves(shared_folder: Path) -> Moves:
    return Moves(shared_folder / "all_moves", LONG_PAIRS)


@pytest.fixture(scope="session")
def nvme_moves(shared_folder: Path) -> Moves:
    return Moves(shared_folder / "nvme_moves", NVME_PAIRS)


def check(moves: Moves, here: Topology, there: Topology) -> None:
    told, stayed = moves.pair(here, there), moves.source(here)["losses"]
    if here.overlay != "roundrobin":  # there DeepSpeed's own readers give each other's parameters
        assert told["different"] == []
    assert told["uncast"] == []
    assert told["steps"] == BEFORE
    tolerance = 1e-6 if here.precision == there.precision == "fp32" else 2e-4
    assert told["losses"] == pytest.approx(stayed, rel=tolerance)


@pytest.mark.parametrize(("here", "there"), PAIRS, ids=str)
def test_a_run_moves_to_another_topology(moves: Moves, here: Topology, there: Topology) -> None:
    check(moves, here, there)


@pytest.mark.long
@pytest.mark.parametrize(("here", "there"), LONG_PAIRS, ids=str)
def test_a_run_moves_from_any_topology_to_any_other(all_moves: Moves, here: Topology, there: Topology) -> None:
    check(all_moves, here, there)


@pytest.mark.long
@pytest.mark.parametrize(("here", "there"), NVME_PAIRS, ids=str)
def test_a_run_moves_to_nvme_and_back(nvme_moves: Moves, here: Topology, there: Topology) -> None:
    check(nvme_moves, here, there)


@pytest.mark.parametrize("here", FILES, ids=str)
def test_the_files_are_read_with_safetensors_alone(moves: Moves, shared_folder: Path, here: Topology) -> None:
    moves.source(here)
    folder = shared_folder / "moves" / f"of_{here}"
    expected = torch.load(folder / "state.pt")
    manifest = json.loads((folder / f"update_{BEFORE:07d}" / "manifest.json").read_text())
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in manifest["files"]:
        if not file.endswith(".safetensors"):
            continue
        with safe_open(folder / f"update_{BEFORE:07d}" / file, "pt") as opened:
            starts = json.loads(opened.metadata()["starts"])
            assert starts == manifest["files"][file.replace("optimizer", "weights")]["fragments"]
            for name in opened.keys():  # noqa: SIM118
                if "|" in name:
                    found.setdefault(name, []).append(
                        (starts[name.split("|")[0]][0], opened.get_tensor(name).flatten())
                    )
    assert found.keys() == expected.keys()
    for name, parts in found.items():
        assert torch.equal(torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])]), expected[name])
