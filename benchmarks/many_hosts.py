"""What a large cluster would cost us: `python -m benchmarks.many_hosts` writes benchmarks/results/many_hosts.json.

    liveness    a hub here, all other ranks simulated by one process that speaks their protocol over real connections:
                the hub's share of a core, what it takes from a main thread that computes, seconds until a death is
                known, size and seconds of status.json
    meeting     ranks in threads of eight processes that meet in a real store before the process group is made
    preflight   a real `dsllama doctor --hostfile`, quick part, whose ssh is a script that answers after a second
    manifest    a checkpoint as so many ranks write it: files made for real, the manifest written, looked at, verified

Eight ranks a host. All of it on one machine, whose cores the simulated hosts share: of the seconds that many hosts
would take at the same time they are an upper bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import save

RANKS_A_HOST = 8
HOSTS = (1, 8, 64, 256, 1000)


# ---------------------------------------------------------------- liveness


def in_the_ranks(offer: str, size: int, interval: float) -> None:
    """All ranks but the first: tell where they are, in turn, until the standard input is closed; "kill" kills one."""
    place = json.loads(offer)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    selector, ranks = selectors.DefaultSelector(), []
    for rank in range(1, size):
        connection = socket.create_connection(("127.0.0.1", place["port"]), 60)
        hello = {"secret": place["secret"], "rank": rank, "host": f"host{rank // RANKS_A_HOST}", "pid": rank}
        connection.sendall(json.dumps({**hello, "at": [0, 0, "start-up", 0, 0.0, 0.0]}).encode() + b"\n")
        selector.register(connection, selectors.EVENT_READ, connection)
        ranks.append(connection)
    selector.register(sys.stdin, selectors.EVENT_READ, "orders")
    print("there", flush=True)
    began, beats, changes = time.monotonic(), 0, 0
    while True:
        due = int((time.monotonic() - began) / interval * len(ranks)) if ranks else 0
        while beats < due:
            changes += 1
            told = [1 + changes // len(ranks), 1, "forward", changes, changes * 1e-3, 0.0]
            ranks[beats % len(ranks)].send(json.dumps({"at": told}).encode() + b"\n")
            beats += 1
        for key, _ in selector.select(0.01):
            if key.data == "orders":
                if not sys.stdin.readline():
                    return
                ranks[-1].close()  # a death
                print(time.time(), flush=True)
                ranks.pop()
            else:
                key.data.recv(1 << 16)


def liveness(hosts: int, seconds: float) -> dict[str, float]:
    """The hub's cost, with so many hosts."""
    from dsllama.cluster.liveness import STATUS, Hub, Progress

    size = hosts * RANKS_A_HOST
    with tempfile.TemporaryDirectory() as place:
        progress, died = Progress(), threading.Event()
        hub = Hub(size, progress, 60.0, None)
        hub.keep(Path(place))
        seen: list[float] = []

        def on_end(text: str, code: int) -> None:
            seen.append(time.time())
            died.set()
            hub._left.set()

        hub.on_end = on_end  # type: ignore[assignment]
        progress.update = 1
        progress.at("forward", 1)
        interval = max(1.0, size / 1000)  # as a rank has it
        words = [sys.executable, "-m", "benchmarks.many_hosts", "--ranks", hub.offer, str(size), str(interval)]
        began = time.monotonic()
        others = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert others.stdin is not None and others.stdout is not None
        others.stdout.readline()
        while len(hub.peers) < size:
            time.sleep(0.01)
        joined = time.monotonic() - began
        time.sleep(2 * interval)
        cpu, began = time.process_time(), time.monotonic()
        time.sleep(seconds)
        share = (time.process_time() - cpu) / (time.monotonic() - began)
        beside = computing(seconds)
        began_write = time.perf_counter()
        hub.write()
        written = time.perf_counter() - began_write
        bytes_ = (Path(place) / STATUS).stat().st_size
        others.stdin.write("kill\n")
        others.stdin.flush()
        killed = float(others.stdout.readline())
        died.wait(60)
        others.kill()
        others.wait()
    alone = computing(seconds)
    return {
        "ranks": size, "all there": joined, "share of a core": share, "slows a main thread by": alone / beside - 1,
        "death told after": seen[0] - killed, "status bytes": bytes_, "status seconds": written,
    }  # fmt: skip


def computing(seconds: float) -> float:
    """Turns of a loop of Python that the main thread makes in a second: it competes for the interpreter's lock."""
    turns, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(100))
        turns += 1
    return turns / seconds


# ---------------------------------------------------------------- meeting


def in_threads(first: int, last: int, size: int) -> None:
    """Ranks first ... last - 1 meet all others, as soon as they are told to."""
    from dsllama.cluster import join

    kept: list[Any] = []  # a store goes with its owner
    rank_threads = [
        threading.Thread(target=lambda rank=rank: kept.append(join.meet(rank, size))) for rank in range(first, last)
    ]
    print("there", flush=True)
    sys.stdin.readline()
    for thread in rank_threads:
        thread.start()
    for thread in rank_threads:
        thread.join()
    print("met", flush=True)
    sys.stdin.readline()
    os._exit(0)


