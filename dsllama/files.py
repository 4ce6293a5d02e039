"""Files that dsllama writes: whole or not at all, and never over something of the user's."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dsllama.errors import Problem, UserError

_MARK = "# Written by dsllama; left alone once it is edited. sha256 of the rest: "


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file in one step, durably: a reader sees the old one or the new one, never half of it. Raises OSError."""
    path = Path(os.path.realpath(path))  # of a link, the file that it names
    # Always the same name: what a kill leaves behind is used up by the next attempt.
    temporary = path.with_name(f".{path.name}.dsllama.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """A file's checksum, in hex. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: Any) -> str:
    """By which a plain value is known again, whatever the order of its keys."""
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_own(path: Path, text: str) -> None:
    """Write a file that allows `#` comments, over one that dsllama wrote and nobody has edited.

    Raises UserError where another file has the name.
    """
    if path.exists():
        there = path.read_text(encoding="utf-8", errors="replace")
        if there != _marked(there.partition("\n")[2]):
            rule = "is not as dsllama wrote it, so it is not replaced"
            raise UserError(Problem(str(path), rule, "move it, or give another folder"), "a file is in the way")
    write_atomically(path, _marked(text))


def _marked(text: str) -> str:
    return f"{_MARK}{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()}\n{text}"
