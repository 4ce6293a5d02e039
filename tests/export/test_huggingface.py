"""Exported models opened by transformers, offline, as anyone would open them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsllama.errors import UserError
from dsllama.export.huggingface import export_huggingface
from dsllama.model import LLaMaTransformer
from tests.models import from_huggingface, lively_model, model_config, random_tokens, transformers_twin

TEXTS = ["the quick brown", "", "  two  spaces\n\n", "a literal <EOS> and <SOU>", "\u00fcml\u00e4ut \U0001f600 \u4e2d"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def exported(model: LLaMaTransformer, folder: Path, **arguments: Any) -> Any:
    """transformers' model, opened from an export of ours."""
    from transformers import AutoModelForCausalLM

    export_huggingface(model.state_dict(), model.config, model.tokenizer, folder, **arguments)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "shape",
    [
        {"vocab_size": None},
        {"vocab_size": 448},
        {"vocab_size": None, "n_kv_heads": 2, "theta": 500_000.0, "eps": 1e-6},
        {"vocab_size": 320, "tie_embeddings": True, "n_kv_heads": 1},
    ],
    ids=["plain", "padded vocabulary", "grouped queries", "tied"],
)
def test_transformers_gives_the_same_logits_and_the_same_greedy_text(
    tiny_data: Any, tmp_path: Path, shape: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    model = lively_model(model_config(**shape), tiny_data.tokenizer)
    with torch.no_grad():
        model.lm_head.weight[tiny_data.tokenizer.vocab_size :] *= 10 if not model.config.tie_embeddings else 1
    theirs, tokens = exported(model, tmp_path / "hf"), random_tokens(2, 64)
    with torch.no_grad():
        ours, logits = model(tokens), theirs(tokens).logits
    assert logits.shape == ours.shape
    known = slice(model.known_tokens)
    torch.testing.assert_close(logits[..., known], ours[..., known], rtol=0, atol=1e-5)
    assert ("lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")) != model.config.tie_embeddings
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (text for text in TEXTS if "<" not in text):
        ids = theirs.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=20, do_sample=False)
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == model.generate(text, 20, temperature=0)


