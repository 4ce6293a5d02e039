"""Whatever keeps hosts from training together is named, with its host and a remedy, in half a minute."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsllama.cluster.doctor import LIMIT_SECONDS, _rounds
from tests.conftest import REPOSITORY, Run, TinyData
from tests.hosts import DSLLAMA, Hosts, why_not

NAMES = ["alpha", "beta", "gamma"]


@pytest.mark.parametrize("count", range(2, 12))
def test_each_host_meets_two_others_and_nobody_two_at_once(count: int) -> None:
    rounds = _rounds(count)
    assert len(rounds) <= 3
    for pairs in rounds:
        met = [number for pair in pairs for number in pair]
        assert len(met) == len(set(met))
    partners = [{n for pairs in rounds for p in pairs if me in p for n in p} - {me} for me in range(count)]
    assert all(len(found) == min(2, count - 1) for found in partners)


def test_this_machine_alone(tiny_data: TinyData, tmp_path: Path) -> None:
    words = [DSLLAMA, "doctor", "--json", *Run(tmp_path / "run", tiny_data.settings).words()]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    told = json.loads(done.stdout)
    assert (done.returncode, told["problems"]) == (0, []), done.stdout + done.stderr
    assert told["hosts"][0]["data"]["is"]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())  # nothing is left there


class Ward:
    """Three hosts, and a training that they are asked about."""

    def __init__(self, hosts: Hosts, folder: Path, data: TinyData) -> None:
        self.hosts, self.folder = hosts, folder
        self.data = shutil.copytree(data.folder, folder / "data")
        self.config = folder / "config.yaml"
        settings = {**data.settings, "dataset_dir": str(self.data)}
        self.config.write_text(json.dumps(settings))
        self.run = Run(folder / "run", {})
        self.hostfile = hosts.hostfile()

    def examined(self, *words: Any) -> tuple[float, str]:
        """(seconds, what the doctor says on alpha)."""
        began = time.monotonic()
        asked = [DSLLAMA, "doctor", "--hostfile", self.hostfile, "--config", self.config, *self.run.words(), *words]
        said = self.hosts.run("alpha", *asked).stdout
        return time.monotonic() - began, said

    def hides(self, host: str, place: Path, content: str | None = None) -> None:
        """On that host alone the file has another content, or the folder is another one, and empty."""
        if content is None:
            self.hosts.do(host, "mount", "-t", "tmpfs", "-o", "size=1m", "none", place)
        else:
            other = self.folder / f"other_{place.name}"
            other.write_text(content)
            self.hosts.do(host, "mount", "--bind", other, place)


def resolves_not(ward: Ward) -> None:
    ward.hostfile.write_text(ward.hostfile.read_text() + "delta slots=1\n")


def has_another_key(ward: Ward) -> None:
    known = ward.hosts.folder / "known_hosts"
    lines = known.read_text().splitlines()
    alpha = lines[0].split()[1:]
    known.write_text("\n".join([lines[0], " ".join([lines[1].split()[0], *alpha]), lines[2]]) + "\n")


def is_down(ward: Ward) -> None:
    ward.hosts.crash("beta")


def is_frozen(ward: Ward) -> None:
    os.kill(ward.hosts._inits["beta"], signal.SIGSTOP)


def is_cut_off(ward: Ward) -> None:
    ward.hosts.link("beta", "down")


def lets_nobody_in(ward: Ward) -> None:
    ward.hosts.crash("beta")
    (ward.hosts.folder / "empty").write_text("")
    ward.hosts.boot("beta", keys="empty")


def has_another_torch(ward: Ward) -> None:
    import torch

    (found,) = Path(torch.__file__).parent.parent.glob("torch-*.dist-info/METADATA")
    lines = ["Version: 2.0.1\n" if line.startswith("Version: ") else line for line in found.open(encoding="utf-8")]
    ward.hides("beta", found, "".join(lines))


def has_no_environment(ward: Ward) -> None:
    ward.hides("beta", Path(sys.executable).parent)


def has_another_configuration(ward: Ward) -> None:
    ward.hides("beta", ward.config, json.dumps({**json.loads(ward.config.read_text()), "max_lr": 0.5}))


def has_other_data(ward: Ward) -> None:
    import numpy as np

    shard = sorted(ward.data.glob("*.npy"))[-1]
    other = ward.folder / "other.npy"
    np.save(other, np.load(shard)[::-1])
    ward.hosts.do("beta", "mount", "--bind", other, shard)


def has_no_data(ward: Ward) -> None:
    ward.hides("beta", ward.data)


def has_its_own_ckpt_dir(ward: Ward) -> None:
    folder = ward.run.folder / "checkpoints"
    folder.mkdir(parents=True)
    ward.hides("beta", folder)


def has_a_full_disk(ward: Ward) -> None:
    has_its_own_ckpt_dir(ward)
    full = ward.run.folder / "checkpoints" / "full"
    ward.hosts.do("beta", "sh", "-c", f"head -c 2M /dev/zero > {full}; true")


def has_its_port_taken(ward: Ward) -> None:
    holds = "import socket, time; s = socket.socket(); s.bind(('', 29500)); s.listen()"
    script = f"{holds}; print(1, flush=True); time.sleep(600)"
    process = ward.hosts.start("alpha", sys.executable, "-c", script)
    assert process.stdout is not None and process.stdout.readline()


def has_another_clock(ward: Ward) -> None:
    ward.hosts.crash("beta")
    ward.hosts.boot("beta", below="", LD_PRELOAD=_faketime(), FAKETIME="+7s", FAKETIME_DONT_FAKE_MONOTONIC="1")


def has_half_the_cores(ward: Ward) -> None:
    ward.hosts.crash("beta")
    ward.hosts.boot("beta", below="taskset -c 0")


def has_a_slow_cable(ward: Ward) -> None:
    ward.hosts.do(
        "beta", "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "100mbit", "burst", "64kb", "latency", "1s"
    )


def _faketime() -> str:
    return next((str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), "")


FAULTS: dict[Callable[[Ward], None], tuple[str, str]] = {
    resolves_not: ("delta", "does not resolve"),
    has_another_key: ("beta", "has another host key"),
    is_down: ("beta", "has no ssh server on that port"),
    is_frozen: ("beta", "does not answer"),
    is_cut_off: ("beta", "does not answer|cannot be reached"),
    lets_nobody_in: ("beta", "does not let you in"),
    has_another_torch: ("beta", r"has other versions: torch 2\.0\.1 \(elsewhere"),
    has_no_environment: ("beta", "has no "),
    has_another_configuration: ("beta", "reads another configuration"),
    has_other_data: ("beta", "has other data"),
    has_no_data: ("beta", "data cannot be used"),
    has_its_own_ckpt_dir: ("beta", "its ckpt_dir .* is another folder than that of alpha, gamma"),
    has_a_full_disk: ("beta", "ckpt_dir cannot be used .No space left on device"),
    has_its_port_taken: ("alpha", "the port 29500 cannot be used .Address already in use"),
    has_another_clock: ("beta", r"its clock is 7\.\d s ahead"),
    has_half_the_cores: ("beta", r"has another number of cores: 1 \(elsewhere 2\)"),
    has_a_slow_cable: ("beta", "an all-reduce takes"),
}


@pytest.fixture
def ward(tmp_path: Path, tiny_data: TinyData) -> Iterator[Ward]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(tmp_path / "hosts", NAMES) as hosts:
        yield Ward(hosts, tmp_path, tiny_data)


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_names_the_host_and_what_it_lacks(ward: Ward, fault: Callable[[Ward], None]) -> None:
    if fault is has_another_clock and not _faketime():
        pytest.skip("needs libfaketime (apt-get install libfaketime)")
    fault(ward)
    seconds, said = ward.examined()
    host, told = FAULTS[fault]
    print(f"{fault.__name__}: {seconds:.1f} s\n{said}")
    assert re.search(rf"\d+\. {host}.*: {told}", said), said
    problems = [line for line in said.splitlines() if re.match(r" +\d+\. ", line)]
    assert all(re.match(rf" +\d+\. {host}\b", line) for line in problems), said  # and nobody else
    assert float(re.findall(r"\((\d+) s\)", said)[-1]) <= LIMIT_SECONDS + 1


@pytest.mark.long
def test_three_hosts_that_are_well(ward: Ward) -> None:
    _, said = ward.examined()
    assert "3 of 3 hosts are well" in said
    assert not list((ward.run.folder / "checkpoints").iterdir())
