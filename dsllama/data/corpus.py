"""The text that every CPython has: its documentation topics and the sources of its standard library.

About 10 MB under the PSF licence, enough to see a small model learn. It changes with every patch release of Python, so
no exact loss is promised.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dsllama.errors import Problem, UserError, of_system
from dsllama.files import write_atomically
from dsllama.sizes import readable

# Tests and demonstrations, what some builds leave out, what is installed besides, and the topics a second time.
_LEFT_OUT = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "tkinter", "distutils"}
_LEFT_OUT |= {"site-packages", "dist-packages", "pydoc_data"}
_SMALLEST = 5_000_000


def gather_stdlib_corpus(out: str | Path) -> Path:
    """Write the corpus to `out`/stdlib.jsonl, one document a line, unless such a file is there; returns its path.

    The documents come in the order of a hash of their names: the same order everywhere, and any stretch of it, such as
    a held-out end, is a fair sample. Raises UserError on a Python without its sources (a zipped or minimal one), and
    where `out` cannot be written.
    """
    path = Path(out) / "stdlib.jsonl"
    if path.exists():
        return path
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = sorted(_documents(root), key=lambda document: hashlib.sha256(document[0].encode()).digest())
    size = sum(len(text.encode()) for _, text in documents)
    if size < _SMALLEST:
        rule = f"has only {readable(size)}B of Python sources: a zipped or minimal Python"
        remedy = "use a Python with its sources, or bring your own text (see the README)"
        raise UserError(Problem(str(root), rule, remedy), "no corpus")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, text in documents)
        write_atomically(path, "".join(lines))
    except OSError as error:
        raise UserError(of_system(error, "cannot be written", str(out), "give another folder")) from None
    return path


def _documents(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the documentation topics and of each source that is not empty."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}  # some distributions leave it out; the sources alone are enough
    yield from ((f"topic {name}", text) for name, text in topics.items())
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(name.parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                yield name.as_posix(), text
