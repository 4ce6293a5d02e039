"""Raw text in: files of .txt, .jsonl, .ndjson (packed with gzip or zstd too) and .parquet as a stream of documents.

    inputs -> files, in a fixed order -> blocks of about a megabyte -> documents, and what was wrong with the rest

Cutting files into blocks is cheap and done by one process, in order; reading the documents out of a block is the
work, and any process can do it (see encode.py). Neither depends on how many processes there are. A document larger
than a block passes in chunks (see chunks.py), of which the first `starts` it and the last `ends` it.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from dsllama.data import readers
from dsllama.data.chunks import CHUNK_CHARACTERS, chunks_of_file, chunks_of_text, utf8_error
from dsllama.data.readers import BLOCK_BYTES, LONGEST_LINE, PACKED, DamagedFile, NoSuchColumn
from dsllama.errors import Problem, UserError, did_you_mean, remedy_for

logger = logging.getLogger("dsllama")

_PLAIN = (".txt", ".jsonl", ".ndjson")
# A packed .json is a .jsonl by another name; a plain one is seldom.
SUFFIXES = (*_PLAIN, ".parquet", *(kind + packed for packed in PACKED for kind in (*_PLAIN, ".json")))
_SKIP = "mend it, or leave it out with --on_error skip"
_FILES_PER_BLOCK = 500
_TEXTS = (".txt", *(f".txt{packed}" for packed in PACKED))
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Kinds of what is left out whatever the user asked for, because there is nothing in it to mend.
_HARMLESS = ("empty document", "empty file")


class Document(NamedTuple):
    """A document, or a chunk of a large one. line: where it begins in `file`, from 1; in parquet, the row."""

    file: str
    line: int
    text: str
    starts: bool = True
    ends: bool = True


class BadRecord(NamedTuple):
    """Something that gave no document. kind: a few words to count it by, such as "bad JSON"."""

    kind: str
    problem: Problem


class Cursor(NamedTuple):
    """A place in the input, from which `blocks` can go on: so many files, and blocks of the next one, are done."""

    file: int = 0
    block: int = 0


@dataclass
class Read:
    """What a block held, in order."""

    documents: list[Document] = field(default_factory=list)
    bad_records: list[BadRecord] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        """What a user has to mend; not what is merely empty."""
        return [bad.problem for bad in self.bad_records if bad.kind not in _HARMLESS]

    @property
    def skipped(self) -> Counter[str]:
        """How much gave no document, by kind."""
        return Counter(bad.kind for bad in self.bad_records)


@dataclass(frozen=True)
class Block:
    """A part of the input that any process can read by itself.

    items: gives what it holds, when it is called. disk_bytes: its share of the files' sizes. following: the place
    after it. cut: whether large texts pass in chunks.
    """

    items: Callable[[], Iterable[Document | BadRecord]]
    disk_bytes: int = 0
    following: Cursor = field(default_factory=Cursor)
    cut: bool = True

    def read(self) -> Read:
        """The documents in this block, and what was wrong. Raises nothing for bad input."""
        found = Read()
        for item in self.items():
            if isinstance(item, BadRecord):
                found.bad_records.append(item)
            elif self.cut and item.starts and item.ends:
                for number, (text, ends) in enumerate(chunks_of_text(item.text)):
                    found.documents.append(item._replace(text=text, starts=number == 0, ends=ends))
            else:
                found.documents.append(item)
        return found


def input_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files behind a list of files and folders, folders searched to any depth and sorted, hidden files left out.
    Raises UserError with all that is wrong."""
    files: list[Path] = []
    problems: list[Problem] = []
    known = f"known suffixes: {', '.join(SUFFIXES)}"
    for given in map(Path, inputs):
        if os.path.isdir(given):
            found = _walk(given, problems)
            inside = [path for path in found if _is_known(path)]
            others = Counter(path.suffix or "no suffix" for path in found if not _is_known(path))
            files += inside
            if not inside:
                problems.append(Problem(str(given), "holds no file that can be read", known))
            elif others:
                named = ", ".join(f"{count:,} x {kind}" for kind, count in others.most_common(5))
                logger.warning("%s: left out, with a suffix that is not read: %s", given, named)
        elif not os.path.isfile(given):
            problems.append(Problem(str(given), "there is no such file or folder", "check the path"))
        elif not _is_known(given):
            problems.append(Problem(str(given), "has a suffix that is not read", known))
        else:
            files.append(given)
    twice = [path for path, count in Counter(path.resolve() for path in files).items() if count > 1]
    problems += [Problem(str(path), "is named twice, and would be read twice", "name it once") for path in twice]
    tables = [path for path in files if path.suffix.lower() == ".parquet"]
    if tables and find_spec("pyarrow") is None:
        problems.append(Problem(str(tables[0]), "needs the package pyarrow", "pip install pyarrow"))
    if not files and not problems:
        problems.append(Problem("inputs", "no file or folder was given", "name at least one"))
    if problems:
        raise UserError(problems, "cannot read the input")
    return files


