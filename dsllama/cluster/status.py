"""`dsllama status CKPT_DIR`: a job that runs, or has ended, as its files tell it, from any shell or host.

The first rank writes starts/NNNN/status.json (liveness) and account.json every few seconds; the checkpoints lie beside.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from dsllama import console
from dsllama.checkpoint.catalog import list_checkpoints, summary
from dsllama.checkpoint.retention import LOCK
from dsllama.cluster.liveness import STATUS, doing
from dsllama.errors import Problem, UserError
from dsllama.locks import is_held
from dsllama.sizes import readable, readable_bytes, readable_duration
from dsllama.training import account

_ROWS = 40


def of(path: Path) -> dict[str, Any]:
    """What is known of a run, by its folder of checkpoints or the one that holds it: plain values.

    state: "runs", "silent" (the first rank has not been heard of for long), "ended" or "killed". Raises UserError.
    """
    ckpt_dir = path if (path / "starts").is_dir() or not (path / "checkpoints").is_dir() else path / "checkpoints"
    found = [start for start in (ckpt_dir / "starts").glob("*") if start.name.isdecimal() and (start / STATUS).exists()]
    if not found:
        rule = "holds no run that has said how it goes" if ckpt_dir.exists() else "does not exist"
        raise UserError(Problem("CKPT_DIR", rule, "name the ckpt_dir of a run", str(path)))
    folder = max(found, key=lambda start: int(start.name))
    try:
        told: dict[str, Any] = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        told.pop("offer")  # with it one may stop the run
        age = max(0.0, time.time() - told["written"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(Problem(str(folder / STATUS), f"cannot be read ({error})", "try again")) from None
    starts = account.read(ckpt_dir)
    ended = told["ended"] and (starts[-1].ended or told["ended"])
    if ended:
        state = "ended"
    elif age < max(30.0, 5 * told["every"]):
        state = "runs"
    else:
        state = "silent" if is_held(ckpt_dir / LOCK) else "killed"
    checkpoints = list_checkpoints(ckpt_dir)
    seconds = account.total(starts)
    return {
        **told, "ckpt_dir": str(ckpt_dir), "state": state, "ended": ended or "", "age": age, "start": int(folder.name),
        "starts": len(starts), "wall": sum(seconds.values()), "goodput": account.goodput(seconds),
        "checkpoint": summary(checkpoints[-1]) if checkpoints else None,
    }  # fmt: skip


def lines(told: dict[str, Any]) -> list[str]:
    """The same for people: the run, then its ranks, those that are behind first."""
    age = readable_duration(told["age"]) if told["age"] >= 1 else "0s"
    state = {
        "runs": f"runs (told {age} ago)",
        "silent": f"SILENT: nothing was told for {age}, and the run still holds its folder: frozen, or its host is",
        "killed": f"killed, {age} ago",
        "ended": f"ended {age} ago: {told['ended']}",
    }[told["state"]]
    shown = [f"state        {state}"]
    if told.get("updates"):
        update, updates = told["update"], told["updates"]
        shown.append(f"progress     {update:,} of {updates:,} updates ({update / updates:.1%}), "
                     f"{readable(told['tokens'])} tokens")  # fmt: skip
    if told.get("loss") is not None:
        eta = f", {readable_duration(told['eta'])} to go" if told["state"] == "runs" else ""
        shown.append(f"rate         {readable(told['tokens_per_second'])} tok/s, loss {told['loss']:.4f}{eta}")
    if told["checkpoint"]:
        last = told["checkpoint"]
        ago = f", {readable_duration(last['age_seconds'])} ago" if last.get("age_seconds") is not None else ""
        size = f" ({readable_bytes(last['bytes'])})" if "bytes" in last else ""
        shown.append(f"checkpoint   {last['path']}{size}{ago}" + "".join(f"; damaged: {p}" for p in last["problems"]))
    shown.append(
        f"account      start {told['start']} of {told['starts']}, {readable_duration(told['wall'])} in all, "
        f"goodput {told['goodput']:.1%}"
    )
    ranks = sorted(told["ranks"], key=lambda rank: (-rank[7], rank[3], -rank[6]))
    rows = [["rank", "host", "process", "heard", "for", "doing"]]
    for rank, host, process, update, micro_step, phase, moved, heard in ranks[:_ROWS]:
        row = [str(rank), host, str(process), f"{heard:.0f} s ago", f"{moved:.0f} s", doing(update, micro_step, phase)]
        rows.append(row)
    shown += ["", *console.table(rows)]
    if missing := told["size"] - len(ranks):
        shown.append(f"and {missing} of {told['size']} ranks that have not come yet")
    if len(ranks) > _ROWS:
        shown.append(f"and {len(ranks) - _ROWS} ranks that are farther (--json has all)")
    return shown


def watch(path: Path, seconds: float = 2.0) -> None:
    """Show it anew until the run has ended, or Ctrl-C."""
    while True:
        told = of(path)
        print("\033[2J\033[H" + "\n".join(lines(told)), flush=True)
        if told["state"] in ("ended", "killed"):
            return
        time.sleep(seconds)
