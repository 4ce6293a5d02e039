"""What is swapped to a disk comes back as it was, from any address; a disk that fails ends the run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsllama.errors import UserError
from dsllama.training import disk
from dsllama.training.disk import DiskHandle


@pytest.mark.parametrize("numel", [1, 256, 1000, 2**20 + 3, 3 * 2**20])
@pytest.mark.parametrize("shift", [0, 1, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_comes_back_at_any_address(tmp_path: Path, numel: int, shift: int, dtype: torch.dtype) -> None:
    handle, path = DiskHandle(block_size=1), str(tmp_path / "a.swp")
    data = torch.randn(numel + shift).to(dtype)[shift:]
    assert handle.async_pwrite(data, path) == 0 and handle.wait() == 1
    found = torch.zeros(numel + shift + 1, dtype=dtype)
    assert handle.async_pread(found[shift : shift + numel], path) == 0 and handle.wait() == 1
    assert torch.equal(found[shift : shift + numel], data)
    assert not found[:shift].any() and found[-1] == 0


def test_several_at_once_are_counted_and_pinned_memory_is_known(tmp_path: Path) -> None:
    handle = DiskHandle()
    locked = handle.new_cpu_locked_tensor(5000, torch.zeros(1))
    assert handle.is_pinned(locked[100:200]) and not handle.is_pinned(torch.zeros(5))
    locked.copy_(torch.arange(5000))
    for number in range(3):
        handle.async_pwrite(locked[number * 1024 : number * 1024 + 1024], str(tmp_path / f"{number}"))
    assert handle.wait() == 3 and handle.wait() == 0
    found = torch.zeros(1024)
    handle.async_pread(found, str(tmp_path / "2"))
    assert handle.wait() == 1 and torch.equal(found, torch.arange(2048.0, 3072.0))
    assert handle.free_cpu_locked_tensor(locked) and not handle.free_cpu_locked_tensor(locked)


def test_a_file_that_is_short_or_gone_is_named(tmp_path: Path) -> None:
    handle, path = DiskHandle(), tmp_path / "a.swp"
    with pytest.raises(UserError, match=r"a.swp.* is gone"):
        handle.async_pread(torch.zeros(10), str(path))
    path.write_bytes(bytes(4096))
    handle.async_pread(torch.zeros(2 * 4096), str(path))
    with pytest.raises(UserError, match="it is shorter than it was"):
        handle.wait()
    with pytest.raises(UserError, match="is gone"):
        handle.async_pwrite(torch.zeros(10), str(tmp_path / "no folder" / "a"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file system of 16 MB in a file: (where it is mounted, the file)."""
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    image.write_bytes(bytes(2**24))
    made = ["mkfs.ext4", "-q", "-F", str(image)], ["mount", "-o", "loop", str(image), str(mounted)]
    for command in made:
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs a loop device: {error}")
    yield mounted, image
    subprocess.run(["umount", "-l", str(mounted)], check=False)


def test_a_disk_that_is_full_or_fails_is_named(small_disk: tuple[Path, Path]) -> None:
    mounted, image = small_disk
    handle, path = DiskHandle(), mounted / "a.swp"
    with pytest.raises(UserError, match=r"took no 268 MB more \(No space left on device\)"):
        handle.async_pwrite(torch.zeros(2**26), str(mounted / "large.swp"))
    handle.async_pwrite(torch.ones(2**20), str(path))
    handle.wait()
    os.truncate(image, 2**20)  # every access beyond is an I/O error from now on
    found = torch.zeros(2**20)
    handle.async_pread(found, str(path))
    with pytest.raises(UserError, match=r"a.swp.* could not be read or written \(Input/output error\)"):
        handle.wait()


def test_what_was_moved_is_counted(tmp_path: Path) -> None:
    before, handle = dict(disk.moved), DiskHandle()
    handle.async_pwrite(torch.zeros(1000), str(tmp_path / "a"))
    handle.wait()
    assert disk.moved["written"] - before["written"] == 4000 and disk.moved["read"] == before["read"]