def test_the_exported_tokenizer_gives_our_ids_after_sos_and_gives_the_text_back(tiny_data: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = tiny_data.tokenizer
    model = LLaMaTransformer(model_config(vocab_size=None), ours)
    export_huggingface(model.state_dict(), model.config, ours, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        if "<" not in text:
            assert ids == [ours.sos_id, *ours.encode(text)]
            assert theirs.decode(ids, skip_special_tokens=True) == text
    # The convention there: a special token that is written out is that token, or a model would never learn to stop.
    assert theirs("x<EOS>")["input_ids"] == [ours.sos_id, *ours.encode("x"), ours.eos_id]
    roles = [theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token]
    assert roles == ["<SOS>", "<EOS>", "<PAD>", "<UNK>"]
    assert theirs.convert_tokens_to_ids(roles) == [0, 1, 2, 3]
    batch = theirs(["the dog", "the"], padding=True)
    assert batch["input_ids"][1][0] == theirs.pad_token_id and batch["attention_mask"][1][0] == 0


def test_weights_are_rounded_to_the_type_that_is_asked_for(tiny_data: Any, tmp_path: Path) -> None:
    model = lively_model(model_config(vocab_size=None), tiny_data.tokenizer)
    theirs = exported(model, tmp_path / "hf", dtype="bfloat16")
    assert theirs.dtype == torch.bfloat16
    torch.testing.assert_close(
        from_huggingface(theirs.state_dict()),
        {name: w.bfloat16() for name, w in model.state_dict().items()},
        rtol=0,
        atol=0,
    )


def test_large_weights_are_split_into_files_that_the_index_names(
    tiny_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively_model(model_config(vocab_size=None), tiny_data.tokenizer)
    whole = exported(model, tmp_path / "whole").state_dict()
    limit = 30_000
    monkeypatch.setattr("dsllama.export.huggingface._SHARD_BYTES", limit)
    split = exported(model, tmp_path / "split").state_dict()
    torch.testing.assert_close(split, whole, rtol=0, atol=0)
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and not (tmp_path / "split" / "model.safetensors").exists()
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
        assert all(index["weight_map"][name] == file.name for name in tensors)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_weights_from_transformers_load_into_our_model(tied: bool) -> None:
    config = model_config(n_kv_heads=2, tie_embeddings=tied)
    source, ours = lively_model(config, seed=1), lively_model(config, seed=2)
    twin, tokens = transformers_twin(source), random_tokens(1, 32)
    ours.load_state_dict(from_huggingface(twin.state_dict()))
    with torch.no_grad():
        expected = twin(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5)


def test_sampling_defaults_are_those_of_our_own_generate(tiny_data: Any, tmp_path: Path) -> None:
    model = LLaMaTransformer(model_config(vocab_size=None), tiny_data.tokenizer)
    defaults = exported(model, tmp_path / "hf").generation_config
    assert (defaults.do_sample, defaults.temperature, defaults.top_p, defaults.top_k) == (True, 1.0, 1.0, 0)
    assert (defaults.bos_token_id, defaults.eos_token_id, defaults.pad_token_id) == (0, 1, 2)


MADE = {
    "config.json",
    "dsllama_export.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def export(tiny_data: Any) -> Any:
    model = LLaMaTransformer(model_config(vocab_size=None), tiny_data.tokenizer)
    return functools.partial(export_huggingface, model.state_dict(), model.config, tiny_data.tokenizer)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_export_replaces_only_what_an_earlier_one_wrote_and_only_when_asked(
    export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "hf"
    with monkeypatch.context() as patch:
        patch.setattr("dsllama.export.huggingface._SHARD_BYTES", 30_000)
        assert export(out) == out
    assert len(names(out)) > len(MADE)  # more than one file of weights
    (out / "note.txt").write_text("mine")
    (out / "src").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export(out)
    export(out, overwrite=True)
    assert names(out) == MADE | {"note.txt", "src"} and (out / "note.txt").read_text() == "mine"
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    # A file of the user's under a name that this export needs.
    (out / "model-00001-of-00002.safetensors").write_text("mine")
    half = (out / "model.safetensors").stat().st_size * 2 // 3
    monkeypatch.setattr("dsllama.export.huggingface._SHARD_BYTES", half)
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors, which no export"):
        export(out, overwrite=True)
    assert names(out) == MADE | {"note.txt", "src", "model-00001-of-00002.safetensors"}


def test_a_project_that_happens_to_have_a_config_json_is_left_alone(export: Any, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    for name in ("config.json", "src/main.py"):
        (project / name).write_text("mine")
    with pytest.raises(UserError, match="holds no export of dsllama's"):
        export(project, overwrite=True)
    assert [(project / name).read_text() for name in ("config.json", "src/main.py")] == ["mine", "mine"]
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="holds no export of dsllama's"):
        export(file, overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        export(file / "below")
    assert names(tmp_path) == {"file", "project"}  # nothing half written is left


def test_an_export_goes_through_a_link_and_into_the_folder_one_is_in(
    export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    export(tmp_path / "link")
    export(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == MADE
    monkeypatch.chdir(tmp_path / "real")
    export(".", overwrite=True)
    assert names(tmp_path / "real") == MADE and names(tmp_path) == {"real", "link"}


def test_an_unknown_type_is_refused_before_anything_is_written(tiny_data: Any, tmp_path: Path) -> None:
    model = LLaMaTransformer(model_config(vocab_size=None), tiny_data.tokenizer)
    with pytest.raises(UserError, match=r"(?s)--dtype = 'bfloat': .*did you mean 'bfloat16'"):
        exported(model, tmp_path / "hf", dtype="bfloat")
    assert not list(tmp_path.iterdir())
