"""Byte-level BPE: training it on raw text, and the Tokenizer round the file that comes out.

    documents -> a sample of at most `max_bytes` -> BPE over the whole byte alphabet -> one JSON file

Lossless on any UTF-8: every byte is in the alphabet before training begins, so none can vanish.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsllama.data.documents import input_files, read_documents
from dsllama.errors import Problem, UserError

SPECIAL_TOKENS = ["<SOS>", "<EOS>", "<PAD>", "<UNK>", "<SOU>", "<EOU>", "<SOA>", "<EOA>", "<SOT>", "<EOT>"]
_SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
# Merges of a few thousand tokens hardly change beyond this much text, and the trainer keeps all of it in memory.
_SAMPLE_BYTES = 256 * 2**20


class Tokenizer:
    """Text to token ids and back, from a tokenizer's JSON file."""

    def __init__(self, backend: tokenizers.Tokenizer, path: Path) -> None:
        # A literal "<EOS>" in raw text is text, never the special id.
        backend.encode_special_tokens = True
        self.backend = backend
        self.path = path
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = "sha256:" + hashlib.sha256(_canonical(backend).encode()).hexdigest()
        sos, eos = self.token_to_id("<SOS>"), self.token_to_id("<EOS>")
        assert sos is not None and eos is not None
        self.sos_id: int = sos
        self.eos_id: int = eos

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a tokenizer's JSON file. Raises UserError if it is none, or lacks <SOS> or <EOS>."""
        path = Path(path)
        remedy = "train one with `dsllama tokenizer TEXT --out FILE`"
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(Problem("tokenizer_path", "there is no such file", remedy, str(path))) from None
        except OSError as error:
            raise UserError(Problem("tokenizer_path", f"cannot be read ({error.strerror})", remedy, str(path))) from None
        except Exception as error:  # the library raises a bare Exception for whatever it cannot parse
            reason = str(error)[:150]
            raise UserError(Problem("tokenizer_path", f"is not a tokenizer ({reason})", remedy, str(path))) from None
        missing = [token for token in ("<SOS>", "<EOS>") if backend.token_to_id(token) is None]
        if missing:
            raise UserError(Problem("tokenizer_path", f"lacks the special tokens {', '.join(missing)}", remedy, str(path)))
        return cls(backend, path)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing is added to it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, or None."""
        return self.backend.token_to_id(token)


def train_tokenizer(
    inputs: list[Path],
    out: str | Path,
    vocab_size: int = 8192,
    text_field: str = "text",
    max_bytes: int = _SAMPLE_BYTES,
    overwrite: bool = False,
) -> Tokenizer:
    """Train a byte-level BPE on raw text and save it to `out`, one JSON file that transformers opens as well.

    Of more than about `max_bytes` of text an evenly spread sample is used. A small text may give fewer merges
    than asked for: the result's vocab_size says. Raises UserError for bad input and for an `out` that exists.
    """
    out = Path(out)
    problems = []
    if vocab_size < _SMALLEST_VOCABULARY:
        rule = f"must be at least {_SMALLEST_VOCABULARY}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        problems.append(Problem("vocab_size", rule, value=vocab_size))
    if out.exists() and not overwrite:
        problems.append(Problem("--out", "exists already", "use --overwrite to replace it, or another name", str(out)))
    if problems:
        raise UserError(problems, "cannot train a tokenizer")
    files = input_files(inputs)
    backend = tokenizers.Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    keep_every = max(1, -(-sum(file.stat().st_size for file in files) // max_bytes))
    backend.train_from_iterator(_sample(files, text_field, keep_every), trainer)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(backend.to_str(pretty=True), encoding="utf-8")
    temporary.replace(out)
    return Tokenizer(backend, out)


def _sample(files: list[Path], text_field: str, keep_every: int) -> Iterator[str]:
    for number, piece in enumerate(read_documents(files, text_field=text_field)):
        if number % keep_every == 0:
            yield piece.text


def _canonical(backend: Any) -> str:
    return json.dumps(json.loads(backend.to_str()), sort_keys=True)
