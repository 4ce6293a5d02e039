"""Shards hold exactly the documents' ids, whatever the workers, the path to the ids, or interruptions on the way."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllama.data.chunks import CHUNK_CHARACTERS, WORD_BEGINS, chunks_of_text
from dsllama.data.corpus import gather_stdlib_corpus
from dsllama.data.encode import encode
from dsllama.data.fast_bpe import FastEncoder
from dsllama.data.manifest import Manifest
from dsllama.data.readers import BLOCK_BYTES
from dsllama.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from dsllama.data.workers import WorkerDied, WorkerPool
from dsllama.errors import UserError
from tests.conftest import PATIENCE

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "can't",
    "jump",
    "12",
    "lazy",
    "dogs",
    "<EOS>",
    "naïve",
    "你好",
    "\U0001f600\n\n\t",
    "def",
    "",
    "f(x):",
    "",
]


def _prose(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode")
    (folder / "a.txt").write_text(_prose(0, 5000))
    return train_tokenizer([folder / "a.txt"], folder / "bpe.json", vocab_size=400)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Some of each kind; c.txt is large enough to pass in pieces."""
    folder = tmp_path_factory.mktemp("source")
    for n in range(6):
        texts = [_prose(100 * n + k, 40) for k in range(30)]
        (folder / f"a{n}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (folder / f"b{n}.txt").write_text(_prose(900 + n, 500))
    (folder / "c.txt").write_text(_prose(7, 250_000))
    (folder / "d.txt").write_text("")
    assert (folder / "c.txt").stat().st_size > CHUNK_CHARACTERS
    return folder


@pytest.fixture(scope="module")
def plain_ids(source, tokenizer):
    """The ids as a plain loop gives them, through the library alone."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    backend.encode_special_tokens = True
    ids = []
    for path in sorted(source.iterdir()):
        text = path.read_text()
        for document in [json.loads(line)["text"] for line in text.splitlines()] if path.suffix == ".jsonl" else [text]:
            ids += [0, *backend.encode(document).ids, 1] if document else []
    return ids


def _ids(folder: Path) -> list[int]:
    return np.concatenate([np.load(folder / shard.file) for shard in Manifest.load(folder).shards]).tolist()


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".npy"}


def _quiet(*arguments, **options):
    return encode(*arguments, progress=False, **options)


def test_shards_hold_every_document_in_order_between_sos_and_eos(source, tokenizer, plain_ids, tmp_path):
    manifest = _quiet([source], tokenizer.path, tmp_path / "out", workers=2, shard_tokens=50_000)
    assert _ids(tmp_path / "out") == plain_ids
    assert manifest == Manifest.load(tmp_path / "out")
    assert (manifest.tokens, manifest.documents) == (len(plain_ids), 6 * 30 + 6 + 1)
    assert (manifest.dtype, manifest.vocab_size) == ("uint16", tokenizer.vocab_size)
    assert manifest.tokenizer == tokenizer.fingerprint
    assert manifest.skipped == {"empty document": 1}
    whole, rest = divmod(len(plain_ids), 50_000)
    assert [shard.tokens for shard in manifest.shards] == [50_000] * whole + [rest]
    for shard in manifest.shards:
        data = (tmp_path / "out" / shard.file).read_bytes()
        ids = np.load(tmp_path / "out" / shard.file, mmap_mode="r")
        assert (ids.dtype, ids.shape) == (np.dtype("<u2"), (shard.tokens,))
        assert (shard.sha256, shard.documents) == (hashlib.sha256(data).hexdigest(), np.count_nonzero(ids == 0))


def test_the_shards_do_not_depend_on_the_number_of_workers(source, tokenizer, tmp_path):
    more = _lines(tmp_path / "more.jsonl", [_prose(5000 + n, 300) for n in range(800)])
    # Of a smaller input, fewer workers than were asked for would do the work.
    assert sum(path.stat().st_size for path in (more, *source.iterdir())) > 2 * BLOCK_BYTES
    for workers in (1, 2, 3):
        _quiet([source, more], tokenizer.path, tmp_path / str(workers), workers=workers, shard_tokens=100_001)
        assert _files(tmp_path / str(workers)) == _files(tmp_path / "1")
        assert Manifest.load(tmp_path / str(workers)) == Manifest.load(tmp_path / "1")


def test_a_total_that_fills_its_shards_exactly_leaves_no_empty_shard(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 40)
    tokens = _quiet([tmp_path / "a.txt"], tokenizer.path, tmp_path / "one").tokens
    halves = _quiet([tmp_path / "a.txt"], tokenizer.path, tmp_path / "two", shard_tokens=1)
    assert [shard.tokens for shard in halves.shards] == [1] * tokens
    assert _ids(tmp_path / "two") == _ids(tmp_path / "one")


def test_a_vocabulary_beyond_65536_is_stored_as_uint32(tokenizer, tmp_path):
    content = json.loads(tokenizer.path.read_text())
    for entry in content["added_tokens"][:2]:
        entry["id"] += 70_000
        del content["model"]["vocab"][entry["content"]]
        content["model"]["vocab"][entry["content"]] = entry["id"]
    (tmp_path / "t.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("fox")
    assert _quiet([tmp_path / "a.txt"], tmp_path / "t.json", tmp_path / "out").dtype == "uint32"
    assert _ids(tmp_path / "out") == [70_000, *tokenizer.encode("fox"), 70_001]


# ------------------------------------------------------------ tiktoken and tokenizers give the same ids


@pytest.fixture(scope="module")
def bulk(tokenizer):
    return FastEncoder(tokenizer)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text() | st.lists(st.sampled_from([*WORDS, *SPECIAL_TOKENS, " ", "  \n", "\u3000", "'ll", "é"])).map("".join))
def test_bulk_encoding_gives_the_tokenizers_ids(bulk, tokenizer, text):
    assert bulk.slow_because == ""
    assert bulk([text])[0].tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 300_000,
        "ab" * 150_000,
        " " * 300_000 + "a",
        "\n" * 300_000,
        " \n\u3000" * 100_000 + "x",
        "你" * 50_000,
        "!" * 200_000,
        "1" * 200_000,
        "\x00" * 100_000,
        "'" * 100_000,
    ],
    ids=lambda text: ascii(text[:3]),
)
def test_bulk_encoding_survives_long_runs_and_gives_the_same_ids(text, bulk, tokenizer):
    assert bulk([text])[0].tolist() == tokenizer.encode(text)


def _changed(tokenizer, path, change):
    content = json.loads(tokenizer.path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.update(normalizer={"type": "NFC"}), "not a plain byte-level BPE"),
        (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "not a plain byte-level BPE"),
        (lambda content: content["pre_tokenizer"].update(use_regex=False), "not a plain byte-level BPE"),
        (lambda content: content["model"]["merges"].reverse(), "do not follow its merges"),
        (lambda content: content["model"]["merges"].pop(), "do not follow its merges"),
    ],
)
def test_another_kind_of_tokenizer_is_encoded_the_slow_way_with_its_own_ids(change, reason, tokenizer, tmp_path):
    other = _changed(tokenizer, tmp_path / "t.json", change)
    texts = [_prose(n, 30) for n in range(300)]
    bulk = FastEncoder(other)
    assert reason in bulk.slow_because
    assert [ids.tolist() for ids in bulk(texts)] == [other.encode(text) for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    _quiet([tmp_path / "a.jsonl"], other.path, tmp_path / "out")
    assert _ids(tmp_path / "out") == [number for text in texts for number in (0, *other.encode(text), 1)]


_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _like_llama_3(content):
    split = {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, {**content["pre_tokenizer"], "use_regex": False}],
    }


def _like_llama_2(content):
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }


@pytest.mark.parametrize("change", [_like_llama_3, _like_llama_2])
def test_a_large_document_is_not_cut_where_its_tokenizer_might_notice(change, tokenizer, tmp_path):
    other = _changed(tokenizer, tmp_path / "t.json", change)
    # Lines end in signs, which Llama-3's pattern takes together with the line's end.
    text = "the quick brown fox!!\n" * (5 * CHUNK_CHARACTERS // 2 // 22)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(text)
    _lines(tmp_path / "in" / "b.jsonl", [text, "small"])
    _quiet([tmp_path / "in"], other.path, tmp_path / "out", workers=1)
    large = [0, *other.encode(text), 1]
    assert _ids(tmp_path / "out") == [*large, *large, 0, *other.encode("small"), 1]


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    st.text(alphabet="ab1!'s_ \n\t\r\u00a0\u3000\u00e9\u0301\u2167\u6f22\u3002\u30fb\u3042\ud55c\uff01", max_size=25)
)
def test_a_text_can_be_cut_where_pieces_are_cut_without_changing_its_ids(tokenizer, text):
    whole = tokenizer.encode(text)
    for cut in [match.start() for match in WORD_BEGINS.finditer(text)]:
        assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == whole


def test_the_pieces_of_a_large_text_have_the_ids_of_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr("dsllama.data.chunks.CHUNK_CHARACTERS", 500)
    text = _prose(3, 20_000)
    pieces = [piece for piece, _ in chunks_of_text(text)]
    assert len(pieces) > 100
    assert [number for piece in pieces for number in tokenizer.encode(piece)] == tokenizer.encode(text)


# ------------------------------------------------------------ again, and after an interruption


def test_encoding_again_returns_what_is_there(source, tokenizer, tmp_path, capsys):
    first = _quiet([source], tokenizer.path, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert encode([source], tokenizer.path, tmp_path / "out") == first
    assert "already encoded" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def _lines(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_what_changed_since_is_named_and_nothing_is_overwritten_unasked(tokenizer, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    a, b = _lines(source / "a.jsonl", ["fox"]), _lines(source / "b.jsonl", ["dogs"])
    _quiet([source], tokenizer.path, out)
    before = _files(out)

    def refusal(inputs, path=tokenizer.path, **options):
        with pytest.raises(UserError) as caught:
            _quiet(inputs, path, out, **options)
        assert _files(out) == before
        assert "--overwrite" in str(caught.value)
        return str(caught.value)

    assert f"{b} is no longer in the input" in refusal([a])
    assert "another order" in refusal([b, a])
    message = refusal([source], shard_tokens=7, text_field="body")
    assert "shard_tokens was 100000000, now 7" in message
    assert "text_field was 'text', now 'body'" in message
    other = _changed(tokenizer, tmp_path / "t.json", lambda content: content["model"]["merges"].reverse())
    assert "tokenizer was 'sha256:" in refusal([source], other.path)
    _lines(a, ["fox fox"])
    c = _lines(source / "c.jsonl", ["new"])
    message = refusal([source])
    assert f"{a} has changed since" in message
    assert f"{c} was not in the input" in message
    _quiet([source], tokenizer.path, out, overwrite=True)
    assert _ids(out) == [n for text in ("fox fox", "dogs", "new") for n in (0, *tokenizer.encode(text), 1)]


def test_a_folder_with_something_else_in_it_is_left_alone(tokenizer, tmp_path):
    source = _lines(tmp_path / "a.jsonl", ["fox"])
    rules = {
        "other.npy": r"holds other\.npy already",
        "manifest.json": r"manifest\.json: is not one that dsllama wrote",
    }
    for name, rule in rules.items():
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text("{}")
        for overwrite in (False, True):
            with pytest.raises(UserError, match=rf"{rule}(.|\n)*move it away"):
                _quiet([source], tokenizer.path, out, overwrite=overwrite)
            assert [path.name for path in out.iterdir()] == [name]


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("shard_00000.npy", "../precious.txt"),
        lambda text: text.replace('"cursor": [', '"cursor": [-1, '),
        lambda text: text.replace('"documents": ', '"documents": "x", "more": '),
        lambda text: text[:-20],
        lambda text: "[" * 100_000,
        lambda text: "[]",
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_manifest_that_somebody_edited_is_refused_and_nothing_is_removed(edit, finished, tokenizer, tmp_path):
    source, out = _lines(tmp_path / "a.jsonl", ["fox"] * 30), tmp_path / "out"
    (tmp_path / "precious.txt").write_text("mine")
    manifest = _quiet([source], tokenizer.path, out, shard_tokens=20)
    if not finished:
        manifest.resume = {"cursor": [0, 0], "used": 20}
        manifest.save(out)
    text = (out / "manifest.json").read_text()
    edited = edit(text)
    if edited == text:
        return
    (out / "manifest.json").write_text(edited)
    before = _files(out)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"manifest\.json: (cannot be read|was changed by hand|is not one)"):
            _quiet([source], tokenizer.path, out, shard_tokens=20, overwrite=overwrite)
    assert _files(out) == before and (tmp_path / "precious.txt").read_text() == "mine"


def test_a_finished_data_set_with_a_damaged_shard_is_not_called_finished(tokenizer, tmp_path):
    source, out = _lines(tmp_path / "a.jsonl", ["fox"] * 30), tmp_path / "out"
    _quiet([source], tokenizer.path, out)
    os.truncate(out / "shard_00000.npy", 100)
    with pytest.raises(UserError, match=r"shard_00000\.npy"):
        _quiet([source], tokenizer.path, out)


@pytest.mark.long
@pytest.mark.parametrize("documents", [6, 40])
def test_very_many_shards_do_not_take_time_that_grows_with_their_square(documents, tokenizer, tmp_path):
    source, out = _lines(tmp_path / "a.jsonl", [_prose(n, 2000) for n in range(documents)]), tmp_path / "out"
    manifest = _quiet([source], tokenizer.path, out, shard_tokens=3)
    assert len(manifest.shards) > 125 * documents
    assert sum(shard.tokens for shard in manifest.shards) == len(_ids(out))


@pytest.mark.parametrize(
    "change", [lambda model: model.update(vocab={}, merges=[]), lambda model: model.update(merges=[])]
)
def test_a_tokenizer_that_loses_text_is_refused(change, tokenizer, tmp_path):
    other = _changed(tokenizer, tmp_path / "t.json", lambda content: change(content["model"]))
    source = _lines(tmp_path / "a.jsonl", ["fox"])
    if other.vocab_size < 100:
        with pytest.raises(UserError, match="loses text"):
            _quiet([source], other.path, tmp_path / "out")
    else:  # without merges it only spells
        assert _quiet([source], other.path, tmp_path / "out").tokens == 5


def test_a_shard_that_vanished_is_noticed(source, tokenizer, tmp_path):
    _quiet([source], tokenizer.path, tmp_path, shard_tokens=100_000)
    (tmp_path / "shard_00001.npy").unlink()
    with pytest.raises(UserError, match=r"shard_00001\.npy: is gone"):
        _quiet([source], tokenizer.path, tmp_path, shard_tokens=100_000)


SCRIPT = """
import sys
from dsllama.data.encode import encode
encode([sys.argv[1]], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]), shard_tokens=100_003)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Five megabytes of real text, a second or more of work; and what it gives when nothing interrupts it."""
    folder = tmp_path_factory.mktemp("corpus")
    gathered = gather_stdlib_corpus(folder / "all").read_bytes()
    (folder / "text").mkdir()
    half = gathered[: gathered.index(b"\n", 5 * 2**20) + 1]
    (folder / "text" / "half.jsonl").write_bytes(half + b'{bad\n{"text": ""}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsllama.data.tokenizer._SAMPLE_BYTES", 100_000)
        train_tokenizer([folder / "text"], folder / "bpe.json", vocab_size=270, on_error="skip")
    script = SCRIPT.replace("workers=", "on_error='skip', workers=")
    subprocess.run([sys.executable, "-c", script, *_arguments(folder, "whole", 2)], check=True)
    return folder, script


def _arguments(folder, out, workers):
    return [str(folder / "text"), str(folder / "bpe.json"), str(folder / out), str(workers)]


def _start(corpus, out, workers, shards):
    """Start encoding in a process of its own, and wait until so many shards are finished, by all of its workers.

    After a kill as many may be there before the workers are.
    """
    folder, script = corpus
    command = [sys.executable, "-c", script, *_arguments(folder, out, workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    encoder, apart = psutil.Process(process.pid), workers if workers > 1 else 0
    while len(list((folder / out).glob("shard_*.npy"))) < shards or len(encoder.children()) < apart:
        assert process.poll() is None
        time.sleep(0.005)
    return process


@pytest.mark.parametrize(("number", "shards"), [(signal.SIGKILL, (1, 6)), (signal.SIGINT, (3,))])
def test_an_encoding_that_was_stopped_goes_on_to_the_same_bytes(number, shards, corpus):
    folder, script = corpus
    out = f"stopped_by_{number}"
    kept: dict[str, bytes] = {}
    for count in shards:
        process = _start(corpus, out, 2, count)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == -number
        manifest = Manifest.load(folder / out)
        assert manifest is None or manifest.resume is not None
        if number == signal.SIGINT:
            assert "run the same command again" in errors
        gone, alive = psutil.wait_procs(workers, timeout=PATIENCE)
        assert (len(gone), alive) == (2, [])
        now = json.loads((folder / out / "manifest.json").read_text())["shards"]
        assert len(now) >= count - 1  # a shard may have its name already, and not yet be noted
        assert kept.items() <= _files(folder / out).items()
        kept = {shard["file"]: (folder / out / shard["file"]).read_bytes() for shard in now}
    command = [sys.executable, "-c", script, *_arguments(folder, out, 1)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"going on after {len(kept)} finished shards" in done.stderr
    assert _files(folder / out) == _files(folder / "whole")
    assert Manifest.load(folder / out) == Manifest.load(folder / "whole")
    assert Manifest.load(folder / out).skipped == {"bad JSON": 1, "empty document": 1}
    assert not list((folder / out).glob(".*.tmp"))


KILLED_BEFORE_THE_NOTE = """
import os, signal
from dsllama.data.manifest import Manifest
save = Manifest.save
def save_or_die(manifest, folder):
    if len(manifest.shards) == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)
    save(manifest, folder)
