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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dsllama.errors import Problem, UserError
from dsllama.sizes import readable

# Tests and demonstrations, what some builds leave out, what is installed besides, and the topics a second time.
_LEFT_OUT = frozenset(
    (
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "tkinter",
        "distutils",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "pydoc_data",
    )
)
_SMALLEST = 5_000_000


@dataclass(frozen=True)
class CorpusSummary:
    """What was gathered. bytes: of text, in UTF-8; sha256: of the JSONL file; reused: it was there already."""

    path: str
    documents: int
    bytes: int
    sha256: str
    source: str
    licence: str = "PSF-2.0"
    reused: bool = False

    def __str__(self) -> str:
        text = (
            f"{self.path}: {self.documents:,} documents, {readable(self.bytes)}B of text from {self.source} "
            f"({self.licence} licence)"
        )
        return text + (", kept as it was" if self.reused else "")


def gather_stdlib_corpus(out: str | Path, stdlib: str | Path | None = None) -> CorpusSummary:
    """Write the corpus to `out`/stdlib.jsonl, one document a line, and what it is to `out`/summary.json.

    stdlib: the folder of sources, by default the running Python's. A corpus that is there already is kept, that of
    another Python too. The documents come in the order of a hash of their names: the same order everywhere, and any
    stretch of it, such as a held-out end, is a fair sample.

    Raises UserError on a Python without its sources (a zipped or minimal one), and where `out` cannot be written or
    holds a stdlib.jsonl that was changed.
    """
    out = Path(out)
    path, note = out / "stdlib.jsonl", out / "summary.json"
    summary = _summary_of(note)
    if summary is not None and path.is_file() and summary.sha256 == _sha256(path):
        return replace(summary, path=str(path), reused=True)
    root = Path(stdlib or sysconfig.get_paths()["stdlib"])
    documents = sorted(_documents(root), key=lambda document: hashlib.sha256(document[0].encode()).digest())
    size = sum(len(text.encode()) for _, text in documents)
    if size < _SMALLEST:
        raise UserError(
            Problem(
                str(root),
                f"has only {readable(size)}B of Python sources: a zipped or minimal Python",
                "use a Python with its sources, or bring your own text (see the README)",
            ),
            "no corpus",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, text in documents)
        sha256 = _sha256(temporary)
        if path.exists() and _sha256(path) != sha256:
            temporary.unlink()
            raise UserError(
                Problem(
                    str(path), "is there already, and not as it was gathered", "move it away, or give another folder"
                ),
                "no corpus",
            )
        temporary.replace(path)
        source = f"CPython {platform.python_version()}'s standard library" if stdlib is None else str(root)
        summary = CorpusSummary(str(path), len(documents), size, sha256, source)
        temporary = note.with_name(note.name + ".tmp")
        temporary.write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")
        temporary.replace(note)
    except OSError as error:
        raise UserError(Problem(str(out), f"cannot be written ({error.strerror})", "give another folder")) from None
    return summary


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


def _summary_of(note: Path) -> CorpusSummary | None:
    try:
        return CorpusSummary(**json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
