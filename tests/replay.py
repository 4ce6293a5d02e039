"""The golden replay: what a refactoring must leave as it is, to the bit, and what the repository keeps of it.

    the DeepSpeed JSON of every ready configuration and overlay      tests/golden/deepspeed.json
    the losses of 20 updates of four tiny runs                       tests/golden/losses.json

    python -m tests.replay      writes both anew, where a change of the numbers is meant: say why in the commit

It guards against changes, it proves no number right: other tests do, against independent implementations.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from dsllama.config import load_config
from dsllama.deepspeed_config import deepspeed_config
from dsllama.derived import derive
from tests.campaign import Campaign
from tests.conftest import REPOSITORY, TinyData

GOLDEN = REPOSITORY / "tests" / "golden"
# The simplest, bf16 over ranks, partitioned weights, random draws: (training of the campaign, ranks).
RUNS = [("fp32_stage0", 1), ("bf16_stage1", 2), ("fp32_stage3", 2), ("dropout", 1)]


def deepspeed_jsons() -> dict[str, Any]:
    """What each ready configuration gives, and each overlay over one of them."""
    made = {}
    for file in sorted((REPOSITORY / "configs").glob("*.yaml")):
        config, ranks = load_config(file), 2 if file.stem == "quickstart" else 8
        for accelerator in ("cpu", "cuda"):
            name = f"{file.name}, {ranks} ranks, {accelerator}"
            made[name] = deepspeed_config(config, derive(config, ranks, 8192), accelerator)
    for overlay in sorted((REPOSITORY / "ds_configs").glob("*.json")):
        changes = {"deepspeed_overlay": str(overlay), "zero_stage": None, "nvme_path": "/nvme"}
        config = load_config(REPOSITORY / "configs" / "125M.yaml", changes)
        name = f"125M.yaml with {overlay.name}, 8 ranks, cuda"
        made[name] = deepspeed_config(config, derive(config, 8, 8192), "cuda")
    return made


def losses(campaign: Campaign) -> dict[str, list[float]]:
    """The loss of each update of the four runs."""
    return {f"{name}, {ranks} ranks": list(campaign.losses(name, ranks).values()) for name, ranks in RUNS}


def machine() -> dict[str, str]:
    """What decides the last bits of a sum on a CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "capability": capability, "cpu": models[0] if models else platform.processor()}


def main() -> None:
    """Write both files anew."""
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        campaign = Campaign(Path(place) / "campaign", TinyData.made(Path(place)))
        told = {"machine": machine(), "losses": losses(campaign)}
    for name, content in (("losses.json", told), ("deepspeed.json", deepspeed_jsons())):
        (GOLDEN / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
