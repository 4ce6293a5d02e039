"""Files of a checkpoint by name: fragments of fp32 tensors, written by each rank, read by anyone.

    weights_00000.safetensors     header: one F32 tensor a fragment, "parameter|weight"
                                  the fragments, `__blocks__` (U8, blocks x 32)
    optimizer_00000.safetensors   the same ranges, "parameter|exp_avg" and "parameter|exp_avg_sq", and what the rank
                                  keeps for itself (U8); whoever only wants weights needs none of it

A fragment is a range of a flattened parameter: all of it in the parameter's shape, or a part of it in one dimension;
where it begins is in the manifest and the header's metadata. `__blocks__` holds the sha256 of every 4 MiB of data, the
manifest the digests of header and table, so reading any range checks itself. Any reader of safetensors opens it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 4 * 2**20
KINDS = ("weight", "exp_avg", "exp_avg_sq")
MOMENTS = KINDS[1:]
TABLE = "__blocks__"
_DIGEST = 32
_BLOCKS_AHEAD = 8


@dataclass(frozen=True)
class Fragment:
    """Elements start ... start + numel of a flattened parameter, one of KINDS."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    numel: int


class DamagedFile(Exception):
    """A file is not as it was saved; the message names it, and the block and parameter where they are known."""


def file_names(rank: int) -> tuple[str, str]:
    """Of what a rank writes: of the weights, and of the moments of the same ranges."""
    return f"weights_{rank:05d}.safetensors", f"optimizer_{rank:05d}.safetensors"


# ---------------------------------------------------------------- writing


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with; its tensors' bytes follow in this order. tensors: name -> (type, shape)."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + _WIDTHS[dtype] * math.prod(shape)
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


_WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}


