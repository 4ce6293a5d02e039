"""What a user relies on from a tokenizer: nothing is lost, text stays text, and wrong files are refused."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models

from dsllama.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from dsllama.errors import UserError

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "times.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return train_tokenizer([folder / "times.txt"], folder / "bpe.json", vocab_size=300)


def test_special_tokens_have_the_first_ids_in_the_documented_order(tokenizer):
    expected = ["<SOS>", "<EOS>", "<PAD>", "<UNK>", "<SOU>", "<EOU>", "<SOA>", "<EOA>", "<SOT>", "<EOT>"]
    assert expected == SPECIAL_TOKENS
    assert [tokenizer.token_to_id(token) for token in expected] == list(range(10))
    assert (tokenizer.sos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.token_to_id("<NONE>") is None


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.text(), st.sampled_from(["", *SPECIAL_TOKENS]), st.text())
@example("naïve café ", "<EOS>", "\x00\r\n\u2028 \U0010ffff")
@example("\ufeff", "<SOS>", " \n \n")
def test_any_text_survives_encoding_and_decoding(tokenizer, before, middle, after):
    text = before + middle + after
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "a", "<", "É"]), max_size=8).map("".join))
def test_special_tokens_spelled_out_in_text_are_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(len(SPECIAL_TOKENS) <= number < tokenizer.vocab_size for number in ids)


def test_decoding_leaves_special_tokens_out(tokenizer):
    assert tokenizer.decode([tokenizer.sos_id, *tokenizer.encode("it was"), tokenizer.eos_id]) == "it was"


def test_transformers_opens_the_file_and_gives_the_same_ids(tokenizer):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path))
    text = "it was the age of naïve wisdom \U0001f600\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert len(theirs) == tokenizer.vocab_size


def test_the_fingerprint_belongs_to_the_content_not_to_its_layout(tokenizer, tmp_path):
    content = json.loads(tokenizer.path.read_text())
    other = tmp_path / "compact.json"
    other.write_text(json.dumps(content))
    assert Tokenizer.load(other).fingerprint == tokenizer.fingerprint
    assert tokenizer.fingerprint.startswith("sha256:")
    content["model"]["merges"].pop()
    other.write_text(json.dumps(content))
    assert Tokenizer.load(other).fingerprint != tokenizer.fingerprint


def test_a_vocabulary_too_small_for_the_bytes_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"vocab_size = 265.*at least 266"):
        train_tokenizer([folder / "times.txt"], tmp_path / "t.json", vocab_size=265)
    assert train_tokenizer([folder / "times.txt"], tmp_path / "t.json", vocab_size=266).vocab_size == 266


def test_a_small_text_gives_the_vocabulary_that_it_has(tmp_path):
    (tmp_path / "a.txt").write_text("abab abab")
    # In "abab" twice, with and without a blank before it: ab, abab, and nothing else occurs twice.
    tokenizer = train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.json", vocab_size=8192)
    assert tokenizer.vocab_size == 10 + 256 + 2


def test_an_existing_tokenizer_is_replaced_only_when_asked(folder, tmp_path):
    out = tmp_path / "t.json"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        train_tokenizer([folder / "times.txt"], out, vocab_size=270)
    assert out.read_text() == "mine"
    train_tokenizer([folder / "times.txt"], out, vocab_size=270, overwrite=True)
    assert Tokenizer.load(out).vocab_size == 270
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_bad_text_is_named_by_file_and_line_or_left_out_on_request(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one two one two"}\n{"text": }\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: is not JSON"):
        train_tokenizer([lines], tmp_path / "t.json", vocab_size=300)
    assert not (tmp_path / "t.json").exists()
    assert train_tokenizer([lines], tmp_path / "t.json", vocab_size=300, on_error="skip").vocab_size > 266


def test_a_large_input_is_sampled_evenly_from_its_beginning_to_its_end(tmp_path, monkeypatch):
    words = [chr(97 + i) * 3 + "q" for i in range(20)]
    for word in words:
        (tmp_path / f"{word}.jsonl").write_text(json.dumps({"text": f" {word}" * 400}) + "\n")
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    monkeypatch.setattr("dsllama.data.tokenizer._SAMPLE_BYTES", total // 4)
    tokenizer = train_tokenizer([tmp_path], tmp_path / "t.json", vocab_size=1000)
    learned = [tokenizer.token_to_id("Ġ" + word) is not None for word in words]
    assert 4 <= sum(learned) <= 6
    assert all(any(learned[start : start + 5]) for start in range(0, 20, 5))


@pytest.mark.parametrize("unit", [" ", "\n", " \n\t", "_-", "=", "\u6f22"])
def test_a_long_run_of_one_kind_does_not_stall_the_training(unit, tmp_path):
    # The trainer's time grows with the square of a word's length: these would take it minutes.
    (tmp_path / "a.txt").write_text(TEXT + unit * 400_000 + TEXT)
    tokenizer = train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.json", vocab_size=400)
    assert tokenizer.decode(tokenizer.encode(unit * 50)) == unit * 50


def test_a_blob_without_blanks_does_not_stall_the_training(tmp_path):
    import random

    letters = "".join(random.Random(0).choices("ACGT", k=400_000))
    (tmp_path / "dna.txt").write_text(TEXT + letters + TEXT)
    tokenizer = train_tokenizer([tmp_path / "dna.txt"], tmp_path / "t.json", vocab_size=2000)
    assert tokenizer.token_to_id("Ġtimes") is not None


def _write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def _word_level(path: Path) -> Path:
    other = tokenizers.Tokenizer(models.WordLevel({"a": 2}, unk_token="a"))
    other.add_special_tokens(["<SOS>", "<EOS>"])
    return _write(path, other.to_str())


def _without_eos(path: Path) -> Path:
    other = tokenizers.Tokenizer(models.BPE())
    other.add_special_tokens(["<SOS>"])
    return _write(path, other.to_str())


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda path: path, "there is no such file"),
        (lambda path: path.parent, "cannot be read"),
        (lambda path: _write(path, ""), "is not a tokenizer"),
        (lambda path: _write(path, '{"a": 1}'), "is not a tokenizer"),
        (lambda path: _write(path, "[]"), "is not a tokenizer"),
        (_word_level, "WordLevel tokenizer, not BPE"),
        (_without_eos, "lacks the special token <EOS>"),
    ],
)
def test_what_is_no_tokenizer_is_refused_with_its_path_and_a_remedy(make, rule, tmp_path):
    path = make(tmp_path / "t.json")
    with pytest.raises(UserError) as caught:
        Tokenizer.load(path)
    assert rule in str(caught.value)
    assert str(path) in str(caught.value)
    assert "dsllama tokenizer" in str(caught.value) or "give a file" in str(caught.value)