Manifest.save = save_or_die
"""


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_between_a_shard_and_its_note_in_the_manifest_does_no_harm(count, overwrite, tokenizer, tmp_path):
    (tmp_path / "text").mkdir()
    _lines(tmp_path / "text" / "a.jsonl", [_prose(n, 2000) for n in range(40)])
    _quiet([tmp_path / "text"], tokenizer.path, tmp_path / "whole", shard_tokens=20_000)
    assert len(_files(tmp_path / "whole")) > 3
    script = SCRIPT.replace("100_003", "20_000").replace("\nencode(", KILLED_BEFORE_THE_NOTE + "encode(")
    arguments = [str(tmp_path / "text"), str(tokenizer.path), str(tmp_path / "out"), "1", str(count)]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert len(_files(tmp_path / "out")) == count
    _quiet([tmp_path / "text"], tokenizer.path, tmp_path / "out", shard_tokens=20_000, overwrite=overwrite)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_a_worker_that_is_killed_is_an_error_that_says_so_and_the_next_run_goes_on(corpus):
    folder, script = corpus
    process = _start(corpus, "worker_killed", 2, 1)
    psutil.Process(process.pid).children()[0].kill()
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "UserError: cannot encode: workers: a worker process was killed (SIGKILL)" in errors
    assert "memory ran out" in errors
    subprocess.run([sys.executable, "-c", script, *_arguments(folder, "worker_killed", 2)], check=True)
    assert _files(folder / "worker_killed") == _files(folder / "whole")


def test_two_encodings_into_one_folder_do_not_mix(corpus):
    folder, _ = corpus
    process = _start(corpus, "shared", 1, 1)
    with pytest.raises(UserError, match="is being written by another process"):
        _quiet([folder / "text"], folder / "bpe.json", folder / "shared")
    process.kill()
    process.communicate()


# ------------------------------------------------------------ what is wrong is said


def test_bad_input_is_named_by_file_and_line_or_left_out_and_counted(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fox"}\n{"text": }\n{"txt": 1}\n{"text": "dogs"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError) as caught:
        _quiet([tmp_path], tokenizer.path, tmp_path / "out", shard_tokens=3)
    assert f"{tmp_path}/a.jsonl:2: is not JSON" in str(caught.value)
    assert f"{tmp_path}/a.jsonl:3: has no field 'text'" in str(caught.value)
    assert Manifest.load(tmp_path / "out").resume is not None
    manifest = _quiet([tmp_path], tokenizer.path, tmp_path / "out", shard_tokens=3, on_error="skip", overwrite=True)
    assert manifest.skipped == {"bad JSON": 1, "no text": 1, "not UTF-8": 1}
    assert _ids(tmp_path / "out") == [n for text in ("fox", "dogs") for n in (0, *tokenizer.encode(text), 1)]


def test_an_error_before_the_first_shard_leaves_nothing_to_go_on_from(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fox"}\n{"text": "do\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        _quiet([path], tokenizer.path, tmp_path / "out")
    _lines(path, ["fox", "dogs"])
    assert _quiet([path], tokenizer.path, tmp_path / "out").documents == 2


def test_after_an_error_an_encoding_goes_on_when_asked_to_skip_but_not_back_again(tokenizer, tmp_path):
    a, b = _lines(tmp_path / "a.jsonl", ["", *["fox"] * 10]), tmp_path / "b.jsonl"
    b.write_text('{\n{"text": "dogs"}\n')
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"b\.jsonl:1"):
        _quiet([a, b], tokenizer.path, out, shard_tokens=7)
    kept = _files(out)
    # The first file's block is in part in them: what it left out must not be counted twice.
    assert 0 < 7 * len(kept) < 10 * len([0, *tokenizer.encode("fox"), 1])
    manifest = _quiet([a, b], tokenizer.path, out, shard_tokens=7, on_error="skip")
    assert kept.items() <= _files(out).items()
    assert manifest.skipped == {"bad JSON": 1, "empty document": 1}
    assert _ids(out) == [n for text in ["fox"] * 10 + ["dogs"] for n in (0, *tokenizer.encode(text), 1)]
    with pytest.raises(UserError, match="on_error was 'skip', now 'stop'"):
        _quiet([a, b], tokenizer.path, out, shard_tokens=7)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"workers": 0}, "workers = 0: must be at least 1"),
        ({"shard_tokens": 0}, "shard_tokens = 0: must be at least 1"),
        ({"on_error": "ignore"}, "on_error = 'ignore': must be 'stop' or 'skip'"),
        ({"inputs": ["none.txt"]}, "none.txt: there is no such file or folder"),
        ({"inputs": ["empty.txt"]}, "empty.txt: holds no text (left out: 1 x empty document)"),
        ({"tokenizer_path": "none.json"}, "tokenizer_path = 'none.json': there is no such file"),
        ({"out_dir": "fox.txt"}, "--out = 'fox.txt': is a file, not a folder"),
        ({"out_dir": "fox.txt/out"}, "cannot be read or written (Not a directory)"),
        ({"out_dir": "/proc/none"}, "/proc/none: cannot be read or written"),
    ],
)
def test_wrong_arguments_are_refused_in_one_message(options, rule, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fox.txt").write_text("fox")
    Path("empty.txt").write_text("")
    given_options = {"inputs": ["fox.txt"], "tokenizer_path": tokenizer.path, "out_dir": "out", **options}
    with pytest.raises(UserError) as caught:
        _quiet(**given_options)
    assert rule in str(caught.value)


# ------------------------------------------------------------ the workers themselves


class Sleeper:
    """A job for the pool: sleeps, and says who it was; or fails as it is told."""

    def __call__(self, job):
        number, what = job
        if what == "raise":
            raise ValueError("of no use")
        if what == "die":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02 * (number % 3))
        return number


def test_results_come_in_the_order_of_the_jobs_and_few_jobs_are_drawn_ahead():
    drawn = 0

    def jobs():
        nonlocal drawn
        for drawn in range(1, 41):
            yield drawn - 1, "sleep"

    with WorkerPool(3, Sleeper) as pool:
        for expected, result in enumerate(pool.in_order(jobs())):
            assert result == expected
            assert drawn <= expected + 1 + 4 * 3
    assert drawn == 40


def test_a_worker_that_fails_or_ends_is_an_error_and_no_hang():
    with WorkerPool(2, Sleeper) as pool, pytest.raises(RuntimeError, match="of no use"):
        list(pool.in_order([(0, "sleep"), (1, "raise")]))
    with WorkerPool(2, Sleeper) as pool, pytest.raises(WorkerDied, match="ended by signal SIGTERM"):
        list(pool.in_order([(0, "sleep"), (1, "die"), (2, "sleep")]))


def test_workers_are_gone_when_the_pool_is_left():
    with WorkerPool(2, Sleeper) as pool:
        assert list(pool.in_order([(0, "sleep")])) == [0]
        living = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]  # of other tests
        children = [p for p in living if "dsllama.data.workers" in " ".join(p.cmdline())]
        assert len(children) == 2
    assert not any(child.is_running() for child in children)


def test_encoding_works_from_a_thread(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("fox")
    arguments = ([tmp_path / "a.txt"], tokenizer.path, tmp_path / "out")
    thread = threading.Thread(target=_quiet, args=arguments)
    thread.start()
    thread.join(timeout=PATIENCE)
    assert _ids(tmp_path / "out") == [0, *tokenizer.encode("fox"), 1]