class Writer(contextlib.AbstractContextManager["Writer"]):
    """Writes a file: `add` each fragment's data in the order of `fragments`, then `finish`. Raises OSError.

    own: U8 tensors that belong to the rank and to no parameter (its random state).
    """

    def __init__(self, path: Path, fragments: list[Fragment], own: Mapping[str, Tensor] | None = None) -> None:
        self._own = own or {}
        self._starts = {fragment.name: [fragment.start, fragment.numel] for fragment in fragments}
        tensors = {
            f"{f.name}|{f.kind}": ("F32", f.shape if f.numel == math.prod(f.shape) else (f.numel,)) for f in fragments
        }
        tensors |= {name: ("U8", tuple(tensor.shape)) for name, tensor in self._own.items()}
        size = sum(_WIDTHS[dtype] * math.prod(shape) for dtype, shape in tensors.values())
        tensors[TABLE] = ("U8", (-(-size // BLOCK), _DIGEST))
        self._header = header(tensors, {"starts": json.dumps(self._starts)})
        self._digests = bytearray()
        self._buffer, self._filled = torch.empty(BLOCK, dtype=torch.uint8), 0
        self._file = path.open("wb", buffering=0)
        write_all(self._file.fileno(), self._header)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, data: Tensor) -> None:
        """The next fragment's elements, fp32 on any device; or several fragments' as bytes, without a further copy."""
        data = data.detach().contiguous().view(-1).view(torch.uint8)
        while data.numel():
            if not self._filled and data.numel() >= BLOCK and data.device.type == "cpu":
                self._write_block(data[:BLOCK])
                data = data[BLOCK:]
                continue
            part = data[: BLOCK - self._filled]
            self._buffer[self._filled : self._filled + part.numel()].copy_(part)  # from a GPU too
            self._filled += part.numel()
            data = data[part.numel() :]
            if self._filled == BLOCK:
                self._write_block(self._buffer)

    def finish(self) -> dict[str, Any]:
        """Wait until the disk has it; returns the file's entry for the manifest."""
        for tensor in self._own.values():
            self.add(tensor)
        if self._filled:
            self._write_block(self._buffer[: self._filled])
        table = bytes(self._digests)
        write_all(self._file.fileno(), table)
        os.fsync(self._file.fileno())
        size = os.fstat(self._file.fileno()).st_size
        digests = {"header": _sha256(self._header), "blocks": _sha256(table)}
        return {"bytes": size, **digests, "fragments": self._starts}

    def _write_block(self, block: Tensor) -> None:
        view = memoryview(block.numpy())
        self._digests += hashlib.sha256(view).digest()
        write_all(self._file.fileno(), view)
        self._filled = 0
        if len(self._digests) // _DIGEST % _BLOCKS_AHEAD == 0 and hasattr(os, "posix_fadvise"):
            # The disk begins at once, while the next blocks are hashed; what it has leaves the page cache to others.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it: os.write may take less."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------- reading


class StateFile:
    """One file, checked against its entry in the manifest: header and table at once, blocks as they are read. Raises
    DamagedFile."""

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise DamagedFile(f"{path.name} cannot be opened ({error.strerror})") from None
        try:
            self._open(entry)
        except DamagedFile:
            self.close()
            raise

    def _open(self, entry: dict[str, Any]) -> None:
        name, size = self.path.name, os.fstat(self._file.fileno()).st_size
        if size != entry["bytes"]:
            raise DamagedFile(f"{name} has {size} bytes instead of {entry['bytes']}")
        (length,) = struct.unpack("<Q", self._read_at(0, 8))
        text = self._read_at(0, min(8 + length, size))
        if _sha256(text) != entry["header"]:
            raise DamagedFile(f"{name} has another header than it was saved with")
        self.tensors: dict[str, Any] = json.loads(text[8:])
        del self.tensors["__metadata__"]
        self._base = len(text)
        self.data_end, end = self.tensors.pop(TABLE)["data_offsets"]
        table = self._read_at(self._base + self.data_end, end - self.data_end)
        if _sha256(table) != entry["blocks"]:
            raise DamagedFile(f"{name} has another table of blocks than it was saved with")
        self._digests = [table[at : at + _DIGEST] for at in range(0, len(table), _DIGEST)]
        self._number, self._block = -1, b""

    def close(self) -> None:
        self._file.close()

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, 1-D on any device, with a tensor's elements start ... (counted from its first)."""
        width = out.element_size()
        first = self.tensors[name]["data_offsets"][0] + start * width
        target = out if out.device.type == "cpu" and out.is_contiguous() else torch.empty_like(out, device="cpu")
        view = memoryview(target.detach().view(torch.uint8).numpy())
        done = 0
        while done < len(view):
            number, offset = divmod(first + done, BLOCK)
            part = self.block(number)[offset : offset + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)
        if target is not out:
            out.copy_(target)

    def block(self, number: int) -> memoryview:
        """A block's bytes, checked."""
        if number != self._number:
            at = number * BLOCK
            data = self._read_at(self._base + at, min(BLOCK, self.data_end - at))
            if hashlib.sha256(data).digest() != self._digests[number]:
                raise DamagedFile(f"{self.path.name} is damaged in block {number} ({self._parameters_in(number)})")
            self._number, self._block = number, data
        return memoryview(self._block)

    def damages(self) -> Iterator[str]:
        """Read all blocks; what is wrong with each that is damaged."""
        for number in range(len(self._digests)):
            try:
                self.block(number)
            except DamagedFile as error:
                yield str(error)

    def _parameters_in(self, number: int) -> str:
        low, high = number * BLOCK, (number + 1) * BLOCK
        names = [n for n, t in self.tensors.items() if t["data_offsets"][0] < high and t["data_offsets"][1] > low]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def _read_at(self, at: int, length: int) -> bytes:
        data = b""
        try:
            while len(data) < length and (more := os.pread(self._file.fileno(), length - len(data), at + len(data))):
                data += more
        except OSError as error:
            raise DamagedFile(f"{self.path.name} cannot be read ({error.strerror})") from None
        if len(data) < length:
            raise DamagedFile(f"{self.path.name} ends early")
        return data


class Source(contextlib.AbstractContextManager["Source"], Mapping[str, Tensor]):
    """Any range of any parameter of a checkpoint, whichever ranks wrote it; a mapping of all names to whole weights."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in manifest["parameters"].items()}
        self._shared: dict[str, str] = manifest["shared"]
        self._entries = {name: entry for name, entry in manifest["files"].items() if "blocks" in entry}
        self._where: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.shapes}
        for file, entry in self._entries.items():
            for name, (start, numel) in entry.get("fragments", {}).items():
                self._where[name].append((start, numel, file))
        for places in self._where.values():
            places.sort()
        self._files: dict[str, StateFile] = {}

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __getitem__(self, name: str) -> Tensor:
        return self.read(self._shared.get(name, name))

    def __iter__(self) -> Iterator[str]:
        return chain(self.shapes, self._shared)

    def __len__(self) -> int:
        return len(self.shapes) + len(self._shared)

    def read_into(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill `out`, 1-D fp32 on any device, with elements start ... of a parameter. Raises DamagedFile."""
        done, end = start, start + out.numel()
        for first, numel, file in self._where[name]:
            low, high = max(first, start), min(first + numel, end)
            if low >= high:
                continue
            if low != done:
                break
            holder = self.file(file if kind == "weight" else file.replace("weights_", "optimizer_"))
            holder.read_into(f"{name}|{kind}", low - first, out[low - start : high - start])
            done = high
        if done != end:
            raise DamagedFile(f"{self.folder.name} lacks elements {done} to {end - 1} of {name} ({kind})")

    def read(self, name: str, kind: str = "weight") -> Tensor:
        """A whole parameter in fp32, in its shape."""
        out = torch.empty(math.prod(self.shapes[name]), dtype=torch.float32)
        self.read_into(name, kind, 0, out)
        return out.view(self.shapes[name])

    def own(self, rank: int) -> Iterator[tuple[str, Tensor]]:
        """What a rank kept for itself."""
        _, name = file_names(rank)
        # Format 3 had everything in one file a rank.
        file = self.file(name if name in self._entries else name.replace("optimizer_", "state_"))
        for name, entry in file.tensors.items():
            if entry["dtype"] == "U8":
                out = torch.empty(math.prod(entry["shape"]), dtype=torch.uint8)
                file.read_into(name, 0, out)
                yield name, out

    def file(self, name: str) -> StateFile:
        """A file, opened and its header checked."""
        if name not in self._files:
            self._files[name] = StateFile(self.folder / name, self._entries[name])
        return self._files[name]
