"""The batches of a rank: the textbook's examples, contract 2 against a plain slicing of the whole stream, resuming."""

import gc
import logging
import math
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllama.data.loader import IGNORE_INDEX, DatasetLoader
from dsllama.errors import UserError
from tests.conftest import PATIENCE

Row = tuple[tuple[int, ...], tuple[int, ...]]


def write_shards(folder: Path, lengths: list[int]) -> list[int]:
    """Shards of these lengths whose tokens are all different: 0, 1, 2, ... Returns the stream."""
    folder.mkdir(exist_ok=True)
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    for number, piece in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        np.save(folder / f"shard_{number:05}.npy", piece)
    return tokens.tolist()


def expected_rows(tokens: list[int], seq_len: int) -> list[Row]:
    """The rows of an epoch, cut from the whole stream by plain slicing: the oracle."""
    rows = []
    for start in range(0, len(tokens) - 1, seq_len):
        y = tokens[start + 1 : start + 1 + seq_len]
        x = tokens[start : start + len(y)]
        padding = seq_len - len(y)
        rows.append((tuple(x + [0] * padding), tuple(y + [IGNORE_INDEX] * padding)))
    return rows


def rows_of(batch: tuple[torch.Tensor, torch.Tensor]) -> list[Row]:
    x, y = batch
    return [(tuple(x_T), tuple(y_T)) for x_T, y_T in zip(x.tolist(), y.tolist(), strict=True)]


def micro_steps(
    count: int, ranks: int, batch: int, seq_len: int, folder: Path, consumed: int = 0, **options
) -> list[Row]:
    """The rows that all ranks together get in so many micro-steps, in the order of their numbers."""
    rows = []
    loaders = [DatasetLoader(batch, seq_len, rank, ranks, folder, "cpu", **options) for rank in range(ranks)]
    for loader in loaders:
        loader.load_state_dict({**loader.state_dict(), "consumed_samples": consumed})
    for _ in range(count):
        for loader in loaders:
            rows += rows_of(loader.get_batch())
    for loader in loaders:
        loader.close()
    return rows


# --- the textbook's examples ---


def test_the_textbooks_six_tokens_give_its_x_and_y(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1202, 850, 149, 4211, 769, 1839], np.uint16))
    with DatasetLoader(1, 5, 0, 1, tmp_path, "cpu") as loader:
        x, y = loader.get_batch()
    assert x.tolist() == [[1202, 850, 149, 4211, 769]]
    assert y.tolist() == [[850, 149, 4211, 769, 1839]]


def test_the_textbooks_toy_data_give_its_two_rows(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1202, 850, 149, 4211, 769, 1839, 3521, 4879, 2035], np.uint16))
    loader = DatasetLoader(batch=2, seq_len=4, process_rank=0, num_processes=1, dataset_dir=str(tmp_path), device="cpu")
    x, y = loader.get_batch()
    loader.close()
    assert torch.equal(x, torch.tensor([[1202, 850, 149, 4211], [769, 1839, 3521, 4879]]))
    assert torch.equal(y, torch.tensor([[850, 149, 4211, 769], [1839, 3521, 4879, 2035]]))


def test_ranks_take_the_textbooks_offsets(tmp_path):
    tokens = write_shards(tmp_path, [200])
    batch, seq_len, ranks = 2, 3, 4
    for rank in range(ranks):
        with DatasetLoader(batch, seq_len, rank, ranks, tmp_path, "cpu") as loader:
            for step in range(5):
                x, y = loader.get_batch()
                start = (step * ranks + rank) * batch * seq_len
                assert x.flatten().tolist() == tokens[start : start + batch * seq_len]
                assert y.flatten().tolist() == tokens[start + 1 : start + batch * seq_len + 1]


def test_batches_are_int64_contiguous_and_their_own(tmp_path):
    write_shards(tmp_path, [100])
    with DatasetLoader(2, 8, 0, 1, tmp_path, "cpu") as loader:
        x, y = loader.get_batch()
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        before = y.clone()
        x.zero_()
        loader.get_batch()
        assert torch.equal(y, before)


