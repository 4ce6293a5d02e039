"""Tensors to and from files on NVMe, for DeepSpeed's swapping, in place of its compiled async_io.

That looks at no result: a read into memory that the disk's direct I/O does not take (a gradient behind a norm of an
odd size) leaves what was there, and so does a disk that fails. Python's preadv and pwritev, on threads that they run
beside, are as fast as the disk in pieces of this size, and need no compiler.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsllama.errors import Problem, UserError
from dsllama.sizes import readable_bytes

# Direct I/O wants addresses, lengths and places in a file in multiples of a disk's block: 512 or 4,096.
_BLOCK, _PIECE, _THREADS = 4096, 4 * 2**20, 8
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux's only
# What this process has read and written below nvme_path, in bytes, and how long it has waited for that.
moved = {"read": 0, "written": 0, "seconds": 0.0}


class DiskHandle:
    """Stands for DeepSpeed's aio_handle: `async_pread` and `async_pwrite` begin, `wait` ends all that have begun and
    says how many those were. Raises UserError where a disk is full, a file short or gone, or the disk fails."""

    _threads: ClassVar[ThreadPoolExecutor | None] = None
    _pinned: ClassVar[dict[int, int]] = {}  # address -> bytes, of all handles

    def __init__(self, **_settings: Any) -> None:
        self._begun: list[tuple[str, int, list[Future[None]]]] = []

    def async_pread(self, buffer: Tensor, path: str, offset: int = 0) -> int:
        """Begin to fill a tensor on the CPU with a file's bytes from `offset`, a multiple of 4,096."""
        moved["read"] += buffer.nbytes
        return self._begin(buffer, path, offset, os.O_RDONLY)

    def async_pwrite(self, buffer: Tensor, path: str, offset: int = 0) -> int:
        """Begin to write a tensor on the CPU to a file. All its room is taken at first, so that none lacks later."""
        moved["written"] += buffer.nbytes
        return self._begin(buffer, path, offset, os.O_WRONLY | os.O_CREAT)

    def wait(self) -> int:
        """Until all that was begun with this handle is done; how many."""
        began, begun = time.perf_counter(), self._begun
        failures: list[UserError] = []
        self._begun = []
        for path, descriptor, pieces in begun:
            for piece in pieces:
                try:
                    piece.result()
                except OSError as error:
                    failures.append(_failed(path, f"could not be read or written ({error.strerror})"))
            os.close(descriptor)
        moved["seconds"] += time.perf_counter() - began
        if failures:
            raise failures[0]
        return len(begun)

    def new_cpu_locked_tensor(self, numel: int, example: Tensor) -> Tensor:
        """A tensor for transfers: it begins at a page, and is page-locked for a GPU where there is one."""
        memory = mmap.mmap(-1, max(numel * example.element_size(), 1))
        tensor = torch.frombuffer(memory, dtype=example.dtype, count=numel)
        if torch.cuda.is_available():  # where it may not be locked, copies are slower and right
            torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        self._pinned[tensor.data_ptr()] = tensor.nbytes
        return tensor

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """Unlock it; its memory goes with its last reference."""
        known = self._pinned.pop(tensor.data_ptr(), None) is not None
        if known and torch.cuda.is_available():
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        return known

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether it is (a part of) one of those, or of torch's own."""
        at = tensor.data_ptr()
        return any(start <= at < start + size for start, size in self._pinned.items()) or tensor.is_pinned()

    def _begin(self, buffer: Tensor, path: str, offset: int, mode: int) -> int:
        if offset % _BLOCK or not buffer.is_contiguous() or buffer.device.type != "cpu":
            raise ValueError("only whole tensors on the CPU, at multiples of 4,096 bytes")
        try:
            descriptor = os.open(path, mode | _DIRECT, 0o600)
        except FileNotFoundError:
            raise _failed(path, "is gone, which it is where another rank has ended") from None
        except OSError as error:
            raise _failed(path, f"cannot be opened ({error.strerror})") from None
        size = -(-(offset + buffer.nbytes) // _BLOCK) * _BLOCK
        if mode != os.O_RDONLY and (before := os.fstat(descriptor).st_size) < size:
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                os.ftruncate(descriptor, before)
                os.close(descriptor)
                raise _failed(path, f"took no {readable_bytes(size)} more ({error.strerror})") from None
        if DiskHandle._threads is None:
            DiskHandle._threads = ThreadPoolExecutor(_THREADS, "dsllama-disk")
        view = memoryview(buffer.detach().view(-1).view(torch.uint8).numpy())
        move, starts = _read if mode == os.O_RDONLY else _write, range(0, len(view), _PIECE)
        pieces = [DiskHandle._threads.submit(move, descriptor, view[at : at + _PIECE], offset + at) for at in starts]
        self._begun.append((path, descriptor, pieces))
        return 0


class Module:
    """What DeepSpeed loads instead of async_io."""

    aio_handle = DiskHandle


def install() -> None:
    """Let DeepSpeed swap with it, in this process."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder.load = lambda self, verbose=True: Module
    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True


def _read(descriptor: int, into: memoryview, at: int) -> None:
    if _is_aligned(into):
        _all(os.preadv, descriptor, into, at)
        return
    bounce = _bounce(len(into))
    _all(os.preadv, descriptor, bounce, at)
    into[:] = bounce[: len(into)]


def _write(descriptor: int, data: memoryview, at: int) -> None:
    if not _is_aligned(data):
        bounce = _bounce(len(data))
        bounce[: len(data)] = data
        data = bounce
    _all(os.pwritev, descriptor, data, at)


def _all(move: Any, descriptor: int, view: memoryview, at: int) -> None:
    """Raises OSError, also where a file ends early."""
    done = 0
    while done < len(view):
        count = move(descriptor, [view[done:]], at + done)
        if count <= 0:
            raise OSError(errno.EIO, "it is shorter than it was")
        done += count


def _is_aligned(view: memoryview) -> bool:
    if view.readonly:
        return False
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    return address % _BLOCK == 0 and len(view) % _BLOCK == 0


def _bounce(size: int) -> memoryview:
    """Memory at a page's beginning, of at least this size, in whole blocks."""
    return memoryview(mmap.mmap(-1, -(-size // _BLOCK) * _BLOCK))


def _failed(path: str, what: str) -> UserError:
    remedy = "mend that; the same command goes on from the newest checkpoint, which does not lie there"
    return UserError(Problem("nvme_path", f"{what} on {socket.gethostname()}", remedy, path), "the training stopped")
