"""Numbers as people write them: `45e9`, `2**19`, `512K`, `1_000`.

K, M and G are powers of 1024, because batch sizes and sequence lengths are (`512K` is the textbook's
`2**19`); B is 10**9, because budgets are ("45B tokens"). Anything else is written with an exponent.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any

_SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30, "B": 10**9}
_EXAMPLES = "write it like 524288, 2**19, 512K or 45e9"


def parse_number(value: Any) -> Any:
    """A float from a number or from text like `3e-4`, `2**-10`, `1_000`; other types pass through unchanged.

    Raises ValueError for text that is not a finite number.
    """
    if not isinstance(value, str):
        return value
    try:
        return float(_exactly(value))
    except (OverflowError, ValueError):
        raise ValueError(f"is not a number; {_EXAMPLES}") from None


def parse_count(value: Any) -> Any:
    """An int from a whole number or from text (see module); other types pass through unchanged.

    Raises ValueError where the number is not whole, or needs more than 64 bits.
    """
    if isinstance(value, bool) or not isinstance(value, (str, float, int)):
        return value
    # By decimals: 8.2e9 is a whole number, and the float 8.2 times 10**9 is none.
    exact = _exactly(value) if isinstance(value, str) else Decimal(value)
    if exact.is_finite() and not -(10**20) < exact < 2**63:
        raise ValueError("must be less than 2**63" if exact > 0 else "must not be so far below 0")
    if not exact.is_finite() or exact != exact.to_integral_value():
        raise ValueError(f"must be a whole number; {_EXAMPLES}")
    return int(exact)


def _exactly(text: str) -> Decimal:
    written = text.strip().replace("_", "")
    try:
        if power := re.fullmatch(r"(\d{1,4})\s*\*\*\s*(-?\d{1,3})", written):
            return Decimal(int(power[1])) ** int(power[2])
        if written and written[-1].upper() in _SUFFIXES:
            return Decimal(written[:-1]) * _SUFFIXES[written[-1].upper()]
        return Decimal(written)
    except (InvalidOperation, OverflowError):
        raise ValueError(f"is not a number; {_EXAMPLES}") from None


def parse_duration(value: Any) -> Any:
    """Seconds from a number or from text like `12h`, `1h30m`, `45s`; other types pass through unchanged."""
    parts = (
        re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", value.strip())
        if isinstance(value, str)
        else None
    )
    if parts and any(parts.groups()):
        return float(sum(int(n or 0) * size for n, size in zip(parts.groups(), (86400, 3600, 60, 1), strict=True)))
    try:
        return parse_number(value)
    except ValueError:
        raise ValueError("is no time; write it like 5400, 90m, 12h or 1h30m") from None


def nearest_multiples(value: int, of: int) -> list[int]:
    """The positive multiples of `of` just below and just above `value`, nearest first."""
    below = value // of * of
    return sorted(filter(None, (below, below + of)), key=lambda n: abs(n - value))


def nearest_divisors(value: int, of: int) -> list[int]:
    """The two divisors of `of` that lie nearest to `value`, nearest first."""
    if of > 10**12:  # looking at them all would take minutes
        near = range(max(1, value - 10**5), value + 10**5)
        return sorted({1, *(d for d in near if of % d == 0)}, key=lambda d: (abs(d - value), d))[:2]
    divisors = {d for low in range(1, math.isqrt(of) + 1) if of % low == 0 for d in (low, of // low)}
    return sorted(divisors, key=lambda d: (abs(d - value), d))[:2]


def readable(number: float) -> str:
    """1234567 -> '1.23M': powers of 1000, three significant digits, for people only."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}" if isinstance(number, float) else str(number)


def readable_bytes(number: float) -> str:
    """1234567890 -> '1.23 GB'."""
    text = readable(float(number)).replace("B", "G")
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def readable_duration(seconds: float) -> str:
    """3725 -> '1h02m'; 95 -> '1m35s'; 7.2 -> '7s'; days where there are many hours."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
