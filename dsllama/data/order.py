"""The order in which a shuffled epoch visits its samples: a keyed bijection on [0, n).

    index -> (left, right) digits -> 8 Feistel rounds -> index in [0, rows * columns) -> again while >= n

It takes O(1) memory and gives any place of the order in O(1), so a run resumes anywhere at once. It is our
own integer arithmetic, because the streams of NumPy's and PyTorch's generators may change between versions
and a resumed run must go on in the same order.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_U64 = np.uint64


def permute(index: npt.NDArray[Any], n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The sample at place `index` of the order of one epoch.

    index: integers in [0, n), of any shape; the result has the same shape (int64). n: number of samples, up to 2**62.

    Feistel network over the mixed-radix digits of the index with modular addition, and cycle walking: Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002). The domain exceeds n by less than its square
    root, so a second walk is rare.
    """
    assert 1 <= n <= 2**62, "n outside [1, 2**62]"
    assert index.size == 0 or (index.min() >= 0 and index.max() < n), "index outside [0, n)"
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    keys = np.frombuffer(hashlib.sha512(f"{seed}/{epoch}".encode()).digest(), "<u8").astype(_U64)
    values = _feistel(index.reshape(-1).astype(_U64), rows, columns, keys)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], rows, columns, keys)
    return values.astype(np.int64).reshape(index.shape)


def _feistel(values: npt.NDArray[np.uint64], rows: int, columns: int, keys: npt.NDArray[np.uint64]) -> Any:
    """A bijection on [0, rows * columns), entry by entry. keys: one per round, an even number of them."""
    left, right = values // _U64(columns), values % _U64(columns)
    for key_left, key_right in keys.reshape(_ROUNDS // 2, 2):
        left = (left + _mix(right ^ key_left)) % _U64(rows)
        right = (right + _mix(left ^ key_right)) % _U64(columns)
    return left * _U64(columns) + right


def _mix(bits: npt.NDArray[np.uint64]) -> Any:
    """63 well-mixed bits of each entry: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).

    One bit is given up so that adding a digit cannot wrap round 2**64, which would break the bijection.
    """
    bits = (bits ^ (bits >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> _U64(27))) * _U64(0x94D049BB133111EB)
    return (bits ^ (bits >> _U64(31))) >> _U64(1)
