"""Raw text in every format comes out whole and in order, and what is wrong is named by file and line."""

import gzip
import json
import random
import re
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dsllama.data.chunks import CHUNK_CHARACTERS, chunks_of_text
from dsllama.data.documents import blocks, input_files, no_documents
from dsllama.data.readers import zstd
from dsllama.errors import UserError

TEXTS = ["one", "two\nlines\r\n", "naïve 你好 \U0001f600", "u2028:\u2028 nel:\x85 ff:\x0c", " ", '"quoted" \\ <EOS>']


def _jsonl(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def _write(path: Path, texts, field="text") -> Path:
    name = path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        parquet.write_table(pa.table({"id": list(range(len(texts))), field: pa.array(texts, pa.string())}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(_jsonl(texts, field)))
    elif name.endswith(".zst"):
        path.write_bytes(zstd.compress(_jsonl(texts, field)))
    else:
        path.write_bytes(_jsonl(texts, field))
    return path


def read_documents(files, text_field="text", on_error="stop", skipped=None):
    """All documents of the files, in order, as `encode` and `train_tokenizer` take them."""
    counts = Counter() if skipped is None else skipped
    any_document = False
    for block in blocks(files, text_field):
        found = block.read()
        if found.problems and on_error == "stop":
            raise UserError(found.problems, "cannot read the input")
        counts.update(found.skipped)
        any_document |= bool(found.documents)
        yield from found.documents
    if not any_document:
        raise no_documents(files, counts)


def _texts(inputs, **options):
    return [document.text for document in read_documents(input_files(inputs), **options)]


def _whole(documents):
    """(file, line, text) of documents, their pieces put together; checks that each starts and ends once."""
    found, parts = [], []
    for document in documents:
        assert document.starts == (not parts)
        parts.append(document)
        if document.ends:
            found.append((parts[0].file, parts[0].line, "".join(part.text for part in parts)))
            parts = []
    assert not parts
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "A.JSONL"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_every_format_gives_its_documents_in_order_with_their_line_or_row(name, field, tmp_path):
    path = _write(tmp_path / name, TEXTS, field)
    found = list(read_documents([path], text_field=field))
    assert [(d.file, d.line, d.text) for d in found] == [(str(path), n, text) for n, text in enumerate(TEXTS, 1)]
    assert all(d.starts and d.ends for d in found)


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    text = "\n\r\nwindows\r\nold mac\rend \u2028 \n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert _texts([tmp_path]) == [text]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + _jsonl(["two"]))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + b"three " * 300_000)
    assert "".join(_texts([tmp_path])) == "one" + "two" + "three " * 300_000


def test_folders_are_read_to_any_depth_in_sorted_order_without_hidden_or_other_files(tmp_path):
    for name in ("b/2.jsonl", "b/10.jsonl", "a/x/1.jsonl", "c.jsonl", ".hidden.jsonl", ".cache/3.jsonl"):
        _write(tmp_path / name, [name])
    (tmp_path / "README.md").write_text("no")
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    assert _texts([tmp_path]) == ["a/x/1.jsonl", "b/10.jsonl", "b/2.jsonl", "c.jsonl"]
    assert _texts([tmp_path / "c.jsonl", tmp_path / "b"]) == ["c.jsonl", "b/10.jsonl", "b/2.jsonl"]


def test_blank_lines_and_a_missing_last_line_end_are_no_mistakes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "one"}\r\n  \n\n{"text": "two"}')
    assert [(d.line, d.text) for d in read_documents([tmp_path / "a.jsonl"])] == [(2, "one"), (5, "two")]


def test_several_members_in_one_compressed_file_are_all_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl(["1"])) + gzip.compress(_jsonl(["2"])))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(_jsonl(["3"])) + zstd.compress(_jsonl(["4"])))
    assert _texts([tmp_path]) == ["1", "2", "3", "4"]


def _bad(name, content, where, kind, rule):
    return pytest.param(name, content, where, kind, rule, id=f"{name}-{kind}-{rule}".replace(" ", "_"))


GOOD = b'{"text": "good"}\n'
LARGE = b"word " * 400_000


