"""Files of a checkpoint by name: fragments of fp32 tensors, written by each rank, read by anyone.

    state_00000.safetensors     header: one F32 tensor a fragment, "parameter|kind"
                                the fragments, what the rank keeps for itself (U8), `__blocks__` (U8, blocks x 32)

A fragment is a range of a flattened parameter: all of it in the parameter's shape, or a part of it in one dimension;
where it begins is in the manifest, and in the header's metadata. `__blocks__` holds the sha256 of every 4 MiB of what
lies between header and table. The manifest holds the digests of header and table, so reading any range checks itself.
Any reader of safetensors opens such a file; nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 4 * 2**20
KINDS = ("weight", "exp_avg", "exp_avg_sq")
TABLE = "__blocks__"
_DIGEST = 32


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


def file_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"state_{rank:05d}.safetensors"


# ---------------------------------------------------------------- writing


def write(path: Path, fragments: list[Fragment], data: Iterable[Tensor], own: dict[str, Tensor]) -> dict[str, Any]:
    """Write a file and wait until the disk has it; returns its entry for the manifest. Raises OSError.

    data: each fragment's elements, fp32 on any device, asked for one after the other. own: U8 tensors that belong to
    the rank and to no parameter (its random state).
    """
    starts: dict[str, list[int]] = {}
    tensors: dict[str, Any] = {}
    at = 0
    for fragment in fragments:
        whole = fragment.numel == math.prod(fragment.shape)
        shape = fragment.shape if whole else (fragment.numel,)
        at = _enter(tensors, f"{fragment.name}|{fragment.kind}", "F32", shape, at, 4)
        starts[fragment.name] = [fragment.start, fragment.numel]
    for name, tensor in own.items():
        at = _enter(tensors, name, "U8", tuple(tensor.shape), at, 1)
    _enter(tensors, TABLE, "U8", (-(-at // BLOCK), _DIGEST), at, 1)
    header = json.dumps({"__metadata__": {"starts": json.dumps(starts)}, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    header = struct.pack("<Q", len(header)) + header
    with path.open("wb", buffering=0) as file:
        blocks = _Blocks(file.fileno())
        _write_all(file.fileno(), header)
        for tensor in itertools.chain(data, own.values()):
            blocks.add(tensor)
        table = blocks.end()
        _write_all(file.fileno(), table)
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return {"bytes": size, "header": _sha256(header), "blocks": _sha256(table), "fragments": starts}


def _enter(tensors: dict[str, Any], name: str, dtype: str, shape: tuple[int, ...], at: int, width: int) -> int:
    end = at + width * math.prod(shape)
    tensors[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
    return end


class _Blocks:
    """Collects bytes to blocks, writes each and keeps its digest."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.digests = descriptor, bytearray()
        self.buffer, self.filled = torch.empty(BLOCK, dtype=torch.uint8), 0

    def add(self, tensor: Tensor) -> None:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        while data.numel():
            part = data[: BLOCK - self.filled]
            self.buffer[self.filled : self.filled + part.numel()].copy_(part)  # from a GPU too
            self.filled += part.numel()
            data = data[part.numel() :]
            if self.filled == BLOCK:
                self._flush()

    def end(self) -> bytes:
        if self.filled:
            self._flush()
        return bytes(self.digests)

    def _flush(self) -> None:
        view = memoryview(self.buffer.numpy())[: self.filled]
        self.digests += hashlib.sha256(view).digest()
        _write_all(self.descriptor, view)
        self.filled = 0


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------- reading


class StateFile:
    """One file, checked against its entry in the manifest: header and table at once, blocks as they are read.

    Raises DamagedFile wherever it is not as it was saved.
    """

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise DamagedFile(f"{path.name} cannot be opened ({error.strerror})") from None
        size = os.fstat(self._file.fileno()).st_size
        if size != entry["bytes"]:
            raise DamagedFile(f"{path.name} has {size} bytes instead of {entry['bytes']}")
        length = self._read_at(0, 8)
        (length_of_text,) = struct.unpack("<Q", length)
        header = length + self._read_at(8, min(length_of_text, size - 8))
        if _sha256(header) != entry["header"]:
            raise DamagedFile(f"{path.name} has another header than it was saved with")
        self.tensors: dict[str, Any] = json.loads(header[8:])
        del self.tensors["__metadata__"]
        self._base = len(header)
        self.data_end, end = self.tensors.pop(TABLE)["data_offsets"]
        table = self._read_at(self._base + self.data_end, end - self.data_end)
        if _sha256(table) != entry["blocks"]:
            raise DamagedFile(f"{path.name} has another table of blocks than it was saved with")
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

    def check(self) -> None:
        """Read all blocks."""
        for number in range(len(self._digests)):
            self.block(number)

    def _parameters_in(self, number: int) -> str:
        low, high = number * BLOCK, (number + 1) * BLOCK
        names = [n for n, t in self.tensors.items() if t["data_offsets"][0] < high and t["data_offsets"][1] > low]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def _read_at(self, at: int, length: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), length, at)
            while len(data) < length:
                more = os.pread(self._file.fileno(), length - len(data), at + len(data))
                if not more:
                    raise DamagedFile(f"{self.path.name} ends early")
                data += more
        except OSError as error:
            raise DamagedFile(f"{self.path.name} cannot be read ({error.strerror})") from None
        return data


class Source:
    """Any range of any parameter of a checkpoint, whichever ranks wrote it. Opens only the files that are asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in manifest["parameters"].items()}
        self._entries = {name: entry for name, entry in manifest["files"].items() if "fragments" in entry}
        self._where: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.shapes}
        for file, entry in self._entries.items():
            for name, (start, numel) in entry["fragments"].items():
                self._where[name].append((start, numel, file))
        for places in self._where.values():
            places.sort()
        self._files: dict[str, StateFile] = {}

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_into(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill `out`, 1-D fp32 on any device, with elements start ... of a parameter. Raises DamagedFile."""
        end = done = start
        end += out.numel()
        for first, numel, file in self._where[name]:
            low, high = max(first, start), min(first + numel, end)
            if low >= high:
                continue
            if low != done:
                break
            self.file(file).read_into(f"{name}|{kind}", low - first, out[low - start : high - start])
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
        file = self.file(file_name(rank))
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


def problem_of(path: Path, entry: dict[str, Any]) -> str:
    """What is wrong with a file, every block of it read; empty where nothing is."""
    file = None
    try:
        file = StateFile(path, entry)
        file.check()
    except DamagedFile as error:
        return str(error)
    finally:
        with suppress(AttributeError):
            file.close()  # type: ignore[union-attr]
    return ""