# --- contract 2 ---

lengths_of_shards = st.lists(st.integers(1, 12), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) >= 2)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=lengths_of_shards,
    seq_len=st.integers(1, 7),
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    batch=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_every_token_is_a_target_once_per_epoch(tmp_path_factory, lengths, seq_len, ranks, batch, shuffle):
    folder = tmp_path_factory.mktemp("shards")
    tokens = write_shards(folder, lengths)
    oracle = expected_rows(tokens, seq_len)
    epochs = 3
    steps = math.ceil(epochs * len(oracle) / (ranks * batch))
    rows = micro_steps(steps, ranks, batch, seq_len, folder, shuffle=shuffle, seed=9)
    for epoch in range(epochs):
        in_epoch = rows[epoch * len(oracle) : (epoch + 1) * len(oracle)]
        assert Counter(in_epoch) == Counter(oracle)
        assert shuffle or in_epoch == oracle
        targets = [target for _, y in in_epoch for target in y if target != IGNORE_INDEX]
        assert Counter(targets) == Counter(tokens[1:])


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_update_has_the_same_samples_for_any_ranks_and_micro_batch(tmp_path, shuffle):
    write_shards(tmp_path, [1, 1, 200, 3, 77, 1, 150])
    samples_per_update, updates = 24, 6
    per_update = {}
    for ranks, batch in ((1, 24), (1, 1), (1, 8), (2, 12), (2, 3), (3, 8), (3, 2), (4, 6), (4, 1), (8, 3), (8, 1)):
        steps = samples_per_update // (ranks * batch)
        rows = micro_steps(updates * steps, ranks, batch, 5, tmp_path, shuffle=shuffle, seed=3)
        cuts = range(0, len(rows), samples_per_update)
        per_update[ranks, batch] = [Counter(rows[cut : cut + samples_per_update]) for cut in cuts]
    assert all(found == per_update[1, 24] for found in per_update.values())
    # 433 tokens are 87 samples: the six updates go through the epoch's end.
    assert updates * samples_per_update > 87


def test_a_shuffled_epoch_is_in_another_order_than_the_stream_and_the_next_epoch(tmp_path):
    tokens = write_shards(tmp_path, [301])
    oracle = expected_rows(tokens, 3)
    rows = micro_steps(200, 1, 1, 3, tmp_path, shuffle=True, seed=4)
    other = micro_steps(100, 1, 1, 3, tmp_path, shuffle=True, seed=5)
    orders = [oracle, rows[:100], rows[100:], other]
    # Two independent orders of 100 agree in about one place.
    assert all(sum(a == b for a, b in zip(x, y, strict=True)) < 10 for x in orders for y in orders if x is not y)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=lengths_of_shards,
    seq_len=st.integers(1, 5),
    steps=st.integers(0, 12),
    first=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    then=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    shuffle=st.booleans(),
)
def test_a_resumed_run_goes_on_with_the_next_sample_on_any_ranks(
    tmp_path_factory, lengths, seq_len, steps, first, then, shuffle
):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, lengths)
    consumed = steps * first[0] * first[1]
    total = consumed + 3 * then[0] * then[1]
    whole = micro_steps(total, 1, 1, seq_len, folder, shuffle=shuffle)
    before = micro_steps(steps, *first, seq_len, folder, shuffle=shuffle)
    after = micro_steps(3, *then, seq_len, folder, consumed=consumed, shuffle=shuffle)
    assert before + after == whole


def test_far_positions_cost_no_more_than_near_ones_and_are_right(tmp_path):
    tokens = write_shards(tmp_path, [1001])
    oracle = expected_rows(tokens, 10)
    far = 10**9 * len(oracle) + 7
    assert micro_steps(1, 2, 3, 10, tmp_path, consumed=far) == oracle[7:13]


# --- the state ---


