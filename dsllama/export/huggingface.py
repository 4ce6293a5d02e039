"""To and from the Hugging Face layout of LlamaForCausalLM.

    out/config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json

Our parts carry the same names and the rotary pairs lie the same way, so the weights need a prefix and no
permutation. The exported tokenizer puts <SOS> before a text by itself, as our own `generate` does: what
`model.generate(**tokenizer(text))` continues there is what `generate(text)` continues here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsllama.data.tokenizer import Tokenizer
from dsllama.errors import Problem, UserError
from dsllama.model import ffn_hidden_size

_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"
# The hub's own tools split weights at about this size; loaders expect files that fit in memory one by one.
_SHARD_BYTES = 5 * 10**9


def to_huggingface(state: dict[str, Tensor], tied: bool = False) -> dict[str, Tensor]:
    """Our weights under LlamaForCausalLM's names; a tied head is left out, as transformers does."""
    kept = {name: tensor for name, tensor in state.items() if not (tied and name == _HEAD)}
    return {name if name == _HEAD else f"model.{name}": tensor for name, tensor in kept.items()}


def from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """LlamaForCausalLM's weights under our names; where the head is tied, both names are there."""
    ours = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return {_HEAD: ours[_EMBEDDING], **ours}


def export_huggingface(
    state: dict[str, Tensor], config: Any, tokenizer: Tokenizer, out: Path, dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Write a model and its tokenizer to the folder `out`; returns it.

    state: the whole model's weights. config: its TrainingConfig, with vocab_size set where the vocabulary is padded.
    dtype: a torch floating type's name. Raises UserError where `out` exists and overwrite is not asked for.
    """
    if out.exists() and not overwrite:
        raise UserError(Problem("--out", "exists already", "use --overwrite to replace it, or another name", str(out)),
                        "cannot export")
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        weights = {
            # Clones: safetensors refuses tensors that share memory.
            name: tensor.to(getattr(torch, dtype)).clone().contiguous()
            for name, tensor in to_huggingface(state, config.tie_embeddings).items()
        }
        _write_weights(aside, weights)
        _write_json(aside / "config.json", _model_config(config, tokenizer, dtype))
        _write_json(aside / "generation_config.json", _special_ids(tokenizer) | {"do_sample": True})
        _write_tokenizer(aside, tokenizer, config.max_seq_len)
        if out.exists():
            shutil.rmtree(out)
        aside.rename(out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(Problem("--out", f"cannot be written ({error.strerror})", "give another folder", str(out)),
                        "cannot export") from None
    return out


def _write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if groups[-1] and sum(t.nbytes for t in groups[-1].values()) + tensor.nbytes > _SHARD_BYTES:
            groups.append({})
        groups[-1][name] = tensor
    if len(groups) == 1:
        save_file(groups[0], folder / "model.safetensors", {"format": "pt"})
        return
    placed: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(group, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": placed})


def _model_config(config: Any, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size or tokenizer.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": ffn_hidden_size(config.n_embd, config.multiple_of),
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.n_embd // config.n_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.eps,
        # Older releases of transformers read the first, newer ones the second.
        "rope_theta": config.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        **_special_ids(tokenizer),
    }


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    pad = tokenizer.token_to_id("<PAD>")
    ids = {"bos_token_id": tokenizer.sos_id, "eos_token_id": tokenizer.eos_id}
    return ids if pad is None else ids | {"pad_token_id": pad}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<SOS> $A", pair="<SOS> $A $B", special_tokens=[("<SOS>", tokenizer.sos_id)])
    backend.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<SOS>", "eos_token": "<EOS>", "pad_token": "<PAD>", "unk_token": "<UNK>"}
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        **{role: token for role, token in roles.items() if tokenizer.token_to_id(token) is not None},
    })


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