def no_documents(files: Sequence[Path], skipped: Counter[str]) -> UserError:
    """The error for an input without a single document."""
    names = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
    left_out = ", ".join(f"{count:,} x {kind}" for kind, count in sorted(skipped.items()))
    rule = "holds no text" + (f" (left out: {left_out})" if left_out else "")
    return UserError(Problem(names, rule, "give files with text in them"), "cannot read the input")


def blocks(
    files: Sequence[Path], text_field: str = "text", start: Cursor | None = None, cut: bool = True
) -> Iterator[Block]:
    """Cut the input into blocks, from a `Block.following` of an earlier call on, or from its beginning. cut: let
    documents that are larger than a block pass in chunks; else each is whole, and has to fit in memory."""
    start = start or Cursor()
    small: list[str] = []
    small_bytes = 0
    for number, path in enumerate(files[start.file :], start.file):
        size = path.stat().st_size if os.path.isfile(path) else 0
        is_small = path.suffix.lower() == ".txt" and size <= CHUNK_CHARACTERS
        if small and (not is_small or small_bytes >= BLOCK_BYTES or len(small) >= _FILES_PER_BLOCK):
            yield Block(partial(map, _read_text, small), small_bytes, Cursor(number))
            small, small_bytes = [], 0
        if is_small:
            small.append(str(path))
            small_bytes += size
            continue
        skip = start.block if number == start.file else 0
        for count, block in enumerate(_blocks_of(path, size, text_field, cut), 1):
            if count > skip:
                yield replace(block, cut=cut, following=Cursor(number, count))
    if small:
        yield Block(partial(map, _read_text, small), small_bytes, Cursor(len(files)))


def _blocks_of(path: Path, size: int, text_field: str, cut: bool) -> Iterator[Block]:
    """The blocks of one file; what stops its reading half-way is a bad record in the last of them."""
    name = path.name.lower()
    block: Block | None = None
    bad = BadRecord("empty file", Problem(str(path), "is empty"))
    try:
        if name.endswith(".parquet"):
            found = _row_blocks(path, size, text_field)
        else:
            found = _text_blocks(path, size, cut) if name.endswith(_TEXTS) else _line_blocks(path, text_field)
        for block in found:
            yield block
    except DamagedFile as error:
        bad = BadRecord("damaged file", Problem(str(path), f"cannot be unpacked ({error})", "fetch it again"))
    except NoSuchColumn as error:
        bad = _no_field(str(path), text_field, dict.fromkeys(error.args))
    except OSError as error:
        bad = _unreadable(str(path), error)
    else:
        if block is not None:
            return
    yield Block(partial(tuple, (bad,)))


def _text_blocks(path: Path, size: int, cut: bool) -> Iterator[Block]:
    if path.suffix.lower() in PACKED:
        # It has to fit in memory: whether it is UTF-8 to its end shows only when it is unpacked.
        data = b"".join(data for data, _ in readers.unpacked(path))
        if data:
            yield Block(partial(tuple, (_document(str(path), data),)), size)
        return
    if not cut:
        yield Block(partial(map, _read_text, [str(path)]), size)
        return
    # Looked through first, so that a document is left out wholly or not at all.
    if error := utf8_error(path):
        yield Block(partial(tuple, (_not_utf8(f"{path}:{error[0]}", error[1]),)), size)
        return
    line, starts, before = 1, True, 0
    for text, ends, position in chunks_of_file(path):
        yield Block(partial(tuple, (Document(str(path), line, text, starts, ends),)), position - before)
        line, starts, before = line + text.count("\n"), False, position


