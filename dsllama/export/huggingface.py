"""To the Hugging Face layout of LlamaForCausalLM.

    out/config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json
        dsllama_export.json             which of the files are an export's, and may be replaced by the next one

Our parts carry the same names and the rotary pairs lie the same way, so the weights need a prefix and no
permutation. The exported tokenizer gives our ids and puts <SOS> before a text by itself, as our `generate` does. As
everywhere in that world, a literal "<EOS>" in a text is the token there (chat templates and fine-tuning rely on it).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from dsllama.checkpoint.fragments import header, write_all
from dsllama.data.tokenizer import Tokenizer
from dsllama.errors import Problem, UserError, did_you_mean, of_system
from dsllama.files import write_atomically
from dsllama.model import LLaMaTransformer, ffn_hidden_size

_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's name: that of safetensors
T = TypeVar("T")
_HEAD = "lm_head.weight"
_CONFIG = "config.json"
_RECORD = "dsllama_export.json"
# The hub's own tools split weights at about this size; loaders expect files that fit in memory one by one.
_SHARD_BYTES = 5 * 10**9


def to_huggingface(state: Mapping[str, T], tied: bool = False) -> dict[str, T]:
    """Our weights under LlamaForCausalLM's names; a tied head is left out, as transformers does."""
    kept = {name: value for name, value in state.items() if not (tied and name == _HEAD)}
    return {name if name == _HEAD else f"model.{name}": value for name, value in kept.items()}


def export_huggingface(
    state: Mapping[str, Tensor],
    config: Any,
    tokenizer: Tokenizer,
    out: str | Path,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """Write a model and its tokenizer to the folder `out`; returns it.

    state: the whole model's weights, asked for one by one. config: its TrainingConfig. dtype: float32, bfloat16 or
    float16. overwrite: replace the files of an earlier export, and no others. A new folder is there wholly or not at
    all; in one that is overwritten config.json, without which nothing loads, goes first and comes last.
    Raises UserError where `out` exists or cannot be written.
    """
    out = Path(os.path.realpath(out))  # of a link, the folder that it names
    problems = []
    if dtype not in _TYPES:
        problems.append(Problem("--dtype", f"must be one of {', '.join(_TYPES)}", did_you_mean(dtype, _TYPES), dtype))
    problems += _check_target(out, overwrite)
    if problems:
        raise UserError(problems, "cannot export")
    try:
        place = out if out.exists() else out.parent
        place.mkdir(parents=True, exist_ok=True)
        # What the weights will look like, without reading any.
        planned = LLaMaTransformer(config, tokenizer, device="meta").to(getattr(torch, dtype)).state_dict()
        rows = planned["embed_tokens.weight"].shape[0]
        ours = to_huggingface({name: name for name in planned}, config.tie_embeddings)
        with tempfile.TemporaryDirectory(prefix=".dsllama-", dir=place, ignore_cleanup_errors=True) as folder:
            aside = Path(folder) / out.name
            aside.mkdir()
            _write_weights(aside, state, planned, ours, dtype)
            _write_json(aside / _CONFIG, _model_config(config, tokenizer, rows, dtype))
            _write_json(aside / "generation_config.json", _generation_config(tokenizer, rows))
            _write_tokenizer(aside, tokenizer, config.max_seq_len)
            _publish(aside, out)
    except OSError as error:
        problem = of_system(error, "cannot be written", "--out", "give another folder", str(out))
        raise UserError(problem, "cannot export") from None
    return out


def _check_target(out: Path, overwrite: bool) -> list[Problem]:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return []
    if not _exported(out):
        rule = f"exists already, and holds no export of dsllama's (by its {_RECORD}), so nothing in it is replaced"
        return [Problem("--out", rule, "use another name, or remove it yourself", str(out))]
    there = Problem("--out", "exists already", "use --overwrite to replace it, or another name", str(out))
    return [] if overwrite else [there]


def _exported(folder: Path) -> list[str]:
    """The files that earlier exports wrote into a folder; [] where there was none."""
    try:
        files = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    names = files if isinstance(files, list) else []
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


def _publish(aside: Path, out: Path) -> None:
    """Move the finished files into place."""
    new = sorted(path.name for path in aside.iterdir())
    if not out.exists():
        write_atomically(aside / _RECORD, json.dumps({"files": new}))
        aside.rename(out)
        return
    old = _exported(out)
    if foreign := [name for name in new if name not in old and (out / name).exists()]:
        rule = f"holds {', '.join(foreign)}, which no export of dsllama's wrote"
        raise UserError(Problem("--out", rule, "move it, or use another name", str(out)), "cannot export")
    # Both lists until it is done: what a crash leaves behind stays ours.
    write_atomically(out / _RECORD, json.dumps({"files": sorted({*old, *new})}))
    for name in sorted(old, key=lambda name: name != _CONFIG):
        (out / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == _CONFIG):
        (aside / name).rename(out / name)
    write_atomically(out / _RECORD, json.dumps({"files": new}))


def _write_weights(
    folder: Path, state: Mapping[str, Tensor], planned: Mapping[str, Tensor], ours: Mapping[str, str], dtype: str
) -> None:
    """Write the files one parameter at a time. planned: tensors without content. ours: their name -> our name."""
    split = split_torch_state_dict_into_shards({t: planned[o] for t, o in ours.items()}, max_shard_size=_SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: (_TYPES[dtype], tuple(planned[ours[name]].shape)) for name in names}
        with (folder / file).open("wb", buffering=0) as opened:
            write_all(opened.fileno(), header(tensors, {"format": "pt"}))
            for name in names:
                tensor = state[ours[name]].detach().to("cpu", getattr(torch, dtype)).contiguous()
                write_all(opened.fileno(), memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _model_config(config: Any, tokenizer: Tokenizer, rows: int, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
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


def _generation_config(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The same defaults as our `generate`; transformers would otherwise draw from the 50 likeliest tokens only."""
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    padding = list(range(tokenizer.vocab_size, rows))  # rows of a padded vocabulary, which stand for no token
    return _special_ids(tokenizer) | sampling | ({"suppress_tokens": padding} if padding else {})


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    pad = tokenizer.token_to_id("<PAD>")
    ids = {"bos_token_id": tokenizer.sos_id, "eos_token_id": tokenizer.eos_id}
    return ids if pad is None else ids | {"pad_token_id": pad}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<SOS> $A", pair="<SOS> $A $B", special_tokens=[("<SOS>", tokenizer.sos_id)]
    )
    backend.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<SOS>", "eos_token": "<EOS>", "pad_token": "<PAD>", "unk_token": "<UNK>"}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_seq_len,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",  # what `generate` needs of a batch
            "model_input_names": ["input_ids", "attention_mask"],  # Llama refuses the token_type_ids of the default
            **{role: token for role, token in roles.items() if tokenizer.token_to_id(token) is not None},
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
