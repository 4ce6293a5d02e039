"""A trained model in one process, from a checkpoint of any ZeRO stage: to generate from, or to export."""

from __future__ import annotations

from pathlib import Path

import torch

from dsllama.data.tokenizer import Tokenizer
from dsllama.export.huggingface import export_huggingface
from dsllama.machine import half_precision
from dsllama.model import LLaMaTransformer
from dsllama.training.checkpoint import open_checkpoint
from dsllama.training.weights import consolidated_weights


def load_model(checkpoint: str | Path, device: str | torch.device | None = None) -> LLaMaTransformer:
    """The model of a checkpoint (or of the newest whole one in a folder), in fp32 on a CPU or half precision on a GPU.

    Raises UserError where the checkpoint is damaged.
    """
    source = open_checkpoint(checkpoint)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = source.config().replace(vocab_size=source.manifest["vocab_size"], activation_checkpointing=False)
    model = LLaMaTransformer(config, Tokenizer.load(source.path / "tokenizer.json"), device="cpu")
    model.load_state_dict(consolidated_weights(source))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return model.to(target, half[half_precision()] if target.type == "cuda" else torch.float32).eval()


def export_checkpoint(checkpoint: str | Path, out: str | Path, dtype: str = "float32", overwrite: bool = False) -> Path:
    """Write a checkpoint in the Hugging Face layout (config, safetensors, tokenizer); returns the folder.

    Raises UserError where the checkpoint is damaged or `out` exists.
    """
    source = open_checkpoint(checkpoint)
    config = source.config().replace(vocab_size=source.manifest["vocab_size"])
    tokenizer = Tokenizer.load(source.path / "tokenizer.json")
    return export_huggingface(
        consolidated_weights(source), config, tokenizer, Path(out), dtype=dtype, overwrite=overwrite
    )
