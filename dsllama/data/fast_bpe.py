"""The fastest way to the same ids: tiktoken over the Hugging Face vocabulary, where it is sure to be equal.

tiktoken merges, in each word, the pair whose joint bytes have the lowest rank; Hugging Face the pair whose merge
comes first. Both give the same where the ids follow the order of the merges and every token's own bytes merge to
that token: both are checked here for every token, and a sample of text is encoded both ways besides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tiktoken

from dsllama.data.tokenizer import Tokenizer

_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Of more texts than this at once, Hugging Face's encodings take 29 bytes of memory for each byte of text.
_BATCH_TEXTS = 256
_BATCH_CHARACTERS = 2**20
_SAMPLE = (
    "The quick brown fox; it's 3.14 <EOS> <SOS>!\n\n\tdef f(x):\n        return x  # naïve café 你好 \U0001f600\r\n"
    "   trailing   \n" + "a" * 700 + " " * 300 + "\u00a0\u2028\u3000.\x00\x1f don't WE'LL you're ١٢ Ⅷ e\u0301"
)


# GPT-2's table, the printable letter that stands for each byte: itself, or else one from 256 upward.
_OTHERS = [*range(33), *range(127, 161), 173]
_LETTERS = {chr(byte): byte for byte in range(256) if byte not in _OTHERS}
_LETTERS |= {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


class FastEncoder:
    """Encodes many texts to ids.

    slow_because: empty where tiktoken does it; the ids are the tokenizer's anyway. may_cut: whether a text that is cut
    as `chunks` cuts has the ids of the whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        described = json.loads(tokenizer.backend.to_str())
        self.may_cut = _is_plain(described)
        self.slow_because = ""
        if not self.may_cut or described["model"].get("ignore_merges"):
            self.slow_because = "the tokenizer is not a plain byte-level BPE"
        elif not _ids_follow_merges(tokenizer, described["model"]):
            self.slow_because = "the tokenizer's ids do not follow its merges"
        else:
            self._tiktoken = _tiktoken_encoding(tokenizer)
            if self._with_tiktoken(_SAMPLE).tolist() != tokenizer.encode(_SAMPLE):
                self.slow_because = "tiktoken gives other ids for a sample of text"

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, as uint32 arrays."""
        if not self.slow_because:
            return [self._with_tiktoken(text) for text in texts]
        found: list[np.ndarray] = []
        batch: list[str] = []
        size = 0
        for text in texts:
            if batch and (len(batch) == _BATCH_TEXTS or size + len(text) > _BATCH_CHARACTERS):
                found += self._with_tokenizers(batch)
                batch, size = [], 0
            batch.append(text)
            size += len(text)
        return found + self._with_tokenizers(batch)

    def _with_tokenizers(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _with_tiktoken(self, text: str) -> np.ndarray:
        try:
            return self._tiktoken.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a run of some 100,000 blanks overflows the stack of its pattern's engine
            return np.array(self._tokenizer.encode(text), dtype=np.uint32)


def _is_plain(described: dict[str, Any]) -> bool:
    """Whether a tokenizer's pipeline is GPT-2's and nothing else: bytes, its pattern, merges within each word."""
    model, splitter = described["model"], described["pre_tokenizer"] or {}
    return bool(
        described["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
        and splitter.get("use_regex", True)
        and not any(model.get(option) for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not model.get("byte_fallback")
        # Others than special ones are found in the text before it is split.
        and all(token["special"] for token in described["added_tokens"])
    )


def _ids_follow_merges(tokenizer: Tokenizer, model: dict[str, Any]) -> bool:
    vocab: dict[str, int] = model["vocab"]
    if not vocab.keys() >= _LETTERS.keys():
        return False
    special = tokenizer.backend.get_added_tokens_decoder()
    learned = {token: number for token, number in vocab.items() if len(token) > 1 and number not in special}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if sorted(learned.values()) != [vocab["".join(pair)] for pair in pairs]:
        return False
    merge = tokenizer.backend.model.tokenize
    return all([part.id for part in merge(token)] == [number] for token, number in learned.items())


def _tiktoken_encoding(tokenizer: Tokenizer) -> tiktoken.Encoding:
    special = tokenizer.backend.get_added_tokens_decoder()
    ranks = {
        bytes(_LETTERS[letter] for letter in token): number
        for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()
        if number not in special
    }
    return tiktoken.Encoding("dsllama", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
