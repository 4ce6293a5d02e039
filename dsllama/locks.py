"""One run at a time: who holds a folder or a file, and whether that run still exists.

A lock file holds its owner's name and is locked (flock) as long as the owner lives: among the processes of one machine
the kernel says who is alive, and forgets the dead. Between machines flock may not reach (some mounts of NFS and
Lustre). So the owner also counts up in the file, every few seconds; whoever comes upon the name of another machine's
process that was not taken out again watches the count, and takes the lock only if it stands still. No clocks are
compared. A run that was taken for dead and wakes up finds another name in the file, and must not publish anything then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsllama.errors import Problem, UserError, of_system
from dsllama.sizes import readable_duration

# The owner counts this often; a count that stands still for so long belongs to a dead process.
_BEAT_SECONDS, _WATCH_SECONDS = 5.0, 30.0


class Hold(contextlib.AbstractContextManager["Hold", None]):
    """A lock file that this process holds until `release`, or its end."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "since": time.time(),
            "token": uuid.uuid4().hex,
        }
        self._ended = threading.Event()
        self._write(0)
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the next one have it."""
        self._ended.set()
        self._thread.join(_BEAT_SECONDS)
        with contextlib.suppress(OSError):
            if not self.lost_to():
                os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def lost_to(self) -> str:
        """Who has taken it since, because this process seemed to be dead; empty where nobody has.

        Raises FileNotFoundError where the lock file is gone, with the folder that it was in: unmounted, or moved away.
        """
        owner = _owner(self.path)
        if owner is None and not self.path.exists():
            raise FileNotFoundError(errno.ENOENT, "it has vanished, or another is in its place", str(self.path.parent))
        if owner is None:
            return "a run that has ended since"
        return "" if owner["token"] == self._owner["token"] else _described(owner)

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(_BEAT_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # a disk that is full or gone: whoever saves will say so
                if self.lost_to():
                    return
                self._write(count)

    def _write(self, count: int) -> None:
        content = json.dumps({**self._owner, "count": count}).encode()
        os.pwrite(self._descriptor, content + b"\n", 0)
        os.fsync(self._descriptor)


def hold(path: Path, where: str, value: str, remedy: str) -> Hold:
    """Take a lock file. where, value: the field that it stands for, for the message. Raises UserError that names the
    owner, where there is one that lives; watches for half a minute where only that can tell."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(of_system(error)) from None
    try:
        owner = _owner(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alive = True
        except OSError:  # a file system without locks
            alive = owner is not None and _still_counts(path, owner)
        else:
            # On this machine the lock would have said it.
            alive = owner is not None and owner["machine"] != _machine() and _still_counts(path, owner)
        if alive:
            rule = "is in use by another run" + (f": {_described(owner)}" if owner else "")
            raise UserError(Problem(where, rule, remedy, value or None))
        os.ftruncate(descriptor, 0)
        return Hold(path, descriptor)
    except (OSError, UserError) as error:
        os.close(descriptor)
        if isinstance(error, UserError):
            raise
        raise UserError(of_system(error) if error.filename else Problem(where, str(error), remedy, value)) from None


def is_held(path: Path) -> bool:
    """Whether a lock file names an owner who, as far as can be told at once, lives: another machine's may be dead."""
    owner = _owner(path)
    if owner is None or owner["machine"] != _machine():
        return owner is not None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def locked(folder: Path, title: str) -> Iterator[None]:
    """Hold a folder, among the processes of this machine. Raises UserError (`title`) where another one writes to it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = Problem(str(folder), "is being written by another process", "wait for it, or stop it")
            raise UserError(problem, title) from None
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(handle)


def _still_counts(path: Path, owner: dict[str, Any]) -> bool:
    """Watch whether a lock file's owner counts up. Nobody else may be asked: it is another machine's."""
    held = f"{path} is held by {_described(owner)}"
    print(f"{held}; looking for {_WATCH_SECONDS:.0f} s whether that run still exists", file=sys.stderr, flush=True)
    end = time.monotonic() + _WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(0.5)
        now = _owner(path)
        if now is None or (now["token"], now["count"]) != (owner["token"], owner["count"]):
            return now is not None
    return False


def _owner(path: Path) -> dict[str, Any] | None:
    """Whom a lock file names; None where it names nobody. It is opened anew: NFS looks at the server only then."""
    for _ in range(3):
        try:
            text = path.read_text(encoding="utf-8")
            owner = json.loads(text) if text else {}
            return owner if {"host", "pid", "machine", "since", "token", "count"} <= owner.keys() else None
        except ValueError:
            time.sleep(0.1)  # it may be about to be written
        except (OSError, AttributeError):
            break
    return None


def _described(owner: dict[str, Any]) -> str:
    age = readable_duration(max(0.0, time.time() - float(owner["since"])))
    return f"process {owner['pid']} on {owner['host']}, for {age}"


def _machine() -> str:
    """This running kernel: containers of one machine share it, a machine that has booted again is another one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
