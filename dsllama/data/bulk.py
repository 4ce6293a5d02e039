"""The fastest way to the same ids: tiktoken over the Hugging Face vocabulary, where it proves itself equal.

tiktoken takes the vocabulary as bytes ranked by merge order, which for a byte-level BPE are the ids themselves,
and GPT-2's split pattern, which is that of the `ByteLevel` pre-tokenizer. A sample is encoded both ways at start.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dsllama.data.tokenizer import Tokenizer

_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_PROOF = (
    "The quick brown fox; it's 3.14 <EOS> <SOS>!\n\n\tdef f(x):\n        return x  # naïve café 你好 \U0001f600\r\n"
    "   trailing   \n" + "a" * 700 + " " * 300 + "\u00a0\u2028\u3000.\x00\x1f don't WE'LL you're"
)


class BulkEncoder:
    """Encodes many texts to ids. `fast` says whether tiktoken does it; either way the ids are the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tiktoken = _tiktoken_encoding(tokenizer)
        self.fast = self._tiktoken is not None

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, as uint32 arrays."""
        if self._tiktoken is not None:
            return [self._one(text) for text in texts]
        found = self._tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in found]

    def _one(self, text: str) -> np.ndarray:
        try:
            return self._tiktoken.encode_to_numpy(text, disallowed_special=())
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException:  # a panic of its regular expression engine is no Exception
            return np.asarray(self._tokenizer.encode(text), dtype=np.uint32)


def _tiktoken_encoding(tokenizer: Tokenizer) -> Any:
    """The tokenizer as a tiktoken encoding, or None where that cannot be had or gives other ids."""
    try:
        import tiktoken
    except ImportError:
        return None
    try:
        description = json.loads(tokenizer.backend.to_str())
        special = {entry["id"] for entry in description["added_tokens"]}
        to_byte = {letter: byte for byte, letter in _byte_letters().items()}
        ranks = {
            bytes(to_byte[letter] for letter in token): number
            for token, number in description["model"]["vocab"].items()
            if number not in special
        }
        encoding = tiktoken.Encoding("dsllama", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        same = encoding.encode_to_numpy(_PROOF, disallowed_special=()).tolist() == tokenizer.encode(_PROOF)
    except Exception:  # another kind of tokenizer, another version of tiktoken: the slow way is always there
        return None
    return encoding if same else None


def _byte_letters() -> dict[int, str]:
    """GPT-2's table: each byte as a printable letter, its own where it has one, else one from 256 upward."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
