"""Several hosts on one machine: network namespaces on a bridge, each with its name, its processes and its own sshd.

    with Hosts(folder, ["alpha", "beta"]) as hosts:
        hosts.run("alpha", "dsllama", "doctor", "--hostfile", hosts.hostfile())

Files are shared, as over NFS; clocks are the same. Needs root, iproute2, openssh-server and pdsh; see `why_not`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import PATIENCE, REPOSITORY, environment

SSHD = "/usr/sbin/sshd"


def why_not() -> str:
    """What keeps this machine from having several hosts; empty where nothing does."""
    lacking = [name for name in ("ip", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter") if shutil.which(name) is None]
    lacking += [] if Path(SSHD).exists() else ["sshd"]
    if lacking:
        return f"several hosts need {', '.join(lacking)} (apt-get install iproute2 openssh-server pdsh)"
    if os.geteuid() != 0:
        return "several hosts need root"
    name = f"dsl{os.getpid()}probe"
    needed = [
        f"ip netns add {name}",
        f"ip -n {name} link add br0 type bridge",
        f"ip -n {name} link add one type veth peer two",
        f"ip netns exec {name} unshare --uts --pid --mount --fork --mount-proc --kill-child true",
    ]
    try:
        for command in needed:
            made = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if made.returncode:
                return f"several hosts need network namespaces: {command}: {made.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return ""


class Hosts:
    """The hosts, from the beginning of a `with` to its end. names: of hosts. folder: for keys and settings."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)
        self._prefix = f"dsl{os.getpid()}"
        self._switch = f"{self._prefix}sw"
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._inits: dict[str, int] = {}

    def __enter__(self) -> Hosts:
        folder = self.folder
        (folder / "bin").mkdir(parents=True)
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key")
        known = []
        for number, name in enumerate(self.names):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / f"host_{name}")
            key = (folder / f"host_{name}.pub").read_text().split()[:2]
            known.append(" ".join([f"{name},{_address(number)}", *key]))
        (folder / "known_hosts").write_text("\n".join(known) + "\n")
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/key\nUserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile /dev/null\n"
            "User root\nLogLevel ERROR\n"
        )
        wrapper = folder / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        _do("ip", "netns", "add", self._switch)
        _do("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _do("ip", "-n", self._switch, "link", "set", "br0", "up")
        lines = ["127.0.0.1 localhost", *(f"{_address(n)} {name}" for n, name in enumerate(self.names))]
        for number, name in enumerate(self.names):
            space = self._space(name)
            own = Path("/etc/netns") / space
            own.mkdir(parents=True)
            (own / "hosts").write_text("\n".join(lines) + "\n")
            _do("ip", "netns", "add", space)
            _do("ip", "-n", self._switch, "link", "add", f"h{number}", "type", "veth", "peer", "eth0", "netns", space)
            _do("ip", "-n", self._switch, "link", "set", f"h{number}", "master", "br0", "up")
            _do("ip", "-n", space, "addr", "add", f"{_address(number)}/24", "dev", "eth0")
            _do("ip", "-n", space, "link", "set", "eth0", "up")
            _do("ip", "-n", space, "link", "set", "lo", "up")
            self.boot(name)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self.crash(name)
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / self._space(name), ignore_errors=True)
        subprocess.run(["ip", "netns", "del", self._switch], capture_output=True, check=False)

    def boot(self, name: str, below: str = "", keys: str = "key.pub", **environment: str) -> None:
        """Start a host: its sshd, which all of its processes descend from. below: a command that sshd runs under.
        keys: whom it lets in. environment: of every login."""
        settings = self.folder / f"sshd_{name}"
        settings.write_text(
            f"HostKey {self.folder}/host_{name}\nAuthorizedKeysFile {self.folder}/{keys}\nStrictModes no\nUsePAM no\n"
            f"UseDNS no\nPermitRootLogin yes\nPidFile none\nMaxStartups 100\n"
            # Of several such lines sshd takes the first.
            + (
                " ".join(["SetEnv", *(f"{variable}={value}" for variable, value in environment.items())])
                if environment
                else ""
            )
        )
        script = f"hostname {name}; mkdir -p /run/sshd; exec {below} {SSHD} -D -e -f {settings}"
        log = (self.folder / f"sshd_{name}.log").open("wb")
        started = subprocess.Popen(
            ["ip", "netns", "exec", self._space(name), "unshare", "--uts", "--pid", "--mount", "--fork",
             "--mount-proc", "--kill-child", "sh", "-c", script],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        self._started[name] = started
        deadline = time.monotonic() + PATIENCE
        while True:
            assert started.poll() is None and time.monotonic() < deadline, (
                self.folder / f"sshd_{name}.log"
            ).read_text()
            with contextlib.suppress(psutil.Error):
                found = [p for p in psutil.Process(started.pid).children(recursive=True) if "sshd" in p.cmdline()[0]]
                if found:
                    self._inits[name] = found[0].pid
                    break
            time.sleep(0.02)
        while b"Server listening" not in (self.folder / f"sshd_{name}.log").read_bytes():
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def crash(self, name: str) -> None:
        """All processes of a host are gone at once."""
        started = self._started.pop(name, None)
        if started is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._inits[name], signal.SIGKILL)  # the first of its process namespace
            started.kill()
            started.wait()

    def link(self, name: str, state: str) -> None:
        """Its cable: "up" or "down"."""
        _do("ip", "-n", self._switch, "link", "set", f"h{self.names.index(name)}", state)

    def command(self, name: str, *words: Any) -> list[str]:
        """A command as it is typed on that host."""
        return ["nsenter", "-t", str(self._inits[name]), "-n", "-u", "-p", "-m", "--", *map(str, words)]

    def environment(self) -> dict[str, str]:
        """With our ssh first on the path."""
        found = environment()
        return {**found, "PATH": f"{self.folder / 'bin'}{os.pathsep}{found['PATH']}"}

    def start(self, name: str, *words: Any) -> subprocess.Popen[str]:
        """The same, in a terminal of its own."""
        return subprocess.Popen(
            self.command(name, *words), cwd=REPOSITORY, env=self.environment(), text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, name: str, *words: Any) -> subprocess.CompletedProcess[str]:
        """The same, to its end; all that it says is in .stdout."""
        process = self.start(name, *words)
        said, _ = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(list(words), process.returncode, said, "")

    def do(self, name: str, *words: Any) -> str:
        """Something small on that host; what it says."""
        return _do(*self.command(name, *words))

    def hostfile(self, *names: str, slots: int = 1) -> Path:
        """One that names these hosts, or all."""
        path = self.folder / f"hostfile_{'_'.join(names)}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in names or self.names))
        return path

    def _space(self, name: str) -> str:
        return f"{self._prefix}{name}"


def _address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def _do(*words: Any) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


DSLLAMA = Path(sys.executable).with_name("dsllama")
