"""Byte-level BPE: training it on raw text, and the Tokenizer round the file that comes out.

    documents -> a sample of at most 128 MiB -> BPE over the whole byte alphabet -> one JSON file

Lossless on any UTF-8: every byte is in the alphabet before training begins, so none can vanish.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsllama.data.documents import blocks, input_files, no_documents
from dsllama.errors import Problem, UserError, of_system
from dsllama.files import digest, write_atomically

SPECIAL_TOKENS = ["<SOS>", "<EOS>", "<PAD>", "<UNK>", "<SOU>", "<EOU>", "<SOA>", "<EOA>", "<SOT>", "<EOT>"]
_SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
# The trainer reserves memory for all of it.
_LARGEST_VOCABULARY = 10_000_000
# 8,192 merges hardly change beyond this much text, and the trainer holds every distinct word of it in memory.
_SAMPLE_BYTES = 128 * 2**20
# A run of so many letters, digits or signs is a blob, and the trainer's time grows with the square of its length:
# 27 s for one of 200,000 letters, which teach it nothing.
_BLOB_LETTERS = 2000
# As GPT-2's pattern splits: letters, digits, blanks, and all other signs.
_BLOB = re.compile("|".join(f"{run}{{{_BLOB_LETTERS},}}" for run in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s")))
_REMEDY = "train one with `dsllama tokenizer TEXT --out FILE`"


class Tokenizer:
    """Text to token ids and back. content: the file's text; fingerprint: its identity; vocab_size: number of ids."""

    def __init__(self, content: str, path: Path) -> None:
        self.path, self.content = path, content
        self.fingerprint = digest(json.loads(content))
        self.backend = tokenizers.Tokenizer.from_str(content)
        # A literal "<EOS>" in raw text is text, never the special id.
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size: int = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        added = self.backend.get_added_tokens_decoder().items()
        special = {token.content: number for number, token in added if token.special}
        self.sos_id: int = special["<SOS>"]
        self.eos_id: int = special["<EOS>"]

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a tokenizer's JSON file. Raises UserError if it is none, is no BPE, or lacks <SOS> or <EOS>."""
        path = Path(path)
        try:
            tokenizer = cls(path.read_text(encoding="utf-8"), path)
        except FileNotFoundError:
            raise _refused(path, "there is no such file") from None
        except OSError as error:
            raise UserError(of_system(error, "cannot be read", "tokenizer_path", value=str(path))) from None
        except KeyError as error:
            raise _refused(path, f"lacks the special token {error.args[0]}") from None
        except Exception as error:  # the library raises a bare Exception for whatever it cannot parse
            raise _refused(path, f"is not a tokenizer ({str(error)[:150]})") from None
        if not isinstance(tokenizer.backend.model, models.BPE):
            raise _refused(path, f"is a {type(tokenizer.backend.model).__name__} tokenizer, not BPE")
        if tokenizer.vocab_size > 2**31:
            raise _refused(path, f"has the id {tokenizer.vocab_size - 1:,}, beyond 31 bits")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing is added to it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, or None."""
        return self.backend.token_to_id(token)


def train_tokenizer(
    inputs: Sequence[str | Path],
    out: str | Path,
    vocab_size: int = 8192,
    text_field: str = "text",
    on_error: str = "stop",
    overwrite: bool = False,
) -> Tokenizer:
    """Train a byte-level BPE on raw text and save it to `out`, one JSON file that transformers opens as well.

    Of more than 128 MiB of text, a sample is used. A small text may give fewer merges than asked for: the result's
    vocab_size says. on_error: "stop" or "skip" bad input. Raises UserError for bad input and for an `out` that exists.
    """
    out = Path(out)
    problems = []
    if not _SMALLEST_VOCABULARY <= vocab_size <= _LARGEST_VOCABULARY:
        least = f"must be at least {_SMALLEST_VOCABULARY}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        rule = least if vocab_size < _SMALLEST_VOCABULARY else f"must be at most {_LARGEST_VOCABULARY:,}"
        remedy = "8192 is enough for a small model, 128K for a large one"
        problems.append(Problem("vocab_size", rule, remedy, vocab_size))
    if on_error not in ("stop", "skip"):
        problems.append(Problem("on_error", "must be 'stop' or 'skip'", "use 'stop' to see all of it", on_error))
    if out.exists() and any(out.samefile(text) for text in map(Path, inputs) if text.exists()):
        problems.append(Problem("--out", "is one of the inputs", "name another file", str(out)))
    elif out.is_dir():
        problems.append(Problem("--out", "is a folder", f"name a file, such as {out / 'tokenizer.json'}", str(out)))
    elif out.exists() and not out.is_file():
        problems.append(Problem("--out", "is no regular file", "name another file", str(out)))
    elif out.exists() and not overwrite:
        problems.append(Problem("--out", "exists already", "use --overwrite to replace it, or another name", str(out)))
    if problems:
        raise UserError(problems, "cannot train a tokenizer")
    files = input_files(inputs)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # What occurs once is no pattern, and would fill a small text's vocabulary with its longest words.
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(files, text_field, on_error), trainer)
    content = backend.to_str(pretty=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content)
    except OSError as error:
        problem = of_system(error, "cannot be written", "--out", "name another place", str(out))
        raise UserError(problem, "cannot train a tokenizer") from None
    return Tokenizer(content, out)


def _sample(files: list[Path], text_field: str, on_error: str) -> Iterator[str]:
    """Texts, about 128 MiB of them at most: whole blocks, spread evenly over the input. What is taken keeps pace with
    what was passed, measured on the disk, so that compressed files need no guess."""
    disk_bytes = sum(path.stat().st_size for path in files)
    passed = taken = 0
    skipped: Counter[str] = Counter()
    for block in blocks(files, text_field):
        passed += block.disk_bytes
        if taken * disk_bytes > passed * _SAMPLE_BYTES:
            continue
        found = block.read()
        if found.problems and on_error == "stop":
            raise UserError(found.problems, "cannot train a tokenizer")
        skipped.update(found.skipped)
        for document in found.documents:
            taken += len(document.text.encode())
            yield _without_blobs(document.text)
    if not taken:
        raise no_documents(files, skipped)


def _without_blobs(text: str) -> str:
    # A plain look first: it is ten times as fast as the pattern, and nearly always enough.
    step = _BLOB_LETTERS // 2
    may_have_one = max(map(len, text.split()), default=0) >= _BLOB_LETTERS or any(
        text[place : place + step].isspace() for place in range(0, len(text), step)
    )
    return _BLOB.sub(" ", text) if may_have_one else text


def _refused(path: Path, rule: str) -> UserError:
    return UserError(Problem("tokenizer_path", rule, _REMEDY, str(path)))
