"""`dsllama doctor`: all hosts at once, in half a minute whatever hangs: what would keep them from training together.

    facts    each host by itself: ssh, versions, code, configuration, data, GPUs, memory, disk, ports, its clock
    pairs    the file that each host has left in ckpt_dir, seen by each; an all-reduce with another host, twice, the
             second time with another partner: so that it is known which of two is slow or cut off

What should be the same everywhere is held against what most hosts have (of as many, the first one's).
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dsllama import console
from dsllama.cluster.hostfile import Hosts
from dsllama.cluster.launch import Place, is_here
from dsllama.cluster.probe import MARK
from dsllama.config import TrainingConfig
from dsllama.errors import Problem
from dsllama.sizes import readable_bytes

LIMIT_SECONDS = 30.0
_FACTS_SECONDS, _CONNECT_SECONDS, _CLOCKS_APART = 16.0, 8, 1.0
_FEWEST_SHM = 2**30
_SLOW = {"a matrix product": 2.0, "an all-reduce": 3.0}  # times what is usual
COLUMNS = ("host", "ssh", "versions", "config", "data", "ckpt_dir", "GPUs", "cores", "memory", "clock", "with others")
# What ssh or the remote shell says, what that means, what to do.
_FAILURES = [
    ("could not resolve hostname", "does not resolve", "write its address into /etc/hosts or ~/.ssh/config"),
    ("host key verification failed", "has another host key than ~/.ssh/known_hosts, or none there",
     "if it was set up anew: ssh-keygen -R {host}; then ssh {host} once by hand"),
    ("permission denied", "does not let you in without a password", "ssh-copy-id {host}"),
    ("connection refused", "has no ssh server on that port", "start sshd there, or give --ssh_port"),
    ("no route to host", "cannot be reached", "is it up, and in this network?"),
    ("network is unreachable", "cannot be reached", "is it up, and in this network?"),
    ("timed out", "does not answer", "is it up? does a firewall drop port 22?"),
    ("no module named", "lacks dsllama, or what it needs, in this Python", "install it in {python} there"),
    ("can't cd to", "has no folder {cwd}", "make the same folder reachable there, or start from one that is"),
    ("no such file or directory", "has no {python} or no folder {cwd}", "install the same environment there"),
    ("not found", "has no {python}", "install the same environment under the same path there"),
]  # fmt: skip


@dataclass
class Patient:
    """One host. facts: what it has said; offset: its clock beyond ours, in seconds; failure: why it says nothing."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    offset: float | None = None
    failure: str = ""
    remedy: str = ""


@dataclass
class Diagnosis:
    """What was found. problems: those that keep a run from starting; rows: the table, without its head."""

    patients: list[Patient]
    problems: list[Problem]
    rows: list[list[str]]
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        found = [f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1)]
        head = f"{len(found)} problems" if len(found) != 1 else "1 problem"
        verdict = [head, *found] if found else [f"{len(self.patients)} of {len(self.patients)} hosts are well"]
        return [*console.table([list(COLUMNS), *self.rows]), "", *verdict, f"({self.seconds:.0f} s)"]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        hosts = [{"host": p.name, "failure": p.failure, "offset": p.offset, **p.facts} for p in self.patients]
        problems = [{"where": p.where, "rule": p.rule, "remedy": p.remedy} for p in self.problems]
        return {"seconds": self.seconds, "problems": problems, "hosts": hosts}


def examine(
    place: Place, hosts: Hosts | None, words: Sequence[str], config: TrainingConfig | None, quick: bool = False
) -> Diagnosis:
    """Look at all hosts (None: at this machine). words: the training's; none where only hosts are looked at. quick:
    without the pairs."""
    began = time.monotonic()
    names = list(hosts) if hosts is not None else ["localhost"]
    nonce = uuid.uuid4().hex[:8]
    files = [f".doctor-{nonce}-{number}" for number in range(len(names))]
    port = place.master_port or 29500
    ask = Asking(place, began + LIMIT_SECONDS)
    patients = [Patient(name) for name in names]
    asked: list[dict[str, Any]] = [
        {"words": list(words), "files": files, "mine": files[number], "port": port if number == 0 else None}
        for number in range(len(names))
    ]
    try:
        ask.all("facts", patients, asked, _FACTS_SECONDS)
        problems = _problems(patients, config, hosts, port)
        well = [p for p in patients if not p.failure and "config_error" not in p.facts]
        if len(well) > 1 and not quick:
            ckpt_dir = str(config.ckpt_dir) if config is not None else ""
            if "error" in patients[0].facts.get("port", {}):  # which has been said
                port = patients[0].facts["other_port"]
            problems += _together(ask, place, well, [files[patients.index(p)] for p in well], ckpt_dir, port)
    finally:
        if config is not None:
            _sweep(Path(config.ckpt_dir), files)
            others = [p for p in patients if not p.failure]
            ask.remove(others, str(config.ckpt_dir), nonce)
    rows = [_row(patient, patients, problems) for patient in patients]
    return Diagnosis(patients, problems, rows, time.monotonic() - began)


