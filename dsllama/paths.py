"""Paths as people write them: `~/data`, `$SCRATCH/run`."""

from __future__ import annotations

import os
import re
from typing import Any


def parse_path(value: Any, any_bytes: bool = False) -> Any:
    """Text with `~` and environment variables replaced, as a shell does it; other types pass through unchanged.

    What exists under its literal name is meant literally. any_bytes: let a name pass that is not UTF-8, which no
    configuration file could hold. Raises ValueError for what no path can be.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError("must not hold a NUL character")
    try:
        value.encode("utf-8", "surrogateescape" if any_bytes else "strict")
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8") from None
    if os.path.lexists(value):
        return value
    expanded = os.path.expandvars(os.path.expanduser(value))
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"must not name {unset[0]}, which the environment does not have")
    if re.match(r"~\w*(/|$)", expanded):
        raise ValueError(f"must not begin with {expanded.split('/')[0]}, a home that is not known")
    return expanded


def parse_text(value: Any) -> Any:
    """Text that UTF-8 can hold; other types pass through unchanged. Raises ValueError for other text."""
    if not isinstance(value, str) or value.isascii():
        return value
    try:
        # In an ASCII locale Python keeps the bytes of a command line's letters one by one.
        return value.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ValueError("must be UTF-8: it holds bytes or halves of surrogate pairs that are no character") from None
