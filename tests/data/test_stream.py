"""The token stream: the shards end to end, and everything that can be wrong with them, said at once."""

import hashlib
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllama.data.manifest import Manifest, Shard
from dsllama.data.stream import TokenStream
from dsllama.errors import UserError


def write_shards(folder: Path, lengths: list[int], vocab_size: int = 50_000, dtype: str = "uint16") -> np.ndarray:
    """Random shards of these lengths; returns the stream that they are."""
    folder.mkdir(exist_ok=True)
    tokens = np.random.default_rng(len(lengths)).integers(0, vocab_size, sum(lengths)).astype(dtype)
    for number, piece in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        np.save(folder / f"shard_{number:05}.npy", piece)
    return tokens


def write_manifest(folder: Path, vocab_size: int = 50_000, **changes) -> Manifest:
    """The manifest that an encoder would have left for the shards that lie there."""
    shards = []
    for path in sorted(folder.glob("*.npy")):
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append(Shard(path.name, len(np.load(path)), 1, checksum))
    content = {"dtype": "uint16", "vocab_size": vocab_size, "tokenizer": "sha256:0", "shards": shards, **changes}
    manifest = Manifest(**content)
    manifest.save(folder)
    return manifest


def problems_of(folder: Path, vocab_size: int | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        TokenStream(folder, vocab_size)
    return [str(problem) for problem in caught.value.problems]


# --- reading ---


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), data=st.data())
def test_any_read_is_the_slice_of_the_concatenated_shards(tmp_path_factory, lengths, data):
    folder = tmp_path_factory.mktemp("shards")
    tokens = write_shards(folder, lengths)
    stream = TokenStream(folder)
    assert stream.tokens == sum(lengths)
    for _ in range(5):
        start = data.draw(st.integers(0, stream.tokens))
        stop = data.draw(st.integers(start, stream.tokens))
        assert np.array_equal(stream.read(start, stop), tokens[start:stop])


def test_a_read_beyond_the_stream_is_an_error_and_not_a_short_answer(tmp_path):
    write_shards(tmp_path, [3, 4])
    stream = TokenStream(tmp_path)
    for start, stop in ((0, 8), (-1, 3), (5, 4)):
        with pytest.raises(IndexError):
            stream.read(start, stop)


def test_a_read_within_a_shard_copies_nothing_and_cannot_change_the_file(tmp_path):
    write_shards(tmp_path, [100])
    stream = TokenStream(tmp_path)
    piece = stream.read(10, 20)
    assert np.shares_memory(piece, stream.read(0, 100))
    assert not piece.flags.writeable


def test_locate_names_the_file_and_the_place_in_it(tmp_path):
    lengths = [3, 1, 5]
    write_shards(tmp_path, lengths)
    stream = TokenStream(tmp_path)
    places = [(f"shard_{shard:05}.npy", offset) for shard, length in enumerate(lengths) for offset in range(length)]
    assert [(path.name, offset) for path, offset in map(stream.locate, range(9))] == places


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", ">u2", ">i4"])
def test_all_integer_dtypes_of_token_files_are_read(tmp_path, dtype):
    tokens = write_shards(tmp_path, [10, 5], vocab_size=30_000, dtype=dtype)
    stream = TokenStream(tmp_path, 30_000)
    assert stream.read(0, 15).tolist() == tokens.tolist()


def test_thousands_of_shards_do_not_exhaust_the_open_files(tmp_path):
    tokens = write_shards(tmp_path, [2] * 1500)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        stream = TokenStream(tmp_path)
        assert np.array_equal(stream.read(0, 3000), tokens)
        places = np.random.default_rng(0).integers(0, 2997, 500).tolist()
        assert all(np.array_equal(stream.read(p, p + 3), tokens[p : p + 3]) for p in places)
        assert len(os.listdir("/proc/self/fd")) < 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- which files ---


def test_without_a_manifest_all_npy_files_in_order_of_name_are_the_stream(tmp_path):
    for name, token in (("b.npy", 2), ("a.npy", 1), ("c.npy", 3)):
        np.save(tmp_path / name, np.array([token], np.uint16))
    for name in ("notes.txt", "tokens.npz", "._a.npy", "d.npy.tmp"):
        (tmp_path / name).write_text("not tokens")
    (tmp_path / "folder.npy").mkdir()
    assert TokenStream(tmp_path).read(0, 3).tolist() == [1, 2, 3]


