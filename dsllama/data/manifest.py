"""The manifest of a data set: which shards there are, what made them, and how to tell that nothing changed.

A data set is a folder of one-dimensional `.npy` files of token ids. `dsllama encode` writes `manifest.json`
beside them; a plain folder of `.npy` files without one is a data set too (see `stream.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsllama.errors import Problem, UserError
from dsllama.files import write_atomically

MANIFEST_NAME = "manifest.json"
FORMAT = "dsllama-shards-1"


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


@dataclass(frozen=True)
class Manifest:
    """What `dsllama encode` wrote. tokenizer: fingerprint of the tokenizer's JSON file ("sha256:...")."""

    dtype: str
    vocab_size: int
    tokenizer: str
    shards: list[Shard]
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Identity of the token stream: its dtype and each shard's length and checksum, in order."""
        identity = [self.dtype, *((shard.tokens, shard.sha256) for shard in self.shards)]
        return "sha256:" + hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `manifest.json` in one step: a reader sees the old one or the new one, never half of it."""
        content = {
            "format": FORMAT,
            "tokens": self.tokens,
            "documents": self.documents,
            "fingerprint": self.fingerprint,
            **asdict(self),
        }
        write_atomically(folder / MANIFEST_NAME, json.dumps(content, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """The folder's manifest, or None if it has none. A damaged one is a UserError."""
        path = folder / MANIFEST_NAME
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(Problem(str(path), f"cannot be read ({error})", _ENCODE_AGAIN)) from error
        try:
            if content["format"] != FORMAT:
                raise UserError(Problem(str(path), f"has format {content['format']!r}, not {FORMAT!r}", _ENCODE_AGAIN))
            manifest = cls(
                dtype=content["dtype"],
                vocab_size=content["vocab_size"],
                tokenizer=content["tokenizer"],
                shards=[Shard(**shard) for shard in content["shards"]],
                skipped=content["skipped"],
            )
        except (KeyError, TypeError) as error:
            raise UserError(Problem(str(path), f"lacks or misnames an entry ({error})", _ENCODE_AGAIN)) from error
        if manifest.fingerprint != content.get("fingerprint"):
            raise UserError(
                Problem(str(path), "was changed by hand: its fingerprint does not fit its shards", _ENCODE_AGAIN)
            )
        return manifest


_ENCODE_AGAIN = "run `dsllama encode` again, or delete the manifest to use the .npy files as they are"
