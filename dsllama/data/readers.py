"""Files of lines and of rows, plain or compressed, a megabyte at a time.

A compressed file that was cut off looks, to most readers, like one that simply ends: here it is an error.
"""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK_BYTES = 2**20
_LONGEST_LINE = 64 * 2**20
_MOST_ROWS = 4096


class DamagedFile(Exception):
    """A compressed or parquet file that cannot be unpacked to its end."""


class NoSuchColumn(Exception):
    """A parquet file without the column that was asked for; `columns` are those it has."""

    def __init__(self, columns: list[str]) -> None:
        super().__init__(columns)
        self.columns = columns


@dataclass(frozen=True)
class LineTooLong:
    """Stands for a line of more than `limit` bytes, which is passed over."""

    limit: int


def lines(path: Path) -> Iterator[tuple[bytes | LineTooLong, int]]:
    """(whole lines, bytes of the file on disk read so far); only the last line of the file may lack its end.

    Raises DamagedFile and OSError.
    """
    parts: list[bytes] = []
    held = 0
    with path.open("rb") as disk:
        for chunk in _chunks(path, disk):
            cut = chunk.rfind(b"\n") + 1
            if cut and held <= _LONGEST_LINE:
                yield b"".join([*parts, chunk[:cut]]), disk.tell()
            elif cut:
                end = chunk.find(b"\n") + 1
                yield LineTooLong(_LONGEST_LINE), disk.tell()
                if end < cut:
                    yield chunk[end:cut], disk.tell()
            if cut:
                parts, held = [], 0
            parts.append(chunk[cut:])
            held += len(chunk) - cut
            if held > _LONGEST_LINE:
                parts.clear()
        if held > _LONGEST_LINE:
            yield LineTooLong(_LONGEST_LINE), disk.tell()
        elif held:
            yield b"".join(parts), disk.tell()


def unpacked(path: Path) -> Iterator[bytes]:
    """The unpacked bytes of a file. Raises DamagedFile and OSError."""
    with path.open("rb") as disk:
        yield from _chunks(path, disk)


def parquet_rows(path: Path, column: str) -> Iterator[tuple[list[Any], int]]:
    """(some rows of one column, rows in the file). A value that is not UTF-8 comes as bytes.

    Raises NoSuchColumn, DamagedFile and OSError.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        # Without these two, a whole row group is in memory at once, and many files have only one.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK_BYTES) as file:
            if column not in file.schema_arrow.names:
                raise NoSuchColumn(file.schema_arrow.names)
            total = file.metadata.num_rows
            size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
            rows = max(1, min(_MOST_ROWS, BLOCK_BYTES * total // max(1, size)))
            for batch in file.iter_batches(batch_size=rows, columns=[column], use_threads=False):
                yield _values(batch.column(0)), total
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedFile(str(error).splitlines()[0][:150]) from None


def _values(column: Any) -> list[Any]:
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast("binary").to_pylist()
    except OverflowError:  # of a date beyond Python's
        values = [0] * len(column)
    # Spark and Impala do not mark their text as such.
    return [_text_or_bytes(value) if isinstance(value, bytes) else value for value in values]


def _text_or_bytes(value: bytes) -> str | bytes:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _chunks(path: Path, disk: BinaryIO) -> Iterator[bytes]:
    """The unpacked bytes of a file. What was read whole before a damage is given before DamagedFile is raised."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        widest = {int(zstd.DecompressionParameter.window_log_max): 31}
        yield from _unpacked(zstd.ZstdFile(disk, options=widest), disk)
    elif suffix == ".gz":
        yield from _unpacked(gzip.GzipFile(fileobj=disk), disk)
    else:
        while chunk := disk.read(BLOCK_BYTES):
            yield chunk


def _unpacked(stream: Any, disk: BinaryIO) -> Iterator[bytes]:
    parts: list[bytes] = []
    held, anything, damage = 0, False, ""
    while True:
        try:
            # As much as one read of the disk gives: `read` would drop what it has when it meets a damage.
            part = stream.read1(BLOCK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
            part, damage = b"", str(error)
        parts.append(part)
        held += len(part)
        anything = anything or bool(part)
        if held >= BLOCK_BYTES or (held and not part):
            yield b"".join(parts)
            parts, held = [], 0
        if damage:
            raise DamagedFile(damage)
        if not part:
            break
    if not anything and not disk.tell():
        raise DamagedFile("it has no bytes at all")
