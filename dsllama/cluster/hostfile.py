"""Hostfiles, and which of their slots a run takes: as DeepSpeed reads them, but nothing is guessed.

    node1 slots=8        # a host by the name that ssh knows, and how many processes it runs
    node2 slots=8

DeepSpeed takes a file that does not exist for "this machine alone", "slots=8x" for 8, and a name with a colon for
something else at each of its three readers (its own filters, pdsh, ssh). Here each is an error that names the line.
"""

from __future__ import annotations

import re
from pathlib import Path

from dsllama.errors import Problem, UserError, did_you_mean, of_system

Hosts = dict[str, list[int]]
"""Slots by host, in the order of the file; ranks are counted in this order."""

# What ssh, pdsh and DeepSpeed's filters all take for one plain name: no port, no IPv6 address, no user, no list.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SLOTS = re.compile(r"slots=(\d+)")
_THIS_MACHINE = re.compile(r"localhost|127\.\d+\.\d+\.\d+|0\.0\.0\.0")
_LINE = "a line is NAME slots=N, such as node1 slots=8"


def read_hostfile(path: Path) -> Hosts:
    """The hosts of a file. Raises UserError with every line that is wrong."""
    try:
        content = path.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            remedy = "name a file that is there; without --hostfile this machine alone trains"
            raise UserError(Problem("--hostfile", "does not exist", remedy, str(path))) from None
        raise UserError(of_system(error, "cannot be read", "--hostfile", value=str(path))) from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{path}:{content[: error.start].count(10) + 1}"
        raise UserError(Problem(place, "is not UTF-8 text", "write it as plain text")) from None
    problems: list[Problem] = []
    found: Hosts = {}
    places: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}:{number}"
        problem = _problem_with(where, words)
        if problem is not None:
            problems.append(problem)
            continue
        name, slots = words[0], int(words[1].removeprefix("slots="))
        if name in places:
            rule = f"{name} stands in line {places[name]} already"
            problems.append(Problem(where, rule, "give each host one line, with all of its slots"))
        places.setdefault(name, number)
        found[name] = list(range(slots))
    if not places and not problems:
        problems.append(Problem(str(path), "names no host", _LINE))
    problems += [
        Problem(f"{path}:{places[name]}", f"{name} is another machine on each of several hosts", "give its name")
        for name in found
        if len(found) > 1 and _THIS_MACHINE.fullmatch(name)
    ]
    if problems:
        raise UserError(problems)
    return found


def _problem_with(where: str, words: list[str]) -> Problem | None:
    name = words[0]
    if name.startswith("\ufeff"):
        return Problem(where, "begins with a byte order mark", "save the file as UTF-8 without one")
    if ":" in name or name.startswith("["):
        remedy = (
            "give the host a name (/etc/hosts, or Host in ~/.ssh/config, where HostName takes an IPv6 address and Port "
            "a port; --ssh_port for one that all share)"
        )
        return Problem(where, "is a name with a port, or an IPv6 address, which pdsh and DeepSpeed split", remedy, name)
    if "@" in name:
        remedy = "write User under Host in ~/.ssh/config"
        return Problem(where, "is a name with a user, which DeepSpeed's filters split", remedy, name)
    if not _NAME.fullmatch(name):
        return Problem(where, "is not the name of a host (letters, digits, dots, dashes)", _LINE, name)
    if len(words) != 2 or not (match := _SLOTS.fullmatch(words[1])):
        return Problem(where, "is not NAME slots=N", _LINE, " ".join(words))
    if int(match[1]) == 0:
        return Problem(where, "a host without a slot", "leave the line out, or give a number from 1 on", words[1])
    return None


def select(hosts: Hosts, include: str = "", exclude: str = "") -> Hosts:
    """The hosts and slots that a filter leaves: NAME[:SLOT,SLOT...] joined by @, as DeepSpeed has it.
    Raises UserError."""
    option, text = ("--include", include) if include else ("--exclude", exclude)
    if include and exclude:
        raise UserError(Problem("--include", "and --exclude do not go together", "give one of them"))
    if not text:
        return hosts
    problems: list[Problem] = []
    named: Hosts = {}
    for part in text.split("@"):
        name, colon, numbers = part.strip().partition(":")
        if name not in hosts:
            problems.append(Problem(option, f"{name!r} is not in the hostfile", did_you_mean(name, hosts), text))
            continue
        wanted = [word.strip() for word in numbers.split(",")] if colon else list(map(str, hosts[name]))
        for word in wanted:
            if not word.isdecimal() or int(word) not in hosts[name]:
                rule = f"{name} has no slot {word!r}"
                problems.append(Problem(option, rule, f"it has 0 to {hosts[name][-1]}", text))
            else:
                named.setdefault(name, []).append(int(word))
    if problems:
        raise UserError(problems)
    taken = {
        name: [slot for slot in slots if (slot in named.get(name, [])) == bool(include)]
        for name, slots in hosts.items()
    }
    left = {name: slots for name, slots in taken.items() if slots}
    if not left:
        raise UserError(Problem(option, "leaves no slot to train on", "leave some", text))
    return left


def as_filter(hosts: Hosts) -> str:
    """The --include that leaves just these."""
    return "@".join(f"{name}:{','.join(map(str, slots))}" for name, slots in hosts.items())