def test_batches_that_were_only_read_ahead_do_not_count(tmp_path):
    tokens = write_shards(tmp_path, [200])
    oracle = expected_rows(tokens, 2)
    with DatasetLoader(2, 2, 1, 3, tmp_path, "cpu") as loader:
        for step in range(1, 6):
            loader.get_batch()
            assert loader.state_dict()["consumed_samples"] == step * 6
        state = loader.state_dict()
    with DatasetLoader(1, 2, 0, 1, tmp_path, "cpu") as loader:
        loader.get_batch()
        loader.load_state_dict(state)
        assert rows_of(loader.get_batch()) == [oracle[30]]
        loader.load_state_dict({**state, "consumed_samples": 4})
        assert rows_of(loader.get_batch()) == [oracle[4]]
        loader.close()
        assert rows_of(loader.get_batch()) == [oracle[5]]


def test_a_batch_lost_to_an_interrupt_is_read_again(tmp_path):
    tokens = write_shards(tmp_path, [100])
    oracle = expected_rows(tokens, 2)
    with DatasetLoader(1, 2, 0, 1, tmp_path, "cpu") as loader:
        loader.get_batch()
        loader._ahead.popleft()  # what Ctrl-C leaves: taken from the thread, and never delivered
        assert rows_of(loader.get_batch()) == [oracle[1]]


def test_the_state_is_refused_by_another_run_which_names_both_values(tmp_path):
    write_shards(tmp_path / "one", [50])
    write_shards(tmp_path / "two", [25, 26])
    options = {"shuffle": True, "seed": 3, "validation_tokens": 10}
    state = DatasetLoader(2, 4, 0, 1, tmp_path / "one", "cpu", **options).state_dict()
    DatasetLoader(5, 4, 2, 3, tmp_path / "one", "cpu", **options).load_state_dict(state)

    other = DatasetLoader(2, 5, 0, 1, tmp_path / "two", "cpu", shuffle=False, seed=4, validation_tokens=11)
    with pytest.raises(UserError) as caught:
        other.load_state_dict(state)
    found = {problem.where: problem.rule for problem in caught.value.problems}
    values = {"seq_len": (4, 5), "shuffle": (True, False), "seed": (3, 4), "validation_tokens": (10, 11)}
    fingerprints = (state["fingerprint"], other.stream.fingerprint)
    for name, (saved, now) in {**values, "fingerprint": fingerprints}.items():
        assert repr(saved) in found[name]
        assert repr(now) in found[name]
    assert len(found) == 5
    with pytest.raises(UserError, match="lacks consumed_samples"):
        other.load_state_dict({name: value for name, value in state.items() if name != "consumed_samples"})


def test_the_epoch_is_that_of_the_next_sample(tmp_path):
    write_shards(tmp_path, [13])  # 6 samples of 2
    with DatasetLoader(2, 2, 0, 1, tmp_path, "cpu") as loader:
        assert (loader.samples_per_epoch, len(loader)) == (6, 3)
        epochs = []
        for _ in range(7):
            epochs.append(loader.consumed_samples // loader.samples_per_epoch)
            loader.get_batch()
    assert epochs == [0, 0, 0, 1, 1, 1, 2]


def announcements(folder: Path, caplog, steps: int, rank: int = 0, consumed: int = 0, **options) -> list[str]:
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, logger="dsllama.data"),
        DatasetLoader(2, 2, rank, 2, folder, "cpu", **options) as loader,
    ):
        loader.load_state_dict({**loader.state_dict(), "consumed_samples": consumed})
        for _ in range(steps):
            loader.get_batch()
    return [record.getMessage() for record in caplog.records]


def test_each_pass_after_the_first_is_announced_once_by_the_first_rank(tmp_path, caplog):
    write_shards(tmp_path, [21])  # 10 samples; a micro-step takes 4
    said = announcements(tmp_path, caplog, steps=7, tokens_per_update=8)
    assert [line.split(" begins")[0] for line in said] == ["epoch 2", "epoch 3"]
    assert "begins at sample 10: the data set's 21 tokens are seen again" in said[0]
    assert announcements(tmp_path, caplog, steps=2) == []
    assert announcements(tmp_path, caplog, steps=7, rank=1) == []
    # Resumed within the second pass, it is not announced again; resumed at its very start, it is.
    assert announcements(tmp_path, caplog, steps=1, consumed=12) == []
    assert len(announcements(tmp_path, caplog, steps=2, consumed=10)) == 1


