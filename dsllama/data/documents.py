"""Raw text in: files of .txt, .jsonl(.gz, .zst) and .parquet as a stream of documents, in bounded memory.

    files -> blocks (raw bytes of many lines, a row group, a few small files) -> documents

Cutting into blocks is cheap and done by one process, in order; reading the documents out of a block is the
work, and any process can do it. Neither depends on how many processes there are.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dsllama.errors import Problem, UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_BLOCK_BYTES = 2**20
# A .txt file is one document; a larger one than this passes in pieces.
_PIECE_BYTES = 8 * 2**20
_SPLIT_HERE = re.compile(rb"(?<=[^\s])[ \n]")


@dataclass(frozen=True)
class Document:
    """A document or a piece of one: only the first piece `starts` it, only the last one `ends` it."""

    text: str
    where: str
    starts: bool = True
    ends: bool = True


@dataclass
class Read:
    """What a block held: its documents, and what was wrong or empty."""

    documents: list[Document] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    empty: int = 0


@dataclass(frozen=True)
class Block:
    """A part of the input that any process can read by itself.

    disk_bytes: its share of the files' sizes. first: the number of its first line, row or byte. group: a row group.
    """

    kind: str
    paths: tuple[str, ...]
    disk_bytes: int
    data: bytes = b""
    first: int = 0
    group: int = 0
    starts: bool = True
    ends: bool = True

    def read(self, text_field: str = "text") -> Read:
        """The documents in this block. What is wrong is listed, not raised."""
        found = Read()
        _READERS[self.kind](self, text_field, found)
        return found


def input_files(inputs: list[Path]) -> list[Path]:
    """The files behind a list of files and folders, folders searched to any depth, in a fixed order.

    Raises UserError for what does not exist, a suffix that is not read, and folders with nothing to read.
    """
    files: list[Path] = []
    problems = []
    known = ", ".join(SUFFIXES)
    for given in map(Path, inputs):
        if given.is_dir():
            inside = sorted(p for p in given.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
            files += inside
            if not inside:
                problems.append(Problem(str(given), "holds no file that can be read", f"known suffixes: {known}"))
        elif not given.is_file():
            problems.append(Problem(str(given), "there is no such file or folder", "check the path"))
        elif not given.name.endswith(SUFFIXES):
            problems.append(Problem(str(given), "has a suffix that is not read", f"known suffixes: {known}"))
        else:
            files.append(given)
    if problems:
        raise UserError(problems, "cannot read the input")
    return files


def read_documents(files: list[Path], text_field: str = "text") -> Iterator[Document]:
    """All documents of the files, in order. Raises UserError at the first block with something wrong."""
    for block in blocks(files):
        found = block.read(text_field)
        if found.problems:
            raise UserError(found.problems, "the input is wrong")
        yield from found.documents


def blocks(files: list[Path]) -> Iterator[Block]:
    """Cut the input into blocks of about a megabyte. Raises UserError where a file cannot be opened or unpacked."""
    small: list[str] = []
    small_bytes = 0
    for path in files:
        size = path.stat().st_size
        if path.suffix == ".txt" and size <= _PIECE_BYTES:
            small.append(str(path))
            small_bytes += size
            if small_bytes < _BLOCK_BYTES:
                continue
        if small:
            yield Block("texts", tuple(small), small_bytes)
            small, small_bytes = [], 0
        if path.suffix == ".txt" and size > _PIECE_BYTES:
            yield from _text_pieces(path)
        elif path.suffix == ".parquet":
            yield from _row_groups(path)
        elif path.suffix != ".txt":
            yield from _line_blocks(path)
    if small:
        yield Block("texts", tuple(small), small_bytes)


def _text_pieces(path: Path) -> Iterator[Block]:
    """Pieces of a large text, cut before a blank that follows a non-blank.

    There a byte-level BPE with GPT-2's pattern begins a new word anyway, so the pieces' ids are the whole's.
    """
    rest, starts, offset = b"", True, 0
    with path.open("rb") as file:
        while fresh := file.read(_PIECE_BYTES):
            rest += fresh
            cuts = [match.start() for match in _SPLIT_HERE.finditer(rest, max(0, len(rest) - 65536))]
            cut = cuts[-1] if cuts else _character_boundary(rest)
            if len(rest) >= _PIECE_BYTES:
                yield Block("piece", (str(path),), cut, rest[:cut], offset, starts=starts, ends=False)
                rest, starts, offset = rest[cut:], False, offset + cut
    yield Block("piece", (str(path),), len(rest), rest, offset, starts=starts, ends=True)


def _character_boundary(data: bytes) -> int:
    """The end of the last whole UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back
    return len(data)


def _line_blocks(path: Path) -> Iterator[Block]:
    """Whole lines of a JSONL file, unpacked, about a megabyte at a time."""
    with _unpacking(path), path.open("rb") as disk:
        stream, line, position = _unpacked(path, disk), 1, 0
        while lines := stream.readlines(_BLOCK_BYTES):
            now = min(disk.tell(), path.stat().st_size)
            yield Block("lines", (str(path),), now - position, b"".join(lines), line)
            line, position = line + len(lines), now


