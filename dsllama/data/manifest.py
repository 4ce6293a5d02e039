"""The manifest of a data set: which shards there are, what made them, and how to tell that nothing changed.

A data set is a folder of one-dimensional `.npy` files of token ids. `dsllama encode` writes `manifest.json` beside
them: while it is at work, with the place in the input from which an interrupted run goes on. A plain folder of `.npy`
files without one is a data set too (see `stream.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dsllama.errors import Problem, UserError, remedy_for
from dsllama.files import digest, write_atomically

MANIFEST_NAME = "manifest.json"
FORMAT = "dsllama-shards-2"
_ANEW = "use --overwrite to begin anew, or another --out"
_ELSEWHERE = "move it away, or give another --out"
TITLE = "cannot encode"


def token_dtype(vocab_size: int) -> str:
    """The smallest dtype that holds every id: uint16 up to 65,536 tokens of vocabulary, else uint32."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class Shard:
    """One `.npy` file: `tokens` ids from `documents` documents; sha256 of the whole file, in hex."""

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclass
class Manifest:
    """What `dsllama encode` has written. tokenizer: fingerprint of the tokenizer's JSON file ("sha256:...").

    skipped: what gave no document, by kind. identity: the input and settings that it belongs to. resume: None where it
    is finished; else where the next shard begins: (file, block) of the input as `cursor`, after `used` of that block's
    ids; `skipped` is of what lies before, that block included if `used` is not 0.
    """

    dtype: str
    vocab_size: int
    tokenizer: str
    shards: list[Shard]
    skipped: dict[str, int] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    resume: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def summary(self) -> str:
        """How much it is, for people."""
        return f"{self.tokens:,} tokens of {self.documents:,} documents in {len(self.shards)} shards"

    @property
    def fingerprint(self) -> str:
        """Identity of the token stream: its dtype and each shard's length and checksum, in order."""
        return digest([self.dtype, *((shard.tokens, shard.sha256) for shard in self.shards)])

    def save(self, folder: Path) -> None:
        """Write `manifest.json` in one step: a reader sees the old one or the new one, never half of it."""
        derived = {"tokens": self.tokens, "documents": self.documents, "fingerprint": self.fingerprint}
        content = {"format": FORMAT, **derived, **asdict(self)}
        content["digest"] = digest(content)
        write_atomically(folder / MANIFEST_NAME, json.dumps(content, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """The folder's manifest, finished or not, or None if it has none. A damaged one is a UserError."""
        path = folder / MANIFEST_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            remedy = remedy_for(error, _ENCODE_AGAIN) if isinstance(error, OSError) else _ENCODE_AGAIN
            rule = f"cannot be read ({getattr(error, 'strerror', None) or error})"
            raise UserError(Problem(str(path), rule, remedy)) from None
        kind = content.get("format") if isinstance(content, dict) else None
        if kind != FORMAT:
            rule = f"has format {kind!r}, not {FORMAT!r}" if kind else "is not one that dsllama wrote"
            raise UserError(Problem(str(path), rule, _ENCODE_AGAIN))
        if content.pop("digest", None) != digest(content):
            raise UserError(Problem(str(path), "was changed by hand: its digest does not fit", _ENCODE_AGAIN))
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        return cls(**{field.name: content[field.name] for field in fields(cls)})

    @classmethod
    def begin(cls, folder: Path, new: Manifest, overwrite: bool) -> Manifest:
        """The manifest of an earlier attempt at `new`, finished or to go on with; or `new` itself.

        overwrite: remove what earlier attempts wrote. Raises UserError where the folder holds something else, naming
        what is different.
        """
        try:
            saved = cls.load(folder)
        except UserError as error:
            # Whatever it is, nothing says which files would be ours to remove.
            [problem] = error.problems
            raise UserError(Problem(problem.where, problem.rule, _ELSEWHERE), TITLE) from None
        if saved is not None and saved.resume is not None:
            # A kill between the naming of shards and their note here leaves some that do not exist.
            number = len(saved.shards)
            while any(path.exists() for path in shard_paths(folder, number)):
                for path in shard_paths(folder, number):
                    path.unlink(missing_ok=True)
                number += 1
        if overwrite and saved is not None:
            # The manifest first: no half of a data set may seem whole.
            for name in (MANIFEST_NAME, *(shard.file for shard in saved.shards)):
                (folder / name).unlink(missing_ok=True)
            saved = None
        if saved is None or not (saved.shards or saved.resume is None):
            if others := sorted(file.name for file in folder.glob("*.npy")):
                rule = f"holds {others[0]} already, not from an encoding that could go on"
                raise UserError(Problem(str(folder), rule, _ELSEWHERE), TITLE)
            return new
        if saved.resume is not None and saved.identity["on_error"] == "stop":
            # Nothing was left out so far, so that "skip", from here on, gives what it would have from the beginning.
            saved.identity["on_error"] = new.identity["on_error"]
        if changes := list(_changes(saved.identity, new.identity)):
            raise UserError([Problem(str(folder), f"was begun otherwise: {c}", _ANEW) for c in changes], TITLE)
        if gone := [shard.file for shard in saved.shards if not (folder / shard.file).is_file()]:
            raise UserError([Problem(str(folder / file), "is gone", _ANEW) for file in gone], TITLE)
        return saved


_ENCODE_AGAIN = "encode again into another folder, or delete the manifest to use the .npy files as they are"


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """A shard's own name, and the one under which it is written."""
    final = folder / f"shard_{number:05d}.npy"
    return final, folder / f".{final.name}.tmp"


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What differs between two identities, in words."""
    before, after = ({file: stamp for file, *stamp in identity["input"]} for identity in (old, new))
    for file in sorted(before.keys() | after.keys()):
        if before.get(file) != after.get(file):
            what = "is no longer in the input" if file not in after else "was not in the input"
            yield f"{file} {'has changed since' if file in before and file in after else what}"
    if before == after and old["input"] != new["input"]:
        yield "the files were in another order"
    changed = (name for name in new if name != "input" and old.get(name) != new[name])
    yield from (f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in changed)