# --- the held-out part ---


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=lengths_of_shards.filter(lambda lengths: sum(lengths) >= 4),
    held_out=st.integers(2, 30),
    seq_len=st.integers(1, 6),
    ranks=st.sampled_from([1, 2, 3, 8]),
    batch=st.integers(1, 3),
)
def test_the_held_out_part_is_evaluated_whole_and_never_trained_on(
    tmp_path_factory, lengths, held_out, seq_len, ranks, batch
):
    folder = tmp_path_factory.mktemp("shards")
    tokens = write_shards(folder, lengths)
    held_out = min(held_out, len(tokens) - 2)
    training, validation = tokens[:-held_out], tokens[-held_out:]

    oracle = expected_rows(training, seq_len)
    steps = math.ceil(2 * len(oracle) / (ranks * batch))
    rows = micro_steps(steps, ranks, batch, seq_len, folder, shuffle=True, validation_tokens=held_out)
    assert Counter(rows[: len(oracle)]) == Counter(oracle)
    assert not {token for x, y in rows for token in (*x, *y) if token} & set(validation)

    expected = expected_rows(validation, seq_len)
    by_rank = []
    for rank in range(ranks):
        options = {"shuffle": True, "validation_tokens": held_out, "split": "validation"}
        loader = DatasetLoader(batch, seq_len, rank, ranks, folder, "cpu", **options)
        by_rank.append([rows_of(pair) for pair in loader.validation_batches()])
        assert [rows_of(pair) for pair in loader.validation_batches()] == by_rank[-1]
        assert len(by_rank[-1]) == len(loader)
        with loader:
            assert rows_of(loader.get_batch())[0] == expected[rank * batch % len(expected)]
    rows = [row for step in zip(*by_rank, strict=True) for rank_rows in step for row in rank_rows]
    padding = ((0,) * seq_len, (IGNORE_INDEX,) * seq_len)
    assert rows[: len(expected)] == expected
    assert set(rows[len(expected) :]) <= {padding}


# --- what is refused ---


def test_all_wrong_arguments_come_in_one_error(tmp_path):
    write_shards(tmp_path, [50])
    with pytest.raises(UserError) as caught:
        DatasetLoader(0, 0, 3, 2, tmp_path, "abacus", split="test")  # type: ignore[arg-type]
    found = {problem.where for problem in caught.value.problems}
    assert found == {"batch", "seq_len", "process_rank", "split", "device"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the device exists")
def test_a_missing_cuda_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="no CUDA"):
        DatasetLoader(1, 1, 0, 1, tmp_path / "nowhere", "cuda")


def test_a_data_set_smaller_than_one_update_is_refused(tmp_path):
    write_shards(tmp_path, [20, 21])  # 40 targets: 10 samples of 4
    DatasetLoader(1, 4, 0, 1, tmp_path, "cpu", tokens_per_update=40)
    with pytest.raises(UserError, match=r"tokens_per_update = 44: the data set is smaller than one update: 41 tokens"):
        DatasetLoader(1, 4, 0, 1, tmp_path, "cpu", tokens_per_update=44)
    with pytest.raises(UserError, match="31 tokens without the 10 held out"):
        DatasetLoader(1, 4, 0, 1, tmp_path, "cpu", tokens_per_update=40, validation_tokens=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_tokens": 40}, "leaves 1 of 41 tokens to train on"),
        ({"validation_tokens": 50}, "hold out at most 39"),
        ({"validation_tokens": 1}, "must be 0, for none, or at least 2"),
        ({"validation_tokens": -5}, "must be 0, for none, or at least 2"),
        ({"split": "validation"}, "nothing is held out"),
        ({"vocab_size": 41 - 1}, "token 20 of the file is 40, outside the vocabulary"),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused(tmp_path, options, message):
    write_shards(tmp_path, [20, 21])
    with pytest.raises(UserError, match=message):
        DatasetLoader(1, 4, 0, 1, tmp_path, "cpu", **options)


def test_a_stream_of_one_token_has_no_target_and_is_refused(tmp_path):
    write_shards(tmp_path, [1])
    with pytest.raises(UserError, match="an input and its target are two"):
        DatasetLoader(1, 4, 0, 1, tmp_path, "cpu")


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_wrong_id_that_opening_missed_stops_its_batch_with_file_and_offset(tmp_path, shuffle):
    np.save(tmp_path / "a.npy", np.zeros(300_000, np.uint16))
    tokens = np.zeros(300_000, np.uint16)
    tokens[1500] = 9000
    np.save(tmp_path / "b.npy", tokens)
    seq_len = 100
    with DatasetLoader(8, seq_len, 0, 1, tmp_path, "cpu", vocab_size=8192, shuffle=shuffle) as loader:
        delivered = 0
        for _ in range(2):  # it stays where it is, and says the same again
            with pytest.raises(UserError, match=r"b.npy: token 1,500 of the file is 9,000, outside the vocabulary"):
                while True:
                    x, _y = loader.get_batch()
                    assert x.max() < 8192
                    delivered += 8
            assert loader.consumed_samples == delivered
    # In order, the last target of sample 3014 is the wrong token: batch 376 holds it.
    assert shuffle or delivered == (300_000 + 1500 - 1) // seq_len // 8 * 8


# --- the thread ---


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("dsllama-prefetch")]


