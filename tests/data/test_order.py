"""The order of a shuffled epoch: a bijection, another one each epoch, the same on every machine."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllama.data.order import permute

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 64, 97, 100, 256, 257, 1000, 1024, 4099]


def reference(index: int, n: int, seed: int, epoch: int) -> int:
    """The specification once more, one index at a time, in Python's unbounded integers."""
    mask = 2**64 - 1
    rows = math.ceil(math.sqrt(n))
    columns = math.ceil(n / rows)
    digest = hashlib.sha512(f"{seed}/{epoch}".encode()).digest()
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(8)]

    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
        return (bits ^ bits >> 31) >> 1

    while True:
        left, right = divmod(index, columns)
        for number, key in enumerate(keys):
            if number % 2 == 0:
                left = (left + mix(right ^ key)) % rows
            else:
                right = (right + mix(left ^ key)) % columns
        index = left * columns + right
        if index < n:
            return index


@pytest.mark.parametrize("n", SIZES)
def test_every_sample_comes_exactly_once(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed=11, epoch=3)), np.arange(n))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**6))
def test_every_sample_comes_exactly_once_for_any_key(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 10**12), seed=st.integers(0, 2**32), epoch=st.integers(0, 100), place=st.floats(0, 1))
def test_the_order_is_the_specified_one(n, seed, epoch, place):
    index = min(n - 1, int(place * n))
    assert permute(np.array([index]), n, seed, epoch).tolist() == [reference(index, n, seed, epoch)]


def test_a_block_gives_what_its_entries_give_one_by_one():
    block = np.array([[5, 0, 999], [17, 17, 3]])
    permuted = permute(block, 1000, 7, 1)
    assert permuted.shape == block.shape
    assert permuted.tolist() == [[reference(index, 1000, 7, 1) for index in row] for row in block.tolist()]


def test_a_trillion_samples_need_no_memory_and_do_not_collide():
    n = 10**12
    block = np.concatenate([np.arange(50_000), n - 1 - np.arange(50_000)])
    permuted = permute(block, n, 1, 0)
    assert permuted.min() >= 0
    assert permuted.max() < n
    assert len(np.unique(permuted)) == len(block)


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 8}])
def test_another_epoch_or_seed_gives_another_order(other):
    n = 1000
    one = permute(np.arange(n), n, seed=7, epoch=0)
    two = permute(np.arange(n), n, **{"seed": 7, "epoch": 0, **other})
    # Two independent orders agree in about one place (Poisson with mean 1).
    assert (one == two).sum() < 10


@pytest.mark.parametrize("n", [2, 3, 7, 16, 50])
def test_each_sample_is_as_likely_at_each_place(n):
    epochs = 1500
    orders = np.stack([permute(np.arange(n), n, seed=5, epoch=epoch) for epoch in range(epochs)])
    counts = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    expected = epochs / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_neighbours_in_the_stream_are_not_neighbours_in_the_order():
    n = 100_000
    order = permute(np.arange(n), n, seed=3, epoch=0)
    # Of n independent pairs, about 2 are neighbours; and the mean distance of two uniform places is n / 3.
    distances = np.abs(np.diff(order))
    assert (distances == 1).sum() < 15
    assert abs(distances.mean() / (n / 3) - 1) < 0.02
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.02
