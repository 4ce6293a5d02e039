"""All ranks find each other before the process group is made: who is missing is named, and who cannot come says so.

torch's own rendezvous waits half an hour for a rank that will never come, and names nobody.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

JOIN_SECONDS = 600.0
_REPORT_SECONDS, _GOODBYE_SECONDS = 30.0, 15.0


class NobodyCame(Exception):
    """Somebody who is needed does not come; who, and why, in words."""


def meet(rank: int, size: int, offer: str = "") -> tuple[dist.Store, str]:
    """(the store that the process group is made of; what the first rank offers to all others) when all are there.

    offer: the first rank's. Raises NobodyCame, and dist.DistNetworkError where the first rank's port is taken.
    """
    store = _store(rank, size, JOIN_SECONDS)
    if rank == 0:
        store.set("offer", offer)
    store.set(f"here/{rank}", socket.gethostname())
    if store.add("arrived", 1) == size:
        store.set("go", "")
    began, reported = time.monotonic(), 0
    try:
        while not store.check(["go"]):
            waited = time.monotonic() - began
            if store.check(["left"]):
                store.add("seen", 1)
                raise NobodyCame(store.get("left").decode())
            if rank == 0 and waited > _REPORT_SECONDS * (reported + 1):
                reported += 1
                missing = [str(other) for other in range(size) if not store.check([f"here/{other}"])]
                told = f"{size - len(missing)} of {size} ranks have come; missing: {', '.join(missing[:20])}"
                print(f"waiting      for {waited:.0f} s: {told}", flush=True)
                if waited > JOIN_SECONDS:
                    raise NobodyCame(told)
            time.sleep(max(0.05, size / 2000))
        return store, store.get("offer").decode()
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise NobodyCame(f"rank 0 has gone before all ranks had come ({str(error).splitlines()[0]})") from None


def leave(rank: int, size: int, text: str) -> bool:
    """Tell the others that this rank does not come; whether the first one has said the same already.

    They find out at `meet`, within seconds of getting there.
    """
    others = size - int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", size)))
    if not others:  # a launcher ends the ranks of its own host
        return False
    told = f"rank {rank} on {socket.gethostname()} could not start: {text}"
    with contextlib.suppress(dist.DistNetworkError, dist.DistStoreError, RuntimeError):
        store = _store(rank, size, _GOODBYE_SECONDS)
        if rank:
            said = store.check(["text"]) and store.get("text").decode() == text
            if not said:
                store.set("left", told)
            store.add("seen", 1)
            return said
        store.set("text", text)
        store.set("left", told)
        end = time.monotonic() + _GOODBYE_SECONDS
        while store.add("seen", 0) < others and time.monotonic() < end:
            time.sleep(0.1)
    return False


def _store(rank: int, size: int, seconds: float) -> dist.Store:
    """On the first rank's host: its own, or that of torchrun's agent."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        address, port, size, is_master=rank == 0 and not agent, timeout=timedelta(seconds=seconds),
        wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    return dist.PrefixStore(f"dsllama/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