@pytest.mark.parametrize(
    ("name", "content", "where", "kind", "rule"),
    [
        _bad("a.txt", b"one\ntw\xffo\n", "a.txt:2", "not UTF-8", "byte 0xff"),
        _bad("a.txt", b"cut \xe4\xbd", "a.txt:1", "not UTF-8", "byte 0xe4"),
        _bad("a.txt", LARGE + b"\n\n\x80" + LARGE, "a.txt:3", "not UTF-8", "byte 0x80"),
        _bad("a.txt", LARGE + b"\n\xe4\xbd", "a.txt:2", "not UTF-8", "byte 0xe4"),
        _bad("a.jsonl", GOOD + b'{"text": "\xc3("}\n' + GOOD, "a.jsonl:2", "not UTF-8", "byte 0xc3"),
        _bad("a.jsonl", GOOD + b'{"text": "half \\ud800"}\n' + GOOD, "a.jsonl:2", "not UTF-8", "surrogate"),
        _bad("a.jsonl", GOOD * 3 + b'{"text": "x"\n', "a.jsonl:4", "bad JSON", "is not JSON"),
        _bad("a.jsonl", GOOD * 70_000 + b"\x00\n" + GOOD, "a.jsonl:70001", "bad JSON", "is not JSON"),
        _bad("a.jsonl", b"[" * 100_000 + b"\n" + GOOD, "a.jsonl:1", "bad JSON", "is not JSON"),
        _bad("a.jsonl.gz", gzip.compress(GOOD + b"{]\n"), "a.jsonl.gz:2", "bad JSON", "is not JSON"),
        _bad("a.jsonl", GOOD + b'{"txt": "x"}\n', "a.jsonl:2", "no text", "did you mean 'txt'"),
        _bad("a.jsonl", b"{}\n", "a.jsonl:1", "no text", "has no field 'text'"),
        _bad("a.jsonl", b'["text"]\n', "a.jsonl:1", "no text", "is not an object"),
        _bad("a.jsonl", b'{"text": null}\n', "a.jsonl:1", "no text", "is null"),
        _bad("a.jsonl", b'{"text": 5}\n', "a.jsonl:1", "no text", "of type int"),
        _bad("a.jsonl.gz", gzip.compress(GOOD * 1000)[:-20], "a.jsonl.gz", "damaged file", "cannot be unpacked"),
        _bad("a.jsonl.gz", b"not gzip", "a.jsonl.gz", "damaged file", "cannot be unpacked"),
        _bad("a.jsonl.gz", b"", "a.jsonl.gz", "damaged file", "cannot be unpacked"),
        _bad("a.jsonl.zst", zstd.compress(GOOD * 1000)[:-2], "a.jsonl.zst", "damaged file", "ended before"),
        _bad("a.jsonl.zst", b"not zstd", "a.jsonl.zst", "damaged file", "cannot be unpacked"),
        _bad("a.parquet", b"PAR1 but not really PAR1", "a.parquet", "damaged file", "cannot be unpacked"),
        _bad("a.jsonl.gz", gzip.compress(GOOD + b"a" * (65 << 20) + b"\n", 1), "a.jsonl.gz:2", "line too long", "64"),
    ],
)
def test_bad_input_is_named_by_place_or_left_out_and_counted_by_kind(name, content, where, kind, rule, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    fine = _write(tmp_path / "z.jsonl", ["fine"])
    with pytest.raises(UserError) as caught:
        list(read_documents([path, fine]))
    assert f"{tmp_path}/{where}: " in str(caught.value)
    assert rule in str(caught.value)
    skipped: Counter[str] = Counter()
    texts = [document.text for document in read_documents([path, fine], on_error="skip", skipped=skipped)]
    assert texts[-1] == "fine"
    assert set(texts[:-1]) <= {"good"}
    assert skipped == {kind: 1}


def test_all_bad_lines_of_a_block_are_told_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{\n" + GOOD + b"}\n")
    with pytest.raises(UserError) as caught:
        list(read_documents([tmp_path / "a.jsonl"]))
    assert [problem.where.split(":")[1] for problem in caught.value.problems] == ["2", "4"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.large_string()])
