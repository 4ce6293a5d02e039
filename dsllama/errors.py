"""What goes wrong through the user's doing, said so that the user can mend it.

Every check in dsllama returns or collects `Problem`s; whoever asked for the work raises them together as
one `UserError`. The command line prints it on one screen and exits with code 2, without a traceback.
A programmer's mistake is an `assert` or an ordinary exception instead, and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

EXIT_USER_ERROR = 2
_MOST_SHOWN = 20
_MOST_LETTERS = 80


@dataclass(frozen=True)
class Problem:
    """One mistake.

    where: the field, file or file:line that is wrong. rule: what must hold, with the offending value in it
    where that helps. remedy: what to do, with the nearest values that would work; may be empty where the
    rule says it already. value: what was found; None leaves it out.
    """

    where: str
    rule: str
    remedy: str = ""
    value: Any = None

    def __str__(self) -> str:
        found = "" if self.value is None else f" = {_shorten(self.value)}"
        below = self.remedy.replace("\n", "\n         ")
        remedy = f"\n      -> {below}" if below else ""
        return f"{self.where}{found}: {self.rule}{remedy}"


class UserError(Exception):
    """One or more mistakes of the user's, collected before any work starts."""

    def __init__(self, problems: Problem | Iterable[Problem], title: str = "dsllama cannot start"):
        # Two checks may come upon the same mistake.
        self.problems = [problems] if isinstance(problems, Problem) else list({str(p): p for p in problems}.values())
        self.title = title
        super().__init__(self.problems, title)  # from which one rank can tell it to the others

    def __str__(self) -> str:
        """The whole message: a title, then the problems, numbered when there are several, 20 at most."""
        count = len(self.problems)
        if count == 1:
            return f"{self.title}: {self.problems[0]}"
        lines = [f"{self.title}: {count} problems"]
        lines += [f"  {n}. {problem}" for n, problem in enumerate(self.problems[:_MOST_SHOWN], 1)]
        if count > _MOST_SHOWN:
            lines.append(f"  ... and {count - _MOST_SHOWN} more of the same run")
        return "\n".join(lines)


def did_you_mean(name: str, known: Iterable[str], all_of_them: str = "") -> str:
    """A remedy for an unknown name: the nearest known one; else the list of them, or, where that is long, where the
    list can be seen (`all_of_them`)."""
    names = sorted(known)
    if near := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {near[0]!r}?"
    listing = ", ".join(names)
    if len(listing) < 300:
        return f"known: {listing}"
    return all_of_them or f"known: {', '.join(names[:10])} and {len(names) - 10} more"


def remedy_for(error: OSError, otherwise: str = "check the path") -> str:
    """What to do about a file or folder that the operating system refuses."""
    return _REMEDIES.get(error.errno or 0, otherwise)


def is_explained(error: OSError) -> bool:
    """Whether the user can mend it: no permission, no space, a name too long ..."""
    return error.errno in _REMEDIES


def of_system(
    error: OSError, rule: str = "cannot be used", where: str = "", otherwise: str = "check the path", value: Any = None
) -> Problem:
    """Such an error as a problem; where it says no other, of the file that the system names."""
    rule = f"{rule} ({error.strerror or error})"
    return Problem(where or str(error.filename), rule, remedy_for(error, otherwise), value)


_REMEDIES = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.ENOSPC: "free some space there, or give another place",
    errno.EDQUOT: "free some of your quota there, or give another place",
    errno.EROFS: "it is mounted read-only: give another place",
    errno.EEXIST: "a part of the path is a file: give another one",
    errno.EISDIR: "it is a folder: give a file",
    errno.ENOTDIR: "a part of the path is a file: give another one",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links go round in a circle",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


_BRIEFLY = reprlib.Repr()
_BRIEFLY.maxlevel, _BRIEFLY.maxstring, _BRIEFLY.maxother = 3, 200, 200


def _shorten(value: Any) -> str:
    # From the middle: of a path, the file's name at its end says most. Aliases in YAML can make a few lines a value
    # whose full text would be gigabytes.
    if isinstance(value, int) and abs(value) > 2**64:
        return "an integer of more than 64 bits"
    text = repr(value) if isinstance(value, (str, int, float)) else _BRIEFLY.repr(value)
    half = (_MOST_LETTERS - 3) // 2
    return text if len(text) <= _MOST_LETTERS else f"{text[:half]}...{text[-half:]}"
