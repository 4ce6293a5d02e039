"""The shards of a data set as one long stream of token ids.

    folder -> list of shards (manifest, or all *.npy by name) -> headers and samples checked -> prefix sums -> read

A shard is a one-dimensional `.npy` file. Shards are memory-mapped, never loaded, and only the last few in use
are kept open, so a data set may have many thousand of them. Opening costs a few dozen small reads per shard at most.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt

from dsllama.data.manifest import Manifest
from dsllama.data.manifest import Shard as ManifestShard
from dsllama.errors import Problem, UserError
from dsllama.files import digest

TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")

# Readers of a `.npy` file's header by its format; 3.0 is only for named fields.
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_OPEN_SHARDS = 128  # each open map holds a file descriptor, and 1,024 of them is a common limit
_SAMPLE_TOKENS = 1024
_SAMPLES = 1024  # blocks sampled over the whole data set, so that opening stays cheap on a network disk

_TITLE = "the data set cannot be used"
_ENCODE = "encode the texts with `dsllama encode`"
_REPLACE = "encode or copy this file again"


class TokenStream:
    """All shards of a folder, end to end.

    dataset_dir: folder with `.npy` shards. With a `manifest.json` its list of shards is the stream, and every
    shard must be as it says; without one, all `*.npy` files sorted by name.
    vocab_size: ids must lie below it; None takes the manifest's, or checks only that none is negative. Ids are
    checked on samples of each shard here, and on every batch by the DatasetLoader.
    Attributes: tokens (length of the stream), dtype, vocab_size, and fingerprint, the identity of the content:
    the manifest's, or else one of the shards' lengths, dtype and sampled bytes, whatever the files are called.
    Raises UserError with everything that is wrong with the folder.
    """

    def __init__(self, dataset_dir: str | Path, vocab_size: int | None = None):
        self.dataset_dir = Path(dataset_dir)
        if not self.dataset_dir.is_dir():
            rule = "is not a folder" if self.dataset_dir.exists() else "there is no such folder"
            raise UserError(Problem("dataset_dir", rule, _ENCODE, str(dataset_dir)), _TITLE)
        self.manifest = Manifest.load(self.dataset_dir)
        listed = _list_shards(self.dataset_dir, self.manifest)
        problems = []
        self.vocab_size = self.manifest.vocab_size if vocab_size is None and self.manifest else vocab_size
        if self.manifest and self.vocab_size is not None and self.manifest.vocab_size > self.vocab_size:
            rule = f"was encoded with a vocabulary of {self.manifest.vocab_size:,}; the model's is {self.vocab_size:,}"
            remedy = "take the tokenizer that encoded it, or encode again"
            problems.append(Problem("dataset_dir", rule, remedy, str(dataset_dir)))

        samples_per_shard = min(32, max(2, _SAMPLES // len(listed)))
        samples = []
        self._shards: list[_Shard] = []
        for path, expected in listed:
            try:
                shard = _open_shard(path, expected, self.manifest)
                self._shards.append(shard)
                samples.append(_sample(shard, samples_per_shard, self.vocab_size))
            except UserError as error:
                problems += error.problems
        by_dtype = defaultdict(list)
        for shard in self._shards:
            by_dtype[shard.dtype].append(shard.path.name)
        if len(by_dtype) > 1:
            found = ", ".join(f"{dtype} in {len(names)} such as {names[0]}" for dtype, names in by_dtype.items())
            rule = f"its shards must have one dtype, and have {found}"
            problems.append(Problem("dataset_dir", rule, "encode them together", str(dataset_dir)))
        if problems:
            raise UserError(problems, _TITLE)

        self.dtype = self._shards[0].dtype
        *self._starts, self.tokens = accumulate((shard.tokens for shard in self._shards), initial=0)
        lengths = [shard.tokens for shard in self._shards]
        self.fingerprint = self.manifest.fingerprint if self.manifest else digest([self.dtype.str, lengths, samples])
        # A partial of a plain function, not a method: a cache that held the stream would keep it alive.
        self._map = lru_cache(maxsize=_OPEN_SHARDS)(partial(_map_shard, self._shards))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens [start, stop) of the stream, in the shards' dtype, shape (stop - start,); read only.

        Within one shard it is a view on the file and nothing is copied; across a border the parts are joined.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.tokens}")
        shard = bisect_right(self._starts, start) - 1
        offset = start - self._starts[shard]
        piece = self._map(shard)[offset : offset + stop - start]
        if len(piece) == stop - start:
            return piece
        # Copied shard by shard: a list of views would keep every one of these shards open.
        tokens = np.empty(stop - start, self.dtype)
        filled = 0
        while filled < len(tokens):
            piece = self._map(shard)[offset : offset + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            filled, shard, offset = filled + len(piece), shard + 1, 0
        return tokens

    def locate(self, position: int) -> tuple[Path, int]:
        """The file that holds a token of the stream, and which of its tokens it is (from 0)."""
        shard = bisect_right(self._starts, position) - 1
        return self._shards[shard].path, position - self._starts[shard]

    def vocabulary_problem(self, position: int) -> Problem:
        """What is wrong with the token at this position, which is outside the vocabulary."""
        path, offset = self.locate(position)
        return _outside_problem(path, offset, int(self.read(position, position + 1)[0]), self.vocab_size)


@dataclass(frozen=True)
class _Shard:
    """offset: bytes of header before the first token."""

    path: Path
    dtype: np.dtype[Any]
    tokens: int
    offset: int


def _list_shards(folder: Path, manifest: Manifest | None) -> list[tuple[Path, ManifestShard | None]]:
    """The files of the stream in order, each with what the manifest says of it."""
    listed: list[tuple[Path, ManifestShard | None]]
    if manifest and manifest.resume is not None:
        rule = f"was not encoded to its end: {len(manifest.shards)} shards are finished"
        remedy = "run the same `dsllama encode` again; or delete manifest.json, to take the shards as they are"
        raise UserError(Problem("dataset_dir", rule, remedy, str(folder)), _TITLE)
    if manifest:
        listed = [(folder / shard.file, shard) for shard in manifest.shards]
        rule = "its manifest lists no shards"
    else:
        # As in a shell's *.npy, names with a leading dot are left out: file managers put their own files there.
        listed = [(path, None) for path in sorted(folder.glob("[!.]*.npy")) if not path.is_dir()]
        rule = "holds no .npy files"
    if not listed:
        raise UserError(Problem("dataset_dir", rule, _ENCODE, str(folder)), _TITLE)
    return listed


def _open_shard(path: Path, expected: ManifestShard | None, manifest: Manifest | None) -> _Shard:
    """The shard's header, checked against the file's size and the manifest; nothing else is read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            version = npy.read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"format version {version[0]}.{version[1]}")
            shape, _, dtype = _HEADERS[version](file)
            offset = file.tell()
    except FileNotFoundError:
        rule = "is in the manifest but not in the folder" if expected else "is a link to a file that does not exist"
        raise UserError(Problem(str(path), rule, _REPLACE)) from None
    except OSError as error:
        raise UserError(Problem(str(path), f"cannot be read ({error.strerror})", "make it readable")) from None
    except (ValueError, SyntaxError, TokenError) as error:
        rule = "is empty (0 bytes)" if size == 0 else f"is not a .npy file ({error})"
        raise UserError(Problem(str(path), rule, _REPLACE)) from None

    problems: list[Problem] = []
    tokens = math.prod(shape)
    if dtype.hasobject:
        rule = "holds Python objects, which are never loaded"
        problems.append(Problem(str(path), rule, "save it as an array of uint16"))
    elif dtype.name not in TOKEN_DTYPES:
        rule = f"holds {dtype}; token ids are {', '.join(TOKEN_DTYPES)}"
        problems.append(Problem(str(path), rule, "convert it without rounding, or encode again"))
    if len(shape) != 1:
        problems.append(Problem(str(path), f"has shape {shape}; it must have one dimension", "save array.reshape(-1)"))
    elif tokens < 1:
        problems.append(Problem(str(path), "holds no tokens", "delete it, or encode again"))
    if not dtype.hasobject and size != (needed := offset + tokens * dtype.itemsize):
        what = "is truncated" if size < needed else "goes on after its array"
        rule = f"{what}: {size:,} bytes where its header says {needed:,}"
        problems.append(Problem(str(path), rule, _REPLACE))
    if expected and manifest and (tokens, dtype.name) != (expected.tokens, manifest.dtype):
        rule = f"holds {tokens:,} tokens of {dtype}; its manifest says {expected.tokens:,} of {manifest.dtype}"
        problems.append(Problem(str(path), rule, _REPLACE))
    if problems:
        raise UserError(problems)
    return _Shard(path, dtype, tokens, offset)