def test_parquet_text_that_its_writer_did_not_mark_as_text_is_read(kind, tmp_path):
    texts = ["one \u6f22", "", None, "two"]
    column = pa.array([None if text is None else text.encode() for text in texts], pa.binary()).cast(kind)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    counts = Counter()
    found = [document.text for document in read_documents([tmp_path / "a.parquet"], on_error="skip", skipped=counts)]
    assert found == ["one \u6f22", "two"] and counts.total() == 2


def test_parquet_rows_without_text_are_named_by_row_and_a_missing_column_by_file(tmp_path):
    path = _write(tmp_path / "a.parquet", ["one", None, "three"])
    with pytest.raises(UserError, match=r"a\.parquet: row 2: has no text"):
        list(read_documents([path]))
    assert _texts([path], on_error="skip") == ["one", "three"]
    with pytest.raises(UserError, match=r"a\.parquet: has no field 'txt'(.|\n)*did you mean 'text'"):
        list(read_documents([path], text_field="txt"))
    with pytest.raises(UserError, match="row 1: 'id' is of type int, not text"):
        list(read_documents([path], text_field="id"))


def test_empty_documents_and_files_are_counted_and_never_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": ""}\n{"text": "x"}\n{"text": ""}\n')
    (tmp_path / "c.jsonl").write_bytes(b"")
    skipped: Counter[str] = Counter()
    assert [d.text for d in read_documents(input_files([tmp_path]), skipped=skipped)] == ["x"]
    assert skipped == {"empty document": 3, "empty file": 1}


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_input_without_any_text_is_an_error(on_error, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no text \(left out: 1 x empty document\)"):
        list(read_documents(input_files([tmp_path]), on_error=on_error))


def test_all_that_is_wrong_with_the_named_inputs_is_told_at_once(tmp_path):
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "empty").mkdir()
    good = _write(tmp_path / "good" / "a.jsonl", ["x"])
    with pytest.raises(UserError) as caught:
        input_files([tmp_path / "none", tmp_path / "a.md", tmp_path / "empty", good, good.parent])
    problems = {problem.where: problem.rule for problem in caught.value.problems}
    assert problems == {
        str(tmp_path / "none"): "there is no such file or folder",
        str(tmp_path / "a.md"): "has a suffix that is not read",
        str(tmp_path / "empty"): "holds no file that can be read",
        str(good): "is named twice, and would be read twice",
    }
    with pytest.raises(UserError, match="no file or folder was given"):
        input_files([])