def test_with_a_manifest_its_list_is_the_stream(tmp_path):
    np.save(tmp_path / "second.npy", np.array([1, 2], np.uint16))
    np.save(tmp_path / "first.npy", np.array([3], np.uint16))
    listed = {path.name: Shard(path.name, len(np.load(path)), 1, "0" * 64) for path in tmp_path.glob("*.npy")}
    manifest = write_manifest(tmp_path, shards=[listed["second.npy"], listed["first.npy"]])
    np.save(tmp_path / "a_stray.npy", np.zeros(7))
    stream = TokenStream(tmp_path)
    assert stream.read(0, 3).tolist() == [1, 2, 3]
    assert stream.fingerprint == manifest.fingerprint
    assert stream.vocab_size == manifest.vocab_size


def test_the_fingerprint_follows_the_content_and_not_the_names(tmp_path):
    tokens = write_shards(tmp_path / "one", [5, 7])
    fingerprint = TokenStream(tmp_path / "one").fingerprint
    (tmp_path / "two").mkdir()
    np.save(tmp_path / "two" / "x.npy", tokens[:5])
    np.save(tmp_path / "two" / "y.npy", tokens[5:])
    assert TokenStream(tmp_path / "two").fingerprint == fingerprint

    others = {"one token": tokens.copy(), "dtype": tokens.astype("uint32"), "another border": tokens}
    others["one token"][3] += 1
    for border, (name, changed) in zip((5, 5, 6), others.items(), strict=True):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", changed[:border])
        np.save(tmp_path / name / "y.npy", changed[border:])
        assert TokenStream(tmp_path / name).fingerprint != fingerprint, name


def test_the_fingerprint_of_a_long_shard_sees_its_beginning_and_its_end(tmp_path):
    tokens = write_shards(tmp_path / "one", [200_000])
    fingerprints = {TokenStream(tmp_path / "one").fingerprint}
    for place in (0, 199_999):
        changed = tokens.copy()
        changed[place] ^= 1
        (tmp_path / str(place)).mkdir()
        np.save(tmp_path / str(place) / "a.npy", changed)
        fingerprints.add(TokenStream(tmp_path / str(place)).fingerprint)
    assert len(fingerprints) == 3


# --- what is refused ---


def test_a_missing_folder_a_file_and_an_empty_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert "no such folder" in problems_of(tmp_path / "missing")[0]
    assert "is not a folder" in problems_of(tmp_path / "file")[0]
    assert "no .npy files" in problems_of(tmp_path / "empty")[0]


def bytes_of(array: np.ndarray, tmp_path: Path) -> bytes:
    np.save(tmp_path / "whole.npy", array, allow_pickle=True)
    content = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "whole.npy").unlink()
    return content


