"""Large texts in chunks that encode to the same ids as the whole.

GPT-2's byte-level BPE first splits a text into words by a pattern in which a blank that follows a non-blank always
begins a new word, whatever comes before or after; so does a sign after a letter or digit, a digit after a letter, and
a letter after a sign other than the apostrophe. A text that is cut there loses nothing; one with no such place stays
whole. Of another pipeline (Llama-3's pattern, Llama-2's normalizer) that is not so: `FastEncoder.may_cut` tells, and
such texts are not cut.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

CHUNK_CHARACTERS = 2**20
# Changes with where texts are cut: an encoding that was begun otherwise cannot go on.
CUTTING = 2
# Letters and signs that are certainly such to GPT-2's pattern: ASCII, and what is written without blanks.
_LETTER = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_SIGN = "!-&(-/:-@\\[-`{-~\u3001\u3002\u300a-\u3011\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f"
WORD_BEGINS = re.compile(
    "(?<=\\S)[ \t\r\n\u00a0\u3000]"
    f"|(?<=[{_LETTER}])[0-9{_SIGN}]|(?<=[0-9])[{_LETTER}{_SIGN}]|(?<=[{_SIGN}])[{_LETTER}0-9]"
)
_CHUNK_BYTES = 2**20


def chunks_of_text(text: str) -> Iterator[tuple[str, bool]]:
    """(chunk, whether it is the last) of a text in memory; a text of less than CHUNK_CHARACTERS is one chunk."""
    position = 0

    def read(characters: int) -> str:
        nonlocal position
        position += characters
        return text[position - characters : position]

    yield from _chunks(read)


def chunks_of_file(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(chunk, whether it is the last, bytes of the file read so far) of a UTF-8 file; line ends are kept as they are.

    A byte order mark at the beginning is left out. Raises OSError.
    """
    with path.open("rb") as disk:
        for text, last in _chunks(io.TextIOWrapper(disk, encoding="utf-8-sig", newline="").read):
            yield text, last, disk.tell()


def utf8_error(path: Path) -> tuple[int, int] | None:
    """Where a file stops being UTF-8: (line, from 1, offending byte). Reads it in chunks. Raises OSError."""
    line = 1
    with path.open("rb") as file:
        try:
            for text in codecs.iterdecode(iter(partial(file.read, _CHUNK_BYTES), b""), "utf-8"):
                line += text.count("\n")
        except UnicodeDecodeError as error:
            return line + error.object.count(b"\n", 0, error.start), error.object[error.start]
    return None


def _chunks(read: Callable[[int], str]) -> Iterator[tuple[str, bool]]:
    """Cut what `read(characters)` gives; it must give less than asked for only at the end.

    Where the cuts fall depends on the text alone.
    """
    held = ""
    while True:
        wanted = CHUNK_CHARACTERS - len(held) % CHUNK_CHARACTERS
        fresh = read(wanted)
        text = held + fresh
        if len(fresh) < wanted:
            yield text, True
            return
        if cut := _last_word_begin(text, len(held)):
            yield text[:cut], False
        held = text[cut:]


def _last_word_begin(text: str, first: int) -> int:
    """The last place, from `first` on, to cut a text at; 0 for none. Nearly always its end is enough to look at."""
    for begin in (max(first, len(text) - 4096), first):
        if found := [match.start() for match in WORD_BEGINS.finditer(text, begin)]:
            return found[-1]
    return 0