@pytest.mark.parametrize("unit", ["word two\n", "漢字、カナ。\n", "abc\u3000\u00a0 \n", "\r\n x"])
def test_a_large_document_passes_in_pieces_but_is_one_document(unit, tmp_path):
    text = unit * (5 * CHUNK_CHARACTERS // 2 // len(unit))
    (tmp_path / "a.txt").write_bytes(text.encode())
    _write(tmp_path / "b.jsonl", ["small", text])
    _write(tmp_path / "c.parquet", [text, "small"])
    found = list(read_documents(input_files([tmp_path])))
    assert [line_and_text[1:] for line_and_text in _whole(found)] == [
        (1, text),
        (1, "small"),
        (2, text),
        (1, text),
        (2, "small"),
    ]
    assert max(len(document.text) for document in found) <= CHUNK_CHARACTERS
    # Each cut is between kinds of signs, so that no word and no run of blanks is torn.
    for before, after in pairwise(found):
        if not before.ends:
            assert re.fullmatch(r"\S\s|\w\W|[^\w']\w", before.text[-1] + after.text[0])


def test_a_text_without_any_place_to_cut_at_stays_whole():
    text = "x" * (3 * 2**20)
    assert list(chunks_of_text(text)) == [(text, True)]
    found = list(chunks_of_text(text + " " + text))
    assert [(len(piece), last) for piece, last in found] == [(3 * 2**20, False), (3 * 2**20 + 1, True)]


def test_a_text_without_blanks_is_cut_between_its_words():
    for unit in ("\u6f22\u5b57\u3002\u4eee\u540d", "base64+a1/", "it's,"):
        text = unit * (3 * CHUNK_CHARACTERS // len(unit))
        pieces = [piece for piece, _ in chunks_of_text(text)]
        assert len(pieces) >= 3 and "".join(pieces) == text


@settings(max_examples=10, derandomize=True, deadline=None)
@given(st.data())
def test_reading_goes_on_from_any_block_as_if_it_had_not_stopped(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "places"
    if not folder.exists():
        for name in ("a.txt", "b.txt", "f.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        (folder / "c.txt").write_text("a large text\n" * 200_000)
        _write(folder / "d.jsonl.gz", [f"line {n} {'x' * 5000}" for n in range(500)])
        _write(folder / "e.parquet", [f"row {n} {'y' * 5000}" for n in range(500)])
    files = input_files([folder])
    every = list(blocks(files))
    place = data.draw(st.sampled_from(range(len(every))))
    rest = [document for block in every[place + 1 :] for document in block.read().documents]
    assert [d for block in blocks(files, start=every[place].following) for d in block.read().documents] == rest


def test_memory_does_not_grow_with_the_input(tmp_path):
    def peak(copies):
        (tmp_path / "a.txt").write_text("some words and more\n" * 100_000 * copies)
        (tmp_path / "b.jsonl").write_bytes(_jsonl(["some words " * 500]) * 400 * copies)
        tracemalloc.start()
        assert sum(len(d.text) for d in read_documents(input_files([tmp_path]))) > 4_000_000 * copies
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(5) < 1.2 * peak(2)


@pytest.mark.parametrize(
    ("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.json.gz", gzip.compress), ("a.jsonl.zst", zstd.compress)]
)
def test_what_was_read_whole_before_a_damage_is_kept(name, pack, tmp_path):
    lines = [json.dumps({"text": f"{n} {random.Random(n).random()}"}) + "\n" for n in range(20_000)]
    packed = pack("".join(lines).encode())
    (tmp_path / name).write_bytes(packed[: len(packed) * 3 // 4])
    skipped = Counter()
    kept = [d.text for d in read_documents(input_files([tmp_path]), on_error="skip", skipped=skipped)]
    # Three quarters of the bytes hold about three quarters of the lines, but for what is not yet flushed.
    assert len(kept) > 12_000 and kept == [json.loads(line)["text"] for line in lines[: len(kept)]]
    assert skipped == {"damaged file": 1}


def test_more_names_for_lines_and_packed_texts_are_read(tmp_path):
    (tmp_path / "a.ndjson").write_bytes(_jsonl(["1"]))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(_jsonl(["2"])))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("\ufeffthree\nlines\nhere".encode()))
    (tmp_path / "d.txt.zst").write_bytes(zstd.compress(b"4"))
    large = "words and words\n" * (CHUNK_CHARACTERS // 8)
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(large.encode()))
    found = _whole(list(read_documents(input_files([tmp_path]))))
    assert [document[-1] for document in found] == ["1", "2", "three\nlines\nhere", "4", large]


def test_packed_text_that_is_no_text_or_cut_short_is_left_out_wholly(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one\n\xff"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(random.Random(1).randbytes(5000).hex().encode())[:-2000])
    skipped = Counter()
    assert [d.text for d in read_documents(input_files([tmp_path]), on_error="skip", skipped=skipped)] == ["fine"]
    assert skipped == {"not UTF-8": 1, "damaged file": 1}
    with pytest.raises(UserError, match=r"b\.txt\.gz:2: is not UTF-8"):
        list(read_documents(input_files([tmp_path / "b.txt.gz"])))


def test_files_in_a_folder_that_are_left_out_are_counted_by_kind(tmp_path, caplog):
    for name in ("a.txt", "b.md", "c.md", "d.html", "README", ".hidden"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in input_files([tmp_path])] == ["a.txt"]
    assert "left out, with a suffix that is not read: 2 x .md, 1 x " in caplog.text
    assert "1 x .html" in caplog.text and "1 x no suffix" in caplog.text