def meeting(hosts: int) -> dict[str, float]:
    """Seconds from when all ranks call until the last of them has met all others."""
    from dsllama.cluster import join
    from dsllama.training.engine import free_port

    size = hosts * RANKS_A_HOST
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    share = -(-(size - 1) // 8)
    others = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.many_hosts", "--meet", str(first), str(min(first + share, size)),
             str(size)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for first in range(1, size, share)
    ]  # fmt: skip

    def all_say() -> None:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()

    def tell_all() -> None:
        for other in others:
            assert other.stdin is not None
            other.stdin.write("\n")
            other.stdin.flush()

    all_say()
    began = time.monotonic()
    tell_all()
    kept = join.meet(0, size, "{}")
    all_say()
    seconds = time.monotonic() - began
    tell_all()
    for other in others:
        other.wait()
    del kept
    return {"ranks": size, "seconds": seconds}


# ---------------------------------------------------------------- preflight


def preflight(hosts: int) -> dict[str, float]:
    """Seconds of the doctor's quick part, beyond the second that each host takes to answer."""
    from dsllama.cluster import doctor
    from dsllama.cluster.launch import Place
    from dsllama.cluster.probe import MARK

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        facts = {
            "hostname": "host", "python": "3.11", "cores": 64, "memlock": -1, "shm": 2**34, "versions": {"torch": "2"},
            "code": "x", "memory": 2**36, "cuda": "12", "gpus": ["H100"] * 8, "nccl": "2", "unusable_gpu": None,
        }  # fmt: skip
        (folder / "answer").write_text(f"{MARK}{json.dumps(facts)}\n")
        ssh = folder / "ssh"
        ssh.write_text(f"#!/bin/sh\nprintf '{MARK}{{\"clock\": %s}}\\n' $(date +%s)\nsleep 1\ncat {folder}/answer\n")
        ssh.chmod(0o755)
        before = os.environ["PATH"]
        os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
        names = {f"host{number}": list(range(RANKS_A_HOST)) for number in range(hosts)}
        try:
            found = doctor.examine(Place(), names, [], None, quick=True)
        finally:
            os.environ["PATH"] = before
    failed = sum(bool(patient.failure) for patient in found.patients)
    return {"hosts": hosts, "seconds": found.seconds, "not asked in time": failed}


# ---------------------------------------------------------------- manifest


def manifest(hosts: int) -> dict[str, float]:
    """Of a checkpoint of a model of 300 tensors under ZeRO-1: size, seconds to write, to look at, and to list."""
    import torch

    from dsllama.checkpoint import catalog
    from dsllama.checkpoint.fragments import KINDS, MOMENTS, Fragment, Writer, file_names

    size, tensors = hosts * RANKS_A_HOST, 300
    numel = -(-size // tensors) * 4  # of a tensor: a few elements a rank
    share = -(-numel * tensors // size)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "update_0000001"
        folder.mkdir()
        entries: dict[str, Any] = {}
        for rank in range(size):
            at, end, pieces = rank * share, min((rank + 1) * share, numel * tensors), []
            while at < end:
                number, start = divmod(at, numel)
                count = min(numel - start, end - at)
                pieces.append((f"layers.{number // 10}.attention.{number % 10}.weight", start, count))
                at += count
            for name, kinds in zip(file_names(rank), (KINDS[:1], MOMENTS), strict=True):
                parts = [Fragment(n, kind, (numel,), start, count) for n, start, count in pieces for kind in kinds]
                with Writer(folder / name, parts) as writer:
                    for part in parts:
                        writer.add(torch.zeros(part.numel))
                    entries[name] = writer.finish()
        for name in ("config.yaml", "deepspeed.json", "tokenizer.json"):
            (folder / name).write_text("{}")
        told = {
            "format": catalog.FORMAT, "update": 1, "tokens": 1, "data": {}, "vocab_size": 1, "schedule": {},
            "parallel_layout": {"ranks": size, "zero_stage": 1, "precision": "bf16"}, "files": entries,
            "state": "portable",
        }  # fmt: skip

        def write() -> None:
            told["digest"] = catalog.digest(told)
            (folder / catalog.MANIFEST).write_text(json.dumps(told))

        written = timed(write)
        looked = timed(lambda: catalog.look_at(folder))
        verified = timed(lambda: list(catalog.look_at(folder).damages()))  # type: ignore[union-attr]
        bytes_ = (folder / catalog.MANIFEST).stat().st_size
    return {"ranks": size, "files": len(entries), "bytes": bytes_, "write": written, "look": looked, "verify": verified}


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """All parts for each number of hosts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="*", default=HOSTS)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--ranks", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--meet", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks:
        in_the_ranks(arguments.ranks[0], int(arguments.ranks[1]), float(arguments.ranks[2]))
        return
    if arguments.meet:
        in_threads(*arguments.meet)
        return
    parts: dict[str, Callable[[int], dict[str, float]]] = {
        "liveness": lambda hosts: liveness(hosts, arguments.seconds), "meeting": meeting, "preflight": preflight,
        "manifest": manifest,
    }  # fmt: skip
    results: dict[str, Any] = {name: [] for name in parts}
    for name, part in parts.items():
        for hosts in arguments.hosts:
            results[name].append({"hosts": hosts, **part(hosts)})
            print(name, json.dumps(results[name][-1]), flush=True)
    save("many_hosts", results)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