def _line_blocks(path: Path, text_field: str) -> Iterator[Block]:
    line, before = 1, 0
    for data, position in readers.lines(path):
        if data is None:
            problem = Problem(f"{path}:{line}", f"is a line of more than {LONGEST_LINE >> 20} MiB", _SKIP)
            yield Block(partial(tuple, (BadRecord("line too long", problem),)), position - before)
        else:
            yield Block(partial(_read_lines, data, str(path), line, text_field), position - before)
        line, before = line + (1 if data is None else data.count(b"\n")), position


def _row_blocks(path: Path, size: int, text_field: str) -> Iterator[Block]:
    first = 1
    for rows, total in readers.parquet_rows(path, text_field):
        yield Block(partial(_read_rows, rows, str(path), first, text_field), size * len(rows) // total)
        first += len(rows)


# ------------------------------------------------------------ blocks to documents


def _read_text(file: str) -> Document | BadRecord:
    try:
        return _document(file, Path(file).read_bytes())
    except OSError as error:
        return _unreadable(file, error)


def _document(file: str, data: bytes) -> Document | BadRecord:
    try:
        text = data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return _not_utf8(f"{file}:{line}", error.object[error.start])
    return Document(file, 1, text) if text else _empty(file)


def _read_lines(data: bytes, file: str, first: int, text_field: str) -> Iterator[Document | BadRecord]:
    # The mark is no part of the text, and legal only at the very beginning of a file.
    data = data.removeprefix(_BYTE_ORDER_MARK) if first == 1 else data
    for number, line in enumerate(data.split(b"\n"), first):
        if line and not line.isspace():
            yield _read_line(line, file, number, text_field)


def _read_line(line: bytes, file: str, number: int, text_field: str) -> Document | BadRecord:
    where = f"{file}:{number}"
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(where, error.object[error.start])
    except (ValueError, RecursionError) as error:
        return BadRecord("bad JSON", Problem(where, f"is not JSON ({error})", _SKIP))
    if isinstance(record, dict) and text_field in record:
        return _checked(record[text_field], file, number, where, text_field)
    return _no_field(where, text_field, record)


def _read_rows(rows: Sequence[Any], file: str, first: int, text_field: str) -> Iterator[Document | BadRecord]:
    for number, value in enumerate(rows, first):
        yield _checked(value, file, number, f"{file}: row {number}", text_field)


def _checked(value: Any, file: str, number: int, where: str, text_field: str) -> Document | BadRecord:
    if value is None:
        return BadRecord("no text", Problem(where, f"has no text: {text_field!r} is null", _SKIP))
    if not isinstance(value, str):
        rule = f"{text_field!r} is of type {type(value).__name__}, not text"
        return BadRecord("no text", Problem(where, rule, _SKIP))
    if not value:
        return _empty(where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair (`\ud800`), which no UTF-8 can hold
        problem = Problem(where, f"{text_field!r} holds half a surrogate pair: no character", _SKIP)
        return BadRecord("not UTF-8", problem)
    return Document(file, number, value)


def _no_field(where: str, text_field: str, record: Any) -> BadRecord:
    if not isinstance(record, dict):
        return BadRecord("no text", Problem(where, f"is not an object with a field {text_field!r}", _SKIP))
    remedy = f"name it with --text_field: {did_you_mean(text_field, record)}" if record else _SKIP
    return BadRecord("no text", Problem(where, f"has no field {text_field!r}", remedy))


def _not_utf8(where: str, byte: int) -> BadRecord:
    return BadRecord("not UTF-8", Problem(where, f"is not UTF-8 (byte 0x{byte:02x})", f"convert it to UTF-8; {_SKIP}"))


def _unreadable(file: str, error: OSError) -> BadRecord:
    remedy = f"{remedy_for(error)}, or leave it out with --on_error skip"
    return BadRecord("unreadable file", Problem(file, f"cannot be read ({error.strerror or error})", remedy))


def _empty(where: str) -> BadRecord:
    return BadRecord("empty document", Problem(where, "is empty"))


def _is_known(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _walk(folder: Path, problems: list[Problem]) -> list[Path]:
    """The visible files under a folder, sorted by their parts. Links to folders are followed, each folder once."""
    found: list[Path] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        problems.append(Problem(str(error.filename), f"cannot be listed ({error.strerror})", "check its permissions"))

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if os.path.isfile(path))
