"""The whole model's weights from a checkpoint of any ZeRO stage, in one process and without a GPU.

From DeepSpeed's own files they are taken from the optimizer's fp32 copy where there is one, else from the model's own.
Its `zero_to_fp32` reads stages 1 to 3, but not what the BF16 optimizer writes (bf16 at stage 1), put together here.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsllama.checkpoint.catalog import Checkpoint
from dsllama.checkpoint.fragments import DamagedFile, Source


@contextlib.contextmanager
def opened_weights(checkpoint: Checkpoint) -> Iterator[Mapping[str, Tensor]]:
    """All weights in fp32, by the model's names; a portable checkpoint's are read when they are asked for. Raises
    DamagedFile, then or at once, for what is not as it was saved."""
    if checkpoint.portable:
        with Source(checkpoint.path, checkpoint.manifest) as source:
            yield source
        return
    for name in checkpoint.manifest["files"]:
        for damage in checkpoint.damages_of(name):
            raise DamagedFile(damage)
    yield from_deepspeeds_files(checkpoint)


def from_deepspeeds_files(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights in fp32 of what the engine itself wrote; their digests are not looked at."""
    from dsllama.training.engine import TAG, accelerator

    accelerator()  # reading the files imports DeepSpeed, which would complain that there is no GPU
    folder = checkpoint.path / TAG
    stage = checkpoint.manifest["parallel_layout"]["zero_stage"]
    if stage == 0:
        state = _load(folder / "mp_rank_00_model_states.pt")["module"]
        return {name: tensor.float() for name, tensor in state.items()}
    if next(folder.glob("bf16_zero_pp_rank_0_*"), None) is not None and stage == 1:
        return _from_bf16_optimizer(folder, checkpoint.manifest["parallel_layout"]["ranks"])
    # It reports each file and draws progress bars; a user who generates a sentence wants the sentence.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.path), tag=TAG)


def _from_bf16_optimizer(folder: Path, ranks: int) -> dict[str, Tensor]:
    """Each rank holds one flat slice per parameter group, and a table of which parameter lies where in it."""
    model = _load(folder / "mp_rank_00_model_states.pt")
    pieces: dict[str, list[Tensor]] = {}
    for rank in range(ranks):
        optimizer = _load(folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        slices = zip(optimizer["single_partition_of_fp32_groups"], optimizer["param_slice_mappings"], strict=True)
        for flat, table in slices:
            for name, place in table.items():
                pieces.setdefault(name, []).append(flat[place.start : place.start + place.numel])
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    weights = {name: torch.cat(pieces[name]).view(shape) for name, shape in shapes.items()}
    shared = model["shared_params"]
    for alias, name in shared.items() if isinstance(shared, dict) else shared:
        weights[alias] = weights[name]
    return weights


def _load(file: Path) -> Any:
    # DeepSpeed's files hold Python objects beside the tensors. The manifest says that they are as we wrote them,
    # not who wrote them: do not open checkpoints of people you do not trust.
    return torch.load(file, map_location="cpu", weights_only=False)
