"""Files of lines and of rows, plain or compressed, a megabyte at a time.

A compressed file that was cut off looks, to most readers, like one that simply ends: here it is an error.
"""

from __future__ import annotations

import contextlib
import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACKED = (".gz", ".zst")
BLOCK_BYTES = 2**20
LONGEST_LINE = 64 * 2**20
_MOST_ROWS = 4096


class DamagedFile(Exception):
    """A compressed or parquet file that cannot be unpacked to its end."""


class NoSuchColumn(Exception):
    """A parquet file without the column that was asked for; its arguments are those it has."""


def lines(path: Path) -> Iterator[tuple[bytes | None, int]]:
    """(whole lines, bytes of the file on disk read so far); only the last line of the file may lack its end.

    None stands for a line of more than LONGEST_LINE bytes, which is passed over. Raises DamagedFile and OSError.
    """
    parts: list[bytes] = []
    held = position = 0
    for chunk, position in unpacked(path):
        cut = chunk.rfind(b"\n") + 1
        if cut and held <= LONGEST_LINE:
            yield b"".join([*parts, chunk[:cut]]), position
        elif cut:
            end = chunk.find(b"\n") + 1
            yield None, position
            if end < cut:
                yield chunk[end:cut], position
        if cut:
            parts, held = [], 0
        parts.append(chunk[cut:])
        held += len(chunk) - cut
        if held > LONGEST_LINE:
            parts.clear()
    if held:
        yield None if held > LONGEST_LINE else b"".join(parts), position


def unpacked(path: Path) -> Iterator[tuple[bytes, int]]:
    """(unpacked bytes, a block at a time, bytes of the file on disk read so far).

    What was read whole before a damage is given before DamagedFile is raised. Raises OSError too.
    """
    suffix = path.suffix.lower()
    parts: list[bytes] = []
    held, damage = 0, ""
    with path.open("rb") as disk:
        read: Callable[[int], bytes] = disk.read
        # As much as one read of the disk gives: `read` would drop what it has when it meets a damage.
        if suffix == ".zst":
            widest = {int(zstd.DecompressionParameter.window_log_max): 31}
            read = zstd.ZstdFile(disk, options=widest).read1
        elif suffix == ".gz":
            read = gzip.GzipFile(fileobj=disk).read1
        while True:
            try:
                part = read(BLOCK_BYTES)
            except (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
                part, damage = b"", str(error)
            parts.append(part)
            held += len(part)
            if held >= BLOCK_BYTES or (held and not part):
                yield b"".join(parts), disk.tell()
                parts, held = [], 0
            if damage:
                raise DamagedFile(damage)
            if not part:
                break
        if suffix in PACKED and not disk.tell():
            raise DamagedFile("it has no bytes at all")


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
                raise NoSuchColumn(*file.schema_arrow.names)
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
    for number, value in enumerate(values):
        if isinstance(value, bytes):  # Spark and Impala do not mark their text as such
            with contextlib.suppress(UnicodeDecodeError):
                values[number] = value.decode("utf-8")
    return values