def _unpacked(path: Path, disk: BinaryIO) -> Any:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=disk)
    if path.name.endswith(".zst"):
        zstandard = _optional("zstandard", path)
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(disk, read_across_frames=True), 2**20)
    return disk


class _unpacking:
    """Turns what a damaged archive raises into a UserError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        unpacking_failed = isinstance(error, (OSError, EOFError, zlib.error)) or "Zstd" in type(error).__name__
        if error is not None and unpacking_failed:
            rule = f"cannot be unpacked ({error})" if self.path.suffix in (".gz", ".zst") else f"cannot be read ({error})"
            raise UserError(Problem(str(self.path), rule, "the file is damaged or cut off: fetch it again")) from None


def _row_groups(path: Path) -> Iterator[Block]:
    with _parquet(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    first = 1
    for group, rows in enumerate(sizes):
        yield Block("rows", (str(path),), path.stat().st_size // len(sizes), first=first, group=group)
        first += rows


def _parquet(path: Path) -> Any:
    parquet = _optional("pyarrow", path, "pyarrow.parquet")
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has its own family of errors
        raise UserError(Problem(str(path), f"is not a parquet file ({str(error)[:100]})", "fetch it again")) from None


def _optional(package: str, path: Path, module: str | None = None) -> Any:
    import importlib

    try:
        return importlib.import_module(module or package)
    except ImportError:
        raise UserError(Problem(str(path), f"needs the package {package}", f"pip install {package}")) from None


# ------------------------------------------------------------ blocks to documents


def _read_texts(block: Block, _field: str, found: Read) -> None:
    for name in block.paths:
        try:
            _add(found, Path(name).read_bytes(), name)
        except OSError as error:
            found.problems.append(Problem(name, f"cannot be read ({error.strerror})", "check its permissions"))


def _read_piece(block: Block, _field: str, found: Read) -> None:
    text = _decode(block.data, block.paths[0], found, block.first)
    if text is not None:
        found.documents.append(Document(text, block.paths[0], block.starts, block.ends))


def _read_lines(block: Block, text_field: str, found: Read) -> None:
    for number, line in enumerate(block.data.split(b"\n"), block.first):
        where = f"{block.paths[0]}:{number}"
        text = _decode(line, where, found)
        if text is None or not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            found.problems.append(Problem(where, f"is not JSON ({error})", _SKIP))
            continue
        value = record.get(text_field) if isinstance(record, dict) else None
        _add_value(found, value, where, text_field, record.keys() if isinstance(record, dict) else ())


def _read_rows(block: Block, text_field: str, found: Read) -> None:
    path = block.paths[0]
    group = block.group
    try:
        with _parquet(Path(path)) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                found.problems.append(_no_field(path, text_field, columns))
                return
            values = file.read_row_group(group, columns=[text_field]).column(0).to_pylist()
    except UserError as error:
        found.problems += error.problems
    except Exception as error:  # a damaged page raises one of pyarrow's own errors
        rule = f"row group {group} cannot be read ({str(error)[:100]})"
        found.problems.append(Problem(path, rule, "the file is damaged: fetch it again"))
    else:
        for number, value in enumerate(values, block.first):
            _add_value(found, value, f"{path}: row {number}", text_field, columns)


_READERS: dict[str, Callable[[Block, str, Read], None]] = {
    "texts": _read_texts, "piece": _read_piece, "lines": _read_lines, "rows": _read_rows,
}
_SKIP = "mend it, or use --on_error skip"


def _add(found: Read, data: bytes, where: str) -> None:
    text = _decode(data, where, found)
    if text:
        found.documents.append(Document(text, where))
    elif text is not None:
        found.empty += 1


def _add_value(found: Read, value: Any, where: str, text_field: str, names: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
            found.problems.append(Problem(where, "holds a lone surrogate, which UTF-8 cannot", _SKIP))
            return
        if value:
            found.documents.append(Document(value, where))
        else:
            found.empty += 1
    elif value is None:
        found.problems.append(_no_field(where, text_field, names))
    else:
        found.problems.append(Problem(where, f"{text_field!r} is no text but {type(value).__name__}", _SKIP))


def _no_field(where: str, text_field: str, names: Any) -> Problem:
    listing = ", ".join(map(str, names)) or "none"
    return Problem(where, f"has no text in {text_field!r}", f"fields there: {listing[:200]}; use --text_field NAME")


def _decode(data: bytes, where: str, found: Read, offset: int = 0) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = "" if ":" in Path(where).name else f":{data.count(10, 0, error.start) + 1}"
        rule = f"is not UTF-8 (byte {offset + error.start}: 0x{data[error.start]:02x})"
        found.problems.append(Problem(where + line, rule, "convert it to UTF-8, or use --on_error skip"))
        return None
