"""Standard output and error that nothing can kill a run through: closed, a pipe that nobody reads, not UTF-8.

A word that cannot be said is lost, and the work goes on; the log and the checkpoints have all that matters.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any


class _Sturdy:
    """A text stream whose writing and flushing fail silently; all else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost = ""

    def write(self, text: str) -> int:
        with self._noting():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._noting():
            self._stream.flush()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the reader has had enough
            pass
        except (OSError, ValueError) as error:  # a full disk, a closed file
            self.lost = getattr(error, "strerror", None) or str(error)

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lost() -> str:
    """Why something that was said on standard output is lost; empty where all of it was written."""
    sys.stdout.flush()
    return sys.stdout.lost if isinstance(sys.stdout, _Sturdy) else ""


def settle() -> None:
    """Make standard output and error of this process such streams; a second call changes nothing."""
    for number in (0, 1, 2):
        # Where one of them is closed, the next file that is opened gets its number, and with it what libraries print.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        if isinstance(stream, _Sturdy):
            continue
        with contextlib.suppress(AttributeError, ValueError):  # a test's replacement
            # A letter that the terminal's encoding lacks is written as an escape.
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Sturdy(stream))


def table(rows: list[list[str]]) -> list[str]:
    """Rows with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(w.ljust(size) for w, size in zip(row, widths, strict=True)).rstrip() for row in rows]