def test_the_thread_starts_with_the_first_batch_and_ends_with_the_loader(tmp_path):
    write_shards(tmp_path, [100])
    gc.collect()
    others = prefetch_threads()
    before = len(others)
    loader = DatasetLoader(1, 4, 0, 1, tmp_path, "cpu")
    assert len(prefetch_threads()) == before
    loader.get_batch()
    assert len(prefetch_threads()) == before + 1
    loader.load_state_dict(loader.state_dict())
    loader.get_batch()
    assert len(prefetch_threads()) == before + 1
    loader.close()
    assert len(prefetch_threads()) == before
    loader.get_batch()
    forgotten = prefetch_threads()
    del loader
    gc.collect()
    for thread in set(forgotten) - set(others):  # it notices by itself
        thread.join(timeout=PATIENCE)
    assert len(prefetch_threads()) == before


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "loader.itself = loader; del loader", "loader.close()"])
def test_a_program_that_forgets_the_loader_ends_quietly(tmp_path, ending):
    write_shards(tmp_path, [5000])
    program = f"""
from dsllama.data.loader import DatasetLoader
loader = DatasetLoader(64, 64, 0, 1, {str(tmp_path)!r}, "cpu", shuffle=True)
for _ in range(3):
    loader.get_batch()
{ending}
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (result.returncode, result.stdout) == (0, "")
    assert "Error" not in result.stderr
    assert "Exception" not in result.stderr


def test_two_loaders_read_side_by_side(tmp_path):
    tokens = write_shards(tmp_path, [100, 101])
    training, validation = expected_rows(tokens[:-40], 4), expected_rows(tokens[-40:], 4)
    options = {"validation_tokens": 40}
    held_out = DatasetLoader(2, 4, 0, 1, tmp_path, "cpu", split="validation", **options)
    with DatasetLoader(2, 4, 0, 1, tmp_path, "cpu", **options) as loader:
        for step in range(10):
            assert rows_of(loader.get_batch()) == training[2 * step : 2 * step + 2]
            rows = [row for batch in held_out.validation_batches() for row in rows_of(batch)]
            assert rows == validation


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_on_cuda_are_those_on_the_cpu(tmp_path, shuffle):
    write_shards(tmp_path, [1000, 1001])
    with (
        DatasetLoader(4, 32, 0, 1, tmp_path, "cuda", shuffle=shuffle) as on_cuda,
        DatasetLoader(4, 32, 0, 1, tmp_path, "cpu", shuffle=shuffle) as on_cpu,
    ):
        for _ in range(200):
            (x, y), (expected_x, expected_y) = on_cuda.get_batch(), on_cpu.get_batch()
            assert x.is_cuda
            assert torch.equal(x.cpu(), expected_x)
            assert torch.equal(y.cpu(), expected_y)
