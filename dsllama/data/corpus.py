"""The text that every CPython has: its documentation topics and the sources of its standard library.

About 10 MB under the PSF licence, enough to see a small model learn. It changes with every patch release of
Python, so its checksum is recorded and no exact loss is promised.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dsllama.errors import Problem, UserError
from dsllama.sizes import readable

_LEFT_OUT = frozenset(
    "test tests idlelib idle_test lib2to3 turtledemo ensurepip tkinter distutils site-packages __pycache__".split())
_SMALLEST = 5_000_000


@dataclass(frozen=True)
class CorpusSummary:
    """What was gathered. bytes: of text, in UTF-8; sha256: of the JSONL file."""

    path: str
    documents: int
    bytes: int
    sha256: str
    source: str
    licence: str = "PSF-2.0"

    def __str__(self) -> str:
        return (f"{self.path}: {self.documents:,} documents, {readable(self.bytes)}B of text from {self.source} "
                f"({self.licence} licence)")


def gather_stdlib_corpus(out: str | Path) -> CorpusSummary:
    """Write the corpus to `out`/stdlib.jsonl, one document a line; an existing one of this Python is kept.

    Raises UserError on a Python without its sources (a zipped or minimal one), or where `out` cannot be written.
    """
    out = Path(out)
    path, note = out / "stdlib.jsonl", out / "summary.json"
    source = f"CPython {platform.python_version()}'s standard library"
    if path.exists() and note.exists():
        summary = CorpusSummary(**json.loads(note.read_text(encoding="utf-8")))
        if summary.sha256 == _sha256(path):
            return summary
    texts = list(_documents())
    size = sum(len(text.encode()) for text in texts)
    if size < _SMALLEST:
        raise UserError(Problem("Python's standard library", f"has only {readable(size)}B of sources here",
                                "use a Python with its sources (not zipped or minimal), or bring your own text: see "
                                "`dsllama tokenizer --help`"), "no corpus")
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        temporary.replace(path)
        summary = CorpusSummary(str(path), len(texts), size, _sha256(path), source)
        note.write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(Problem(str(out), f"cannot be written ({error.strerror})", "give another folder")) from None
    return summary


def _documents() -> Iterator[str]:
    """Documentation topics first, then sources by path: the same order everywhere."""
    try:
        yield from (text for _, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()))
    except ImportError:
        pass  # some distributions leave it out; the sources alone are enough
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                yield text


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
