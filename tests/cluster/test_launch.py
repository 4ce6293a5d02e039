"""`dsllama launch`: what is printed is what runs, on the hosts that are meant, with the words that were typed."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsllama.cluster.launch import for_remote_shell
from tests.campaign import Campaign
from tests.conftest import REPOSITORY, Run, TinyData, run, starts_processes
from tests.hosts import DSLLAMA, Hosts, why_not

pytestmark = starts_processes


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(tmp_path / "hosts", ["alpha", "beta"]) as found:
        yield found


def test_two_hosts_train_as_one(hosts: Hosts, tiny_data: TinyData, tmp_path: Path, campaign: Campaign) -> None:
    """And what was typed arrives as it was typed: through the hostfile, pdsh and the other hosts' shells."""
    prompts = ["the $HOME of 100%h; `dogs`", 'it\'s "so" (*) \\ &']
    settings = {**tiny_data.settings, "zero_stage": 1, "sample_prompts": prompts, "sample_tokens": 2}
    trained = Run(tmp_path / "run", settings)
    done = hosts.run("alpha", DSLLAMA, "launch", "--hostfile", hosts.hostfile(), *trained.words())
    assert done.returncode == 0, done.stdout
    assert "2 of 2" not in done.stdout  # a doctor that finds nothing says nothing
    expected = campaign.losses("fp32_stage1", 2)
    assert trained.losses() == pytest.approx(expected, rel=1e-4)
    (kept,) = (trained.folder / "checkpoints" / "starts").glob("*/config.yaml")
    assert yaml.safe_load(kept.read_text())["sample_prompts"] == prompts


@pytest.mark.long
def test_three_hosts_train_as_one(tiny_data: TinyData, tmp_path: Path, campaign: Campaign) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(tmp_path / "hosts", ["alpha", "beta", "gamma"]) as hosts:
        for stage in (1, 3):
            # 8 sequences an update do not divide among 3 ranks.
            shape = {"batch_size": 1, "tokens_per_update": 9 * 32}
            alone = Run(tmp_path / f"alone_{stage}", {**tiny_data.settings, **shape, "zero_stage": stage})
            words = ["--processes", "1", *alone.words()]
            assert run(DSLLAMA, "launch", *words).returncode == 0
            together = Run(tmp_path / f"together_{stage}", alone.settings)
            done = hosts.run("beta", DSLLAMA, "launch", "--hostfile", hosts.hostfile(), *together.words())
            assert done.returncode == 0, done.stdout
            assert together.losses() == pytest.approx(alone.losses(), rel=1e-4)


@pytest.mark.long
def test_a_filter_that_leaves_another_host_trains_there(hosts: Hosts, tiny_data: TinyData, tmp_path: Path) -> None:
    trained = Run(tmp_path / "run", tiny_data.settings)
    words = ["--hostfile", hosts.hostfile(), "--include", "beta", *trained.words()]
    done = hosts.run("alpha", DSLLAMA, "launch", *words)
    assert done.returncode == 0 and "--force_multi" in done.stdout, done.stdout
    assert "beta: " in done.stdout and "alpha: " not in done.stdout


@pytest.mark.long
def test_a_host_that_is_ill_keeps_the_run_from_starting(hosts: Hosts, tiny_data: TinyData, tmp_path: Path) -> None:
    hosts.crash("beta")
    trained = Run(tmp_path / "run", tiny_data.settings)
    done = hosts.run("alpha", DSLLAMA, "launch", "--hostfile", hosts.hostfile(), *trained.words())
    assert done.returncode == 2
    assert "1. beta: has no ssh server on that port" in done.stdout and "nothing was started" in done.stdout
    assert not trained.folder.exists() or not list(trained.folder.glob("*.csv"))


def launched(*words: Any) -> subprocess.CompletedProcess[str]:
    return run(DSLLAMA, "launch", *words)


def test_this_machine_alone_takes_no_hostfile_that_nobody_has_named(tiny_data: TinyData, tmp_path: Path) -> None:
    words = Run(tmp_path / "run", {**tiny_data.settings, "sample_prompts": ["-a dash", "two words"]}).words()
    done = launched("--processes", 2, "--master_port", 1234, "--dry_run", *words)
    printed = shlex.split(done.stdout.removeprefix("starting"))
    assert printed[1:9] == ["-q", "--hostfile", "none", "--num_gpus", "2", "--master_port", "1234", "--module"]
    at = printed.index("--sample_prompts")
    assert printed[at : at + 3] == ["--sample_prompts", "-a dash", "two words"]


def test_mistakes_are_told_together_and_before_anybody_is_asked(tmp_path: Path, tiny_data: TinyData) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("nowhere.invalid slots=3\nalso.invalid slots=x\n")
    done = launched("--hostfile", hostfile, "--max_lr", "fast")
    assert done.returncode == 2
    assert "hosts:2" in done.stderr and "--max_lr = 'fast'" in done.stderr
    hostfile.write_text("nowhere.invalid slots=3\n")
    done = launched("--hostfile", hostfile, *Run(tmp_path / "run", tiny_data.settings).words())
    assert done.returncode == 2 and "tokens_per_update" in done.stderr  # 256 do not divide among 3
    hostfile.write_text("".join(f"n{number} slots=1\n" for number in range(1025)))
    shape = {**tiny_data.settings, "batch_size": 1, "tokens_per_update": 1025 * 32, "training_tokens": "1G"}
    done = launched("--hostfile", hostfile, *Run(tmp_path / "run", shape).words())
    assert done.returncode == 2 and "names 1025 hosts; pdsh starts 1024 at once" in done.stderr, done.stderr
    assert launched("--include", "a", "--config", REPOSITORY / "configs" / "quickstart.yaml").returncode == 2


@pytest.mark.parametrize(
    "word",
    ["plain", "a b", "$HOME", "50%", "%h", "it's", 'say "so"', "a;b", "*", "back\\slash", "`x` y", "é ü", "--x=[1, 2]"],
)
def test_words_survive_pdsh_and_a_shell(word: str) -> None:
    """As DeepSpeed and pdsh treat them; through the real ones in the test of two hosts."""
    sent = for_remote_shell(word)
    if " " in sent:  # DeepSpeed's PDSHRunner.parse_user_args
        sent = '"{}"'.format(sent.replace('"', '\\"'))
    sent = sent.replace("%%", "%")  # pdsh
    told = subprocess.run(["sh", "-c", f"printf %s {sent}"], capture_output=True, text=True, check=True)
    assert told.stdout == word
