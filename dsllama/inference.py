"""A trained model in one process, from a checkpoint of any ZeRO stage: to generate from, or to export."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from dsllama.checkpoint.catalog import Checkpoint, older_whole, open_checkpoint, with_first_whole
from dsllama.config import TrainingConfig
from dsllama.data.tokenizer import Tokenizer
from dsllama.export.huggingface import export_huggingface
from dsllama.machine import half_precision
from dsllama.model import LLaMaTransformer
from dsllama.training.weights import opened_weights

warn = logging.getLogger("dsllama").warning


def load_model(checkpoint: str | Path, device: str | torch.device | None = None) -> LLaMaTransformer:
    """The model of a checkpoint (or of the newest whole one in a folder), in fp32 on a CPU or half precision on a GPU.

    Beside the model itself it takes memory for its largest parameter. Raises UserError where the checkpoint is damaged.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = half[half_precision()] if target.type == "cuda" else torch.float32

    def load(source: Checkpoint) -> LLaMaTransformer:
        # What is read becomes the model: nothing is drawn to be written over, and to_empty would import SymPy.
        model = LLaMaTransformer(*_described(source), device="meta")
        with opened_weights(source) as weights:
            model.load_state_dict({name: weights[name].to(target, dtype) for name in model.state_dict()}, assign=True)
        return model.to(target).eval()

    return with_first_whole(open_checkpoint(checkpoint, warn), load, partial(older_whole, checkpoint, warn))


def export_checkpoint(checkpoint: str | Path, out: str | Path, dtype: str = "float32", overwrite: bool = False) -> Path:
    """Write a checkpoint in the Hugging Face layout (config, safetensors, tokenizer); returns the folder.

    It takes memory for the largest parameter. Raises UserError where the checkpoint is damaged or `out` exists.
    """

    def export(source: Checkpoint) -> Path:
        with opened_weights(source) as weights:
            return export_huggingface(weights, *_described(source), Path(out), dtype=dtype, overwrite=overwrite)

    return with_first_whole(open_checkpoint(checkpoint, warn), export, partial(older_whole, checkpoint, warn))


def _described(source: Checkpoint) -> tuple[TrainingConfig, Tokenizer]:
    config = source.config().replace(vocab_size=source.manifest["vocab_size"], activation_checkpointing=False)
    return config, Tokenizer.load(source.path / "tokenizer.json")