TOKENS = np.arange(50, dtype=np.uint16)
BAD_FILES = {
    "no bytes": (lambda path: b"", "empty (0 bytes)"),
    "no tokens": (lambda path: bytes_of(TOKENS[:0], path), "no tokens"),
    "text": (lambda path: b"once upon a time there was a file", "not a .npy file"),
    "only the magic": (lambda path: bytes_of(TOKENS, path)[:8], "not a .npy file"),
    "half a header": (lambda path: bytes_of(TOKENS, path)[:60], "not a .npy file"),
    "truncated": (lambda path: bytes_of(TOKENS, path)[:-3], "is truncated: 225 bytes where its header says 228"),
    "two arrays": (lambda path: bytes_of(TOKENS, path) * 2, "goes on after its array"),
    "objects": (lambda path: bytes_of(np.array([{"a": 1}, None]), path), "Python objects"),
    "float32": (lambda path: bytes_of(TOKENS.astype("float32"), path), "float32"),
    "float64": (lambda path: bytes_of(TOKENS.astype("float64"), path), "float64"),
    "bool": (lambda path: bytes_of(TOKENS > 3, path), "bool"),
    "int8": (lambda path: bytes_of(TOKENS.astype("int8"), path), "int8"),
    "uint64": (lambda path: bytes_of(TOKENS.astype("uint64"), path), "uint64"),
    "complex": (lambda path: bytes_of(TOKENS.astype("complex64"), path), "complex64"),
    "strings": (lambda path: bytes_of(TOKENS.astype("U3"), path), "<U3"),
    "records": (lambda path: bytes_of(np.zeros(4, [("id", "u2"), ("z", "f4")]), path), "'id'"),
    "two dimensions": (lambda path: bytes_of(TOKENS.reshape(5, 10), path), "shape (5, 10)"),
    "no dimension": (lambda path: bytes_of(TOKENS[3], path), "shape ()"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_token_shard_is_refused_by_name(tmp_path, name):
    make, expected = BAD_FILES[name]
    content = make(tmp_path)
    np.save(tmp_path / "a_good.npy", TOKENS)
    (tmp_path / "bad.npy").write_bytes(content)
    found = [problem for problem in problems_of(tmp_path) if "bad.npy" in problem]
    assert found
    assert expected in found[0]
    assert "a_good.npy" not in found[0]


def test_pickles_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    problems_of(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_everything_that_is_wrong_with_a_folder_comes_in_one_error(tmp_path):
    np.save(tmp_path / "a.npy", TOKENS)
    np.save(tmp_path / "b.npy", TOKENS.astype("int32"))
    np.save(tmp_path / "c.npy", TOKENS.astype("float32").reshape(2, 25))
    (tmp_path / "d.npy").write_bytes(b"")
    np.save(tmp_path / "e.npy", np.array([49, 50], np.uint16))
    (tmp_path / "f.npy").symlink_to(tmp_path / "nowhere")
    text = "\n".join(problems_of(tmp_path, vocab_size=50))
    assert "c.npy: holds float32" in text
    assert "c.npy: has shape (2, 25)" in text
    assert "d.npy: is empty" in text
    assert "e.npy: token 1 of the file is 50, outside the vocabulary (0 to 49)" in text
    assert "f.npy: is a link" in text
    assert "one dtype" in text
    assert "uint16 in 2 such as a.npy, int32 in 1 such as b.npy" in text


@pytest.mark.parametrize("place", [0, 150_000, 299_999])
def test_ids_outside_the_vocabulary_are_seen_at_opening_where_they_are_many(tmp_path, place):
    tokens = np.zeros(300_000, np.uint16)
    start = max(0, min(place, 300_000 - 20_000))
    tokens[start : start + 20_000] = 8192
    np.save(tmp_path / "a.npy", tokens)
    assert TokenStream(tmp_path, 8193).tokens == 300_000
    assert "is 8,192, outside the vocabulary (0 to 8,191)" in problems_of(tmp_path, 8192)[0]


def test_negative_ids_are_refused_without_a_vocabulary_too(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, -1, 7], np.int32))
    assert "token 1 of the file is -1" in problems_of(tmp_path)[0]


# --- the manifest's word ---


def test_a_shard_that_is_not_as_its_manifest_says_is_refused(tmp_path):
    write_shards(tmp_path, [10, 20, 30, 40])
    write_manifest(tmp_path)
    (tmp_path / "shard_00000.npy").unlink()
    np.save(tmp_path / "shard_00001.npy", np.zeros(21, np.uint16))
    np.save(tmp_path / "shard_00002.npy", np.zeros(30, np.int32))
    found = problems_of(tmp_path)
    assert "shard_00000.npy: is in the manifest but not in the folder" in found[0]
    assert "shard_00001.npy: holds 21 tokens of uint16; its manifest says 20 of uint16" in found[1]
    assert "shard_00002.npy: holds 30 tokens of int32; its manifest says 30 of uint16" in found[2]


def test_a_larger_vocabulary_than_the_models_is_refused_and_a_smaller_one_is_not(tmp_path):
    write_shards(tmp_path, [10], vocab_size=5)
    write_manifest(tmp_path, vocab_size=100)
    assert TokenStream(tmp_path, 128).vocab_size == 128
    assert "vocabulary of 100; the model's is 99" in problems_of(tmp_path, 99)[0]


def test_a_manifest_without_shards_is_refused(tmp_path):
    write_shards(tmp_path, [5])
    write_manifest(tmp_path, shards=[])
    assert "lists no shards" in problems_of(tmp_path)[0]


def test_a_half_encoded_folder_is_refused_and_a_finished_one_is_not(tmp_path):
    write_shards(tmp_path, [10, 20])
    write_manifest(tmp_path, resume={"cursor": [0, 1], "used": 0})
    assert "not encoded to its end" in problems_of(tmp_path)[0]
    write_manifest(tmp_path)
    assert TokenStream(tmp_path).tokens == 30


def test_a_shard_that_goes_while_the_stream_is_open_is_named(tmp_path):
    write_shards(tmp_path, [5, 5])
    stream = TokenStream(tmp_path)
    (tmp_path / "shard_00001.npy").unlink()
    with pytest.raises(UserError, match=r"shard_00001.npy: can no longer be read"):
        stream.read(0, 10)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(place=st.integers(0, 140), byte=st.integers(0, 255), length=st.integers(0, 148))
def test_a_damaged_header_is_a_clear_error_or_does_no_harm(tmp_path_factory, place, byte, length):
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(bytes_of(np.arange(10, dtype=np.uint16), folder))
    content[place] = byte
    (folder / "a.npy").write_bytes(content[: max(length, place + 1)])
    try:
        stream = TokenStream(folder)
    except UserError as error:
        assert "a.npy" in str(error)
    else:
        assert len(stream.read(0, stream.tokens)) == stream.tokens