def _sample(shard: _Shard, blocks: int, vocab_size: int | None) -> str:
    """Digest of `blocks` blocks spread evenly from the shard's first token to its last; all of a short shard.

    UserError if one of the ids in them is outside the vocabulary.
    """
    if shard.tokens <= blocks * _SAMPLE_TOKENS:
        starts, length = [0], shard.tokens
    else:
        starts, length = [n * (shard.tokens - _SAMPLE_TOKENS) // (blocks - 1) for n in range(blocks)], _SAMPLE_TOKENS
    contents = hashlib.sha256()
    with shard.path.open("rb", buffering=0) as file:
        for start in starts:
            file.seek(shard.offset + start * shard.dtype.itemsize)
            content = file.read(length * shard.dtype.itemsize)
            contents.update(content)
            tokens = np.frombuffer(content, shard.dtype)
            if (outside := outside_vocabulary(tokens, vocab_size)) is not None:
                first = int(outside.argmax())
                raise UserError(_outside_problem(shard.path, start + first, int(tokens[first]), vocab_size))
    return contents.hexdigest()


def outside_vocabulary(tokens: npt.NDArray[Any], vocab_size: int | None) -> npt.NDArray[np.bool_] | None:
    """Where ids are negative or not below vocab_size; None if nowhere, which costs one pass for the maximum."""
    # Seen as unsigned, a negative id is a huge one, so that one comparison finds both.
    bits = tokens.view(tokens.dtype.str.replace("i", "u"))
    limit = vocab_size if vocab_size is not None else 2 ** (8 * tokens.dtype.itemsize - (tokens.dtype.kind == "i"))
    return bits >= limit if bits.max() >= limit else None


def _outside_problem(path: Path, offset: int, token: int, vocab_size: int | None) -> Problem:
    rule = "outside the vocabulary" + ("" if vocab_size is None else f" (0 to {vocab_size - 1:,})")
    remedy = "train with the tokenizer that encoded it, or encode it again with this one"
    return Problem(str(path), f"token {offset:,} of the file is {token:,}, {rule}", remedy)


def _map_shard(shards: list[_Shard], number: int) -> npt.NDArray[Any]:
    """A read-only view on the shard's tokens, as a plain array: slicing np.memmap itself is slow."""
    shard = shards[number]
    try:
        return np.asarray(np.memmap(shard.path, shard.dtype, "r", shard.offset, (shard.tokens,)))
    except (OSError, ValueError) as error:
        rule = f"can no longer be read as it was when the data set was opened ({error})"
        raise UserError(Problem(str(shard.path), rule, "restore it, and resume"), _TITLE) from error