class Asking:
    """Asks hosts, each in a thread, until a moment that is the same for all."""

    def __init__(self, place: Place, deadline: float) -> None:
        self.place, self.deadline = place, deadline

    def all(self, what: str, patients: Sequence[Patient], asked: Sequence[dict[str, Any]], seconds: float) -> None:
        deadline = min(self.deadline, time.monotonic() + seconds)
        with ThreadPoolExecutor(max(1, len(patients))) as pool:
            list(pool.map(partial(self._one, what, deadline), patients, asked))

    def _one(self, what: str, deadline: float, patient: Patient, asked: dict[str, Any]) -> None:
        command = self.command(patient.name, [sys.executable, "-m", "dsllama.cluster.probe", what, json.dumps(asked)])
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        complaints: list[str] = []
        reader = threading.Thread(target=lambda: complaints.extend(process.stderr or ()), daemon=True)
        reader.start()
        hung = threading.Event()

        def give_up() -> None:
            hung.set()
            process.kill()

        timer = threading.Timer(max(0.1, deadline - time.monotonic()), give_up)
        timer.start()
        last: dict[str, Any] = {}
        assert process.stdout is not None
        for line in process.stdout:
            now = time.time()
            if line.startswith(MARK):
                last = json.loads(line.removeprefix(MARK))
                if "clock" in last:
                    patient.offset = last["clock"] - now if what == "facts" else patient.offset
                else:
                    patient.facts |= last
        code = process.wait()
        timer.cancel()
        reader.join(1)
        if code != 0 and what == "facts":
            patient.failure, patient.remedy = self._explained(patient.name, "".join(complaints), hung.is_set())
        elif code != 0:
            patient.facts.setdefault(
                "rounds_error", "did not answer in time" if hung.is_set() else "".join(complaints)[-300:]
            )

    def command(self, name: str, words: Sequence[str]) -> list[str]:
        """What runs these words on a host."""
        if name == "localhost":
            return list(words)
        # As DeepSpeed starts the ranks there: in this folder, which is on Python's path, by this interpreter.
        remote = f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={shlex.quote(os.getcwd())} {shlex.join(words)}"
        port = ["-p", str(self.place.ssh_port)] if self.place.ssh_port else []
        alive = ["-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=2"]
        return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}", *alive, *port, name, remote]

    def _explained(self, name: str, said: str, hung: bool) -> tuple[str, str]:
        lowered = said.lower()
        places = {"host": name, "python": sys.executable, "cwd": os.getcwd()}
        for words, rule, remedy in _FAILURES:
            if words in lowered:
                return rule.format(**places), remedy.format(**places)
        if hung:
            return "does not answer in time", "is it frozen, or its file system? ssh to it by hand"
        last = " ".join(said.split())[-300:] or "no word"
        return f"cannot be asked: {last}", "ssh to it by hand, and run dsllama doctor there"

    def remove(self, patients: Sequence[Patient], folder: str, nonce: str) -> None:
        """Of what hosts have left in folders that are not this machine's."""
        words = ["sh", "-c", f"rm -f {shlex.quote(folder)}/.doctor-{nonce}-*"]
        for patient in patients:
            if patient.name != "localhost":
                subprocess.Popen(
                    self.command(patient.name, words), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip


def _sweep(folder: Path, files: Sequence[str]) -> None:
    for name in files:
        (folder / name).unlink(missing_ok=True)


# ---------------------------------------------------------------- findings


def _problems(
    patients: Sequence[Patient], config: TrainingConfig | None, hosts: Hosts | None, port: int
) -> list[Problem]:
    """Of the facts."""
    found = [Problem(p.name, p.failure, p.remedy) for p in patients if p.failure]
    well = [p for p in patients if not p.failure]
    same = {
        "hostname": (None, ""),
        "versions": ("has other versions", "install the same ones everywhere"),
        "code": ("has another dsllama, of the same version number", "bring the same files to all hosts"),
        "cuda": ("has a PyTorch for another CUDA", "install the same one everywhere"),
        "nccl": ("has another NCCL", "install the same PyTorch everywhere"),
        "config": ("reads another configuration", "is {config} the same file there?"),
        "data": ("has other data", "bring the same shards to all hosts, or share the folder"),
        "tokenizer": ("has another tokenizer", "bring the same file to all hosts"),
        "cores": ("has another number of cores", "the slowest host sets the pace: is this meant?"),
    }
    for name, (rule, remedy) in same.items():
        if rule is None:
            continue
        usual = _usual([p.facts.get(name) for p in well])
        for patient in well:
            if name in patient.facts and patient.facts[name] != usual:
                differs = _difference(patient.facts[name], usual)
                file = (config and config.dataset_dir) or ""
                found.append(Problem(patient.name, f"{rule}: {differs}", remedy.format(config=file and "--config")))
    for patient in well:
        facts = patient.facts
        if "config_error" in facts:
            found.append(Problem(patient.name, f"cannot read the configuration: {facts['config_error'][:400]}"))
        for name, remedy in {
            "data": "is dataset_dir reachable under this path there?",
            "tokenizer": "is tokenizer_path reachable under this path there?",
            "ckpt_dir": "ckpt_dir must be writable under this path on each host",
            "port": "give --master_port another one, or end what holds it",
        }.items():
            if error := (facts.get(name) or {}).get("error"):
                what = f"the port {port}" if name == "port" else name
                found.append(Problem(patient.name, f"{what} cannot be used ({error})", remedy))
        if facts.get("unusable_gpu"):
            found.append(Problem(patient.name, f"has a GPU that cannot be used: {facts['unusable_gpu']}"))
        if facts.get("compiler"):
            rule = f"lacks {facts['compiler']}, with which this configuration compiles"
            found.append(Problem(patient.name, rule, "install it there"))
        wanted = len(hosts[patient.name]) if hosts is not None else 0
        if facts.get("gpus") and wanted > len(facts["gpus"]):
            rule = f"has {len(facts['gpus'])} GPUs, and the hostfile says slots={wanted}"
            found.append(Problem(patient.name, rule, "correct the hostfile, or use --include"))
        if facts.get("gpus") and (facts.get("shm") or _FEWEST_SHM) < _FEWEST_SHM:
            rule = f"has {readable_bytes(facts['shm'])} free in /dev/shm, which NCCL uses"
            found.append(Problem(patient.name, rule, "mount it with 1 GiB or more (docker: --shm-size)"))
    if len({p.facts.get("gpus") != [] for p in well}) > 1:
        lacking = [p.name for p in well if not p.facts.get("gpus")]
        found.append(Problem(", ".join(lacking), "has no GPU that PyTorch can use, and others have", "see nvidia-smi"))
    offsets = [p.offset for p in well if p.offset is not None]
    middle = statistics.median_low(offsets) if offsets else 0.0
    for patient in well:
        if patient.offset is not None and abs(patient.offset - middle) > _CLOCKS_APART:
            rule = (
                f"its clock is {abs(patient.offset - middle):.1f} s {'ahead' if patient.offset > middle else 'behind'}"
            )
            found.append(Problem(patient.name, rule, "set it (chronyc makestep, timedatectl set-ntp true)"))
    return found


def _usual(values: Sequence[Any]) -> Any:
    counted = Counter(json.dumps(value, sort_keys=True) for value in values if value is not None)
    return json.loads(counted.most_common(1)[0][0]) if counted else None


def _difference(found: Any, usual: Any) -> str:
    if isinstance(found, dict) and isinstance(usual, dict):
        names = [name for name in found.keys() | usual.keys() if found.get(name) != usual.get(name)]
        return ", ".join(f"{name} {found.get(name)} (elsewhere {usual.get(name)})" for name in sorted(names))
    return f"{found} (elsewhere {usual})"


def _together(
    ask: Asking, place: Place, well: Sequence[Patient], files: Sequence[str], ckpt_dir: str, port: int
) -> list[Problem]:
    """What shows only between hosts."""
    count = len(well)
    address = place.master_addr or _address_of(well[0].name, ask)
    left = max(4.0, ask.deadline - time.monotonic() - 4)
    asked = [
        {
            "number": number, "hosts": count, "store": [address, port], "rounds": _rounds(count), "files": files,
            "ckpt_dir": ckpt_dir, "timeout": left / 2,
        }
        for number in range(count)
    ]  # fmt: skip
    ask.all("pairs", well, asked, left + 3)
    found = []
    for patient in well:
        missing = [well[files.index(name)].name for name in files if name not in patient.facts.get("seen", files)]
        if ckpt_dir and missing and len(missing) >= count / 2:
            rule = f"its ckpt_dir {ckpt_dir} is another folder than that of {', '.join(missing[:5])}"
            found.append(Problem(patient.name, rule, "mount one shared folder there on all hosts"))
        if error := patient.facts.get("store_error") or patient.facts.get("rounds_error"):
            rule = f"does not reach {well[0].name} at {address}, port {port} ({error})"
            found.append(Problem(patient.name, rule, "open the ports between the hosts, or give --master_addr"))
    found += _cut_off(well) + _slow(well)
    return found


def _rounds(count: int) -> list[list[list[int]]]:
    """Who with whom: hosts in a ring, each with one neighbour and then with the other."""
    ring = [[n, n + 1] for n in range(count - 1)] + ([[0, count - 1]] if count > 2 else [])
    odd = count % 2  # then the last pair of the ring has a round of its own
    rounds = [ring[0 : count - 1 : 2], ring[1 : len(ring) - odd : 2], ring[count - 1 :] if odd else []]
    return [pairs for pairs in rounds if pairs]


def _address_of(name: str, ask: Asking) -> str:
    """The address that DeepSpeed would take for the first host: the first that `hostname -I` names there."""
    try:
        left = max(1.0, ask.deadline - time.monotonic())
        said = subprocess.run(
            ask.command(name, ["hostname", "-I"]), capture_output=True, text=True, timeout=left, check=True
        )
        return said.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "127.0.0.1" if is_here(name) else name


def _cut_off(well: Sequence[Patient]) -> list[Problem]:
    failed: Counter[str] = Counter()
    worked: set[str] = set()
    why = ""
    for patient in well:
        for one in patient.facts.get("rounds") or []:
            if one and "error" in one:
                failed[patient.name] += 1
                why = one["error"]
            elif one:
                worked.add(patient.name)
    guilty = [name for name in failed if name not in worked]
    if not failed:
        return []
    named = guilty or list(failed)
    rule = f"an all-reduce with another host fails ({why})"
    remedy = "look at its network: interfaces (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), firewalls, cables"
    return [Problem(name, rule, remedy) for name in named]


def _slow(well: Sequence[Patient]) -> list[Problem]:
    """Hosts whose product, or whose every all-reduce, takes far longer than is usual."""
    found = []
    products = {p.name: p.facts["matrix"] for p in well if "matrix" in p.facts}
    reductions = {
        p.name: min(times)
        for p in well
        if (times := [one["is"] for one in p.facts.get("rounds") or [] if one and "is" in one])
    }
    for what, took in {"a matrix product": products, "an all-reduce": reductions}.items():
        if len(took) < 2:
            continue
        usual = statistics.median_low(list(took.values()))
        for name, seconds in took.items():
            if seconds > _SLOW[what] * usual and seconds - usual > 5e-3:
                rule = f"{what} takes {seconds * 1e3:.0f} ms, elsewhere {usual * 1e3:.0f} ms"
                found.append(Problem(name, rule, "is something else running there? look at clocks, heat, cables"))
    return found


def _row(patient: Patient, patients: Sequence[Patient], problems: Sequence[Problem]) -> list[str]:
    if patient.failure:
        return [patient.name, patient.failure[:60], *[""] * (len(COLUMNS) - 2)]
    facts = patient.facts
    well = [p for p in patients if not p.failure]

    def same(*names: str) -> str:
        if all(facts.get(name) is None for name in names):
            return "-"
        if any(isinstance(facts.get(name), dict) and "error" in facts[name] for name in names):
            return "NO"
        return "same" if all(facts.get(n) == _usual([p.facts.get(n) for p in well]) for n in names) else "OTHER"

    with_others = [one for one in facts.get("rounds") or [] if one]
    times = [f"{one['is'] * 1e3:.0f} ms" if "is" in one else "NO" for one in with_others]
    about = [p for p in problems if p.where == patient.name]
    shared = "NO" if "error" in (facts.get("ckpt_dir") or {}) or any("ckpt_dir" in p.rule for p in about) else "ok"
    return [
        patient.name,
        "ok",
        same("versions", "code", "cuda", "nccl"),
        "NO" if "config_error" in facts else same("config"),
        same("data", "tokenizer"),
        shared if "ckpt_dir" in facts else "-",
        str(len(facts.get("gpus") or [])),
        str(facts.get("cores", "")),
        readable_bytes(facts["memory"]) if "memory" in facts else "",
        f"{patient.offset:+.1f} s" if patient.offset is not None else "",
        ", ".join(times) or "-",
    ]
