"""What one host says of itself to `dsllama doctor`: python -m dsllama.cluster.probe facts|pairs ASKED, both JSON.

Runs by the interpreter that would train there. Every line that is meant for the doctor begins with `MARK`; what a
login shell or a library says besides is passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

MARK = "dsllama-probe: "
Json = dict[str, Any]
_MATRIX, _PRODUCTS, _REDUCED, _REDUCTIONS = 1024, 6, 2**21, 6  # of a pair's test: under a second each on two cores


def say(**told: Any) -> None:
    """One line for the doctor."""
    print(MARK + json.dumps(told), flush=True)


def facts(asked: Json) -> Json:
    """Of this host. asked: words (the training's own), files (names that hosts leave in ckpt_dir), mine (this host's),
    port (to be free here, or null)."""
    found: Json = {
        "hostname": socket.gethostname(),
        "python": f"{platform.python_version()} {sys.executable}",
        "cores": len(os.sched_getaffinity(0)),
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    }
    found["shm"] = _free("/dev/shm")
    if asked["port"] is not None:
        found["port"] = _attempt(lambda: _bind(asked["port"]))
        found["other_port"] = _bind(0)
    from dsllama.files import digest
    from dsllama.machine import available_memory, unusable_gpu, versions

    found["versions"] = versions()
    found["code"] = digest({str(p.name): p.read_text("utf-8") for p in sorted(_package().rglob("*.py"))})[-12:]
    found["memory"] = available_memory()
    if asked["words"]:
        found |= _of_configuration(asked)
    import torch

    found["cuda"] = torch.version.cuda
    found["gpus"] = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if found["gpus"] else None
    found["unusable_gpu"] = str(problem) if (problem := unusable_gpu()) else None
    return found


def _of_configuration(asked: Json) -> Json:
    from dsllama import arguments
    from dsllama.data.stream import TokenStream
    from dsllama.files import digest, sha256
    from dsllama.machine import missing_compiler
    from dsllama.overlay import read_overlay

    parser = arguments.Parser(prog="probe")
    arguments.add_config_options(parser)
    found: Json = {}
    try:
        config = arguments.config_from(parser.parse_args(asked["words"]))
    except Exception as error:
        return {"config_error": str(error)}
    found["config"] = digest(config.to_dict())[-12:]
    found["data"] = _attempt(lambda: TokenStream(config.dataset_dir).fingerprint)
    found["tokenizer"] = _attempt(lambda: sha256(Path(config.tokenizer_path))[:12])
    folder = Path(config.ckpt_dir)
    found["disk"] = _free(folder)

    def leave_a_file() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / asked["mine"]).write_text(socket.gethostname(), encoding="utf-8")
        return "written"

    found["ckpt_dir"] = _attempt(leave_a_file)
    compiles = "offload_optimizer" in str(_attempt(lambda: read_overlay(config))) or config.enable_compilation
    found["compiler"] = missing_compiler() if compiles else ""
    return found


def _attempt(ask: Callable[[], Any]) -> Json:
    """What it comes to, or why it cannot."""
    try:
        return {"is": ask()}
    except Exception as error:
        return {"error": " ".join(str(getattr(error, "strerror", None) or error).split())[:300]}


def _bind(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
        return int(probe.getsockname()[1])


def _free(place: str | Path) -> float | None:
    path = Path(place).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    with contextlib.suppress(OSError):
        return float(shutil.disk_usage(path).free)
    return None


def _package() -> Path:
    import dsllama

    return Path(next(iter(dsllama.__path__)))


def pairs(asked: Json) -> Json:
    """Which of the files in ckpt_dir are seen here; and an all-reduce and a matrix product with another host, a round
    each. asked: number and hosts, store [address, port], rounds (lists of pairs), files, ckpt_dir, timeout."""
    found: Json = {}
    if asked["ckpt_dir"]:
        folder = Path(asked["ckpt_dir"])
        with contextlib.suppress(OSError):
            os.listdir(folder)  # NFS looks anew
        found["seen"] = [name for name in asked["files"] if (folder / name).exists()]
    import torch
    import torch.distributed as dist

    from dsllama.training.engine import accelerator

    on_gpu = accelerator() == "cuda"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    found["matrix"] = _seconds_of_products(device)
    say(**found)
    number, timeout = asked["number"], timedelta(seconds=asked["timeout"])
    address, port = asked["store"]
    try:
        store = dist.TCPStore(address, port, asked["hosts"], number == 0, timeout, wait_for_workers=True)
    except Exception as error:
        return {"store_error": " ".join(str(error).split())[:300]}
    rounds: list[Any] = []
    for at, places in enumerate(asked["rounds"]):
        mine = next((pair for pair in places if number in pair), None)
        if mine is None:
            rounds.append(None)
            continue
        own = dist.PrefixStore(f"{at}/{mine[0]}", store)
        took = partial(_seconds_of_reductions, own, mine.index(number), device, timeout)
        rounds.append({"with": next(n for n in mine if n != number), **_attempt(took)})
        say(rounds=rounds)
    # The store goes with its owner: nobody leaves before all are through.
    with contextlib.suppress(Exception):
        store.set(f"done/{number}", "")
        store.wait([f"done/{n}" for n in range(asked["hosts"])], timeout)
    return {"rounds": rounds}


def _seconds_of_products(device: Any) -> float:
    import torch

    # Of a CPU, the time that it works on this: whoever works beside it would show as well.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    matrix = torch.randn(_MATRIX, _MATRIX, device=device)
    times = []
    for _ in range(_PRODUCTS):
        began = clock()
        float((matrix @ matrix)[0, 0])
        times.append(clock() - began)
    return min(times)


def _seconds_of_reductions(store: Any, place: int, device: Any, timeout: timedelta) -> float:
    import torch
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=place, world_size=2, timeout=timeout)
    try:
        values, times = torch.full((_REDUCED,), float(place + 1), device=device), []
        for _ in range(_REDUCTIONS):
            began = time.perf_counter()
            summed = values.clone()
            dist.all_reduce(summed)
            right = bool((summed == 3.0).all())
            times.append(time.perf_counter() - began)
            if not right:
                raise ValueError("the sum over both hosts is wrong")
        return min(times)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    signal.alarm(90)  # the doctor, who may have gone, does not wait so long
    say(clock=time.time())
    say(**{"facts": facts, "pairs": pairs}[sys.argv[1]](json.loads(sys.argv[2])))
    sys.stdout.flush()
    os._exit(0)
