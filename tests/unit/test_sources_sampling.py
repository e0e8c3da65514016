"""num_samples: how often each record is taken."""

import numpy as np
import pytest

from megatron_sdar.data.sources.sampling import sample_counts


@pytest.mark.parametrize(("records", "samples"), [(1, 1), (10, 3), (10, 9), (1000, 1), (7, 7)])
def test_up_to_all_records_are_a_subset(records, samples):
    counts = sample_counts(records, samples, 42, "a")
    assert counts.dtype == np.int32
    assert counts.shape == (records,)
    assert counts.sum() == samples
    assert counts.max() == 1


@pytest.mark.parametrize(("records", "samples"), [(1, 9), (10, 11), (10, 57), (1000, 2500)])
def test_beyond_all_records_every_one_is_taken(records, samples):
    counts = sample_counts(records, samples, 42, "a")
    assert counts.sum() == samples
    assert counts.min() >= 1


def test_draws_differ_by_seed_and_name_only():
    for samples in (500, 1500):
        first = sample_counts(1000, samples, 1, "a")
        assert (first == sample_counts(1000, samples, 1, "a")).all()
        assert (first != sample_counts(1000, samples, 2, "a")).any()
        assert (first != sample_counts(1000, samples, 1, "b")).any()


def test_subsets_are_nested_and_so_are_repeats():
    small, large = (sample_counts(100, n, 3, "a") for n in (20, 60))
    assert (small <= large).all()
    some, more = (sample_counts(100, n, 3, "a") for n in (150, 300))
    assert (some <= more).all()


def test_draws_are_fair():
    subsets = sum(sample_counts(50, 10, seed, "a") for seed in range(2000))
    # 2000 draws of probability 0.2: mean 400, deviation 18.
    assert abs(subsets - 400).max() < 90
    repeats = sample_counts(50, 50 + 50_000, 1, "a") - 1
    assert abs(repeats - 1000).max() < 5 * 32
    halves = subsets.reshape(2, 25).sum(1)
    assert abs(halves - 10_000).max() < 500


def test_the_draw_does_not_change_between_versions():
    # Recorded: users' samples must stay the same from one release to the next.
    assert np.flatnonzero(sample_counts(20, 5, 42, "demo")).tolist() == [3, 5, 6, 9, 12]
    assert sample_counts(6, 12, 42, "demo").tolist() == [2, 2, 2, 2, 3, 1]


def test_equal_words_are_taken_in_order(monkeypatch):
    words = np.array([5, 1, 5, 5, 9], dtype=np.uint64)
    monkeypatch.setattr("megatron_sdar.data.sources.sampling.philox_words", lambda *_: words)
    assert sample_counts(5, 3, 0, "a").tolist() == [1, 1, 1, 0, 0]


def test_no_records():
    with pytest.raises(ValueError, match="dataset a: num_samples is 3, but its files hold no rec"):
        sample_counts(0, 3, 0, "a")
