"""Hostfiles and filters mean what DeepSpeed takes them for, and what it misreads is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

from dsllama.cluster.hostfile import read_hostfile, select
from dsllama.errors import UserError

GOOD = "# the cluster\r\nnode1 slots=2\r\n\r\n  node-2.lan   slots=3  # the old one\r\n10.0.0.3 slots=1\r\n"


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "hosts"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"include": "node1"},
        {"include": "10.0.0.3@node1:1"},
        {"include": "node-2.lan:2,0"},
        {"exclude": "node1"},
        {"exclude": "node-2.lan:1@node1:0"},
        {"exclude": "node-2.lan:0,1,2"},
    ],
)
def test_hosts_and_filters_are_those_of_deepspeed(tmp_path: Path, filters: dict[str, str]) -> None:
    path = written(tmp_path, GOOD)
    theirs = parse_inclusion_exclusion(
        fetch_hostfile(str(path)), filters.get("include", ""), filters.get("exclude", "")
    )
    ours = select(read_hostfile(path), **filters)
    assert {name: sorted(slots) for name, slots in ours.items()} == {n: sorted(s) for n, s in theirs.items()}
    assert list(ours) == list(theirs)  # which is the order of the ranks


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "names no host"),
        ("# nobody\n", "names no host"),
        ("node1\n", "hosts:1 = 'node1': is not NAME slots=N"),
        ("node1 slots=8x\n", "is not NAME slots=N"),
        ("node1 slots = 8\n", "is not NAME slots=N"),
        ("node1 slots=-1\n", "is not NAME slots=N"),
        ("node1 slots=8 slots=2\n", "is not NAME slots=N"),
        ("node1 slots=0\n", "a host without a slot"),
        ("a slots=1\nb slots=1\na slots=2\n", "hosts:3: a stands in line 1 already"),
        ("[2001:db8::1] slots=1\n", "IPv6 address"),
        ("2001:db8::1 slots=1\n", "IPv6 address"),
        ("node1:2222 slots=1\n", "a name with a port"),
        ("root@node1 slots=1\n", "a name with a user"),
        ("-oProxyCommand=x slots=1\n", "is not the name of a host"),
        ("node[1-4] slots=1\n", "is not the name of a host"),
        ("a,b slots=1\n", "is not the name of a host"),
        ("localhost slots=1\nb slots=1\n", "another machine on each"),
        (b"\xef\xbb\xbfnode1 slots=1\n", "byte order mark"),
        (b"node1 slots=1\nnode\xff slots=1\n", "hosts:2: is not UTF-8"),
    ],
)
def test_what_a_hostfile_must_not_be(tmp_path: Path, content: str | bytes, told: str) -> None:
    with pytest.raises(UserError) as raised:
        read_hostfile(written(tmp_path, content))
    assert told in str(raised.value)


def test_every_line_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_hostfile(written(tmp_path, "a slots=x\nb slots=1\nb slots=1\nc:1 slots=1\n"))
    assert [problem.where.rpartition(":")[2] for problem in raised.value.problems] == ["1", "3", "4"]


@pytest.mark.parametrize("path", ["missing", "."])
def test_a_hostfile_that_is_none_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match="--hostfile"):
        read_hostfile(tmp_path / path)


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        ({"include": "node3"}, "'node3' is not in the hostfile"),
        ({"include": "node1:2"}, "node1 has no slot '2'"),
        ({"include": "node1:"}, "node1 has no slot ''"),
        ({"exclude": "node1:x"}, "node1 has no slot 'x'"),
        ({"exclude": "node1@node-2.lan@10.0.0.3"}, "leaves no slot"),
        ({"include": "node1", "exclude": "node1:0"}, "do not go together"),
    ],
)
def test_what_a_filter_must_not_be(tmp_path: Path, filters: dict[str, str], told: str) -> None:
    with pytest.raises(UserError) as raised:
        select(read_hostfile(written(tmp_path, GOOD)), **filters)
    assert told in str(raised.value)
