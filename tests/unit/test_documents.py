"""Documents of several datasets: numbering, selections, validation split, mixing by document."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.token_lists import TokenList, random_documents

from megatron_sdar.data.loading.documents import (
    DocumentStore,
    hold_out,
    interleave_documents,
    split_documents,
)
from megatron_sdar.data.loading.truncation import cut_turns


@pytest.fixture
def store() -> DocumentStore:
    """Documents of 3, 5, 7 | 2, 4 | 9 tokens."""
    return DocumentStore(
        [
            TokenList([[1, 2], [2, 3], [3, 4]], "a"),
            TokenList([[1, 1], [2, 2]], "b"),
            TokenList([[4, 5]], "c"),
        ]
    )


def test_documents_are_numbered_through(store: DocumentStore) -> None:
    assert len(store) == store.total == 6
    assert store.lengths.tolist() == [3, 5, 7, 2, 4, 9]
    assert store.lengths.dtype == np.int32
    assert [store.get(number)[0].size for number in range(6)] == [3, 5, 7, 2, 4, 9]
    assert [store.turns(number).tolist()[0] for number in range(6)] == [1, 2, 3, 1, 2, 4]
    assert [list(store.ids_of(dataset)) for dataset in range(3)] == [[0, 1, 2], [3, 4], [5]]


def test_a_repeated_document_has_the_same_tokens_under_another_id(store: DocumentStore) -> None:
    for number in range(6):
        for repetition in (1, 2, 10**9):
            again = number + repetition * store.total
            assert np.array_equal(store.get(again)[0], store.get(number)[0])
            assert np.array_equal(store.turns(again), store.turns(number))


@pytest.mark.parametrize("chosen", [range(1, 5), range(3, 5), range(0, 6), range(4, 4)])
def test_a_range_of_documents(store: DocumentStore, chosen: range) -> None:
    part = store.select(chosen)
    assert part.lengths.tolist() == [store.get(number)[0].size for number in chosen]
    assert part.ids_at(np.arange(len(part))).tolist() == list(chosen)


def test_a_list_of_documents_in_any_order_with_repetitions(store: DocumentStore) -> None:
    part = store.select(np.array([5, 0, 6 + 1, 12 + 5]))
    assert len(part) == 4
    assert part.lengths.tolist() == [9, 3, 5, 9]
    assert part.ids_at(np.array([3, 2])).tolist() == [17, 7]


def test_opening_reads_no_document(store: DocumentStore) -> None:
    datasets = [random_documents(), random_documents()]
    for dataset in datasets:
        dataset.get = dataset.turns = None  # nothing of a document may be asked for
    opened = DocumentStore(datasets)
    opened.select(opened.ids_of(1))
    assert [dataset.length_reads for dataset in datasets] == [0, 0]


def test_equal_selections_have_equal_names_and_others_do_not(store: DocumentStore) -> None:
    selections = [range(6), range(5), np.arange(5), np.arange(5)[::-1].copy(), np.array([0, 7])]
    names = [store.select(selection).selection_digest() for selection in selections]
    assert len(set(names)) == len(names)
    assert store.selection_digest() == names[0]
    assert store.select(np.array([0, 7])).selection_digest() == names[-1]


@pytest.mark.parametrize("field", ["mask_token_id", "pad_token_id", "vocab_size"])
def test_datasets_of_different_tokenizers_are_refused(field: str) -> None:
    other = random_documents(name="other")
    setattr(other.metadata, field, 17)
    with pytest.raises(ValueError, match=rf"other: {field} is 17, but data has .*one tokenizer"):
        DocumentStore([random_documents(), other])


@pytest.mark.parametrize("mask_history", [False, True])
def test_cut_lengths_are_what_cutting_leaves(mask_history: bool) -> None:
    rng = np.random.default_rng(0)
    turns = [rng.integers(0, 30, size=2 * int(rng.integers(1, 5))).tolist() for _ in range(40)]
    store = DocumentStore([TokenList([[1, 1]]), TokenList(turns)])
    store.datasets[1].metadata.recipe.template["mask_history"] = mask_history
    part = store.select(store.ids_of(1))
    positions = np.array([3, 17, 39])
    found = part.cut_lengths(positions, 20)
    expected = [sum(b - a for a, b in cut_turns(turns[p], 20, mask_history)) for p in positions]
    assert found.tolist() == expected
    assert max(expected) == 20


# The validation split.


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_split_is_two_ascending_halves_of_everything(count: int, share: float, seed: int) -> None:
    if np.ceil(count * share) == count:
        return
    train, validation = split_documents(count, share, seed)
    assert len(validation) == np.ceil(count * share)
    for ids in (train, validation):
        assert all(a < b for a, b in pairwise(ids.tolist()))
    assert sorted([*train, *validation]) == list(range(count))


def test_a_split_by_number_is_random_and_depends_on_the_seed_only() -> None:
    assert split_documents(12, 4, 42)[1].tolist() == [3, 4, 6, 9]
    assert split_documents(12, 4, 42)[1].tolist() == split_documents(12, 1 / 3, 42)[1].tolist()
    chosen = {tuple(split_documents(100, 10, seed)[1].tolist()) for seed in range(20)}
    assert len(chosen) == 20
    picks = np.bincount(np.concatenate([split_documents(10, 5, s)[1] for s in range(400)]))
    assert abs(picks - 200).max() < 50, "5 standard deviations"


@pytest.mark.parametrize("val_size", [0, -1, -0.5, 2.5, float("nan"), float("inf")])
def test_a_val_size_that_is_no_size_is_refused(val_size: float) -> None:
    with pytest.raises(ValueError, match=r"val_size is .*fraction between 0 and 1, or a whole"):
        split_documents(10, val_size, 0)


@pytest.mark.parametrize(("val_size", "count"), [(1, 10), (10, 10), (11, 11), (0.95, 10)])
def test_a_split_that_leaves_a_side_empty_is_refused(val_size: float, count: int) -> None:
    with pytest.raises(ValueError, match=rf"takes {count} of 10 .*leaves 0 for training"):
        split_documents(10, val_size, 0)


# mix_strategy.


def published(sizes: Sequence[int], choices: Sequence[int], over: bool) -> list[int]:
    """Hugging Face's interleave_datasets for these draws, as ids without repetition numbers."""
    starts = np.cumsum([0, *sizes[:-1]])
    current, exhausted, ids = [0] * len(sizes), [False] * len(sizes), []
    for source in choices:
        if (all if over else any)(exhausted):
            return ids
        ids.append(int(starts[source]) + current[source])
        current[source] += 1
        if current[source] >= sizes[source]:
            exhausted[source], current[source] = True, 0
    raise AssertionError("more draws are needed")


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("interleave_under", [0, 3, 7, 1, 4, 8, 2, 5, 9]),
        ("interleave_over", [0, 3, 7, 1, 4, 8, 2, 5, 9, 0, 6, 10, 1, 3, 11]),
    ],
)
def test_datasets_take_turns(strategy: str, expected: list[int]) -> None:
    ids = interleave_documents([3, 4, 5], strategy, None, seed=0)
    assert (ids % 12).tolist() == expected
    assert ids.dtype == np.int64
    assert (ids // 12).tolist() == [expected[:place].count(e) for place, e in enumerate(expected)]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.booleans(),
    st.integers(0, 5),
)
@settings(max_examples=80, deadline=None)
def test_random_mixing_stops_where_the_published_one_does(
    sizes: list[int], shares: list[int], over: bool, seed: int
) -> None:
    probs = [share / sum(shares[: len(sizes)]) for share in shares[: len(sizes)]]
    strategy = "interleave_over" if over else "interleave_under"
    ids = interleave_documents(sizes, strategy, probs, seed)
    total, starts = sum(sizes), np.cumsum([0, *sizes[:-1]])
    choices = (np.searchsorted(starts, ids % total, side="right") - 1).tolist()
    assert (ids % total).tolist() == published(sizes, [*choices, 0], over)
    assert len(set(ids.tolist())) == len(ids), "a repetition has an id of its own"
    assert np.array_equal(ids, interleave_documents(sizes, strategy, probs, seed))


def test_random_mixing_follows_the_probabilities_and_the_seed() -> None:
    sizes, probs = [50_000, 50_000, 50_000], [0.7, 0.1, 0.2]
    ids = interleave_documents(sizes, "interleave_over", probs, seed=1)
    assert len(ids) > 3 * 2**16, "the test must need several rounds of draws"
    sources = ids % 150_000 // 50_000
    assert (sources[: 2**16] != sources[2**16 : 2**17]).mean() > 0.3, (
        "rounds have draws of their own"
    )
    shares = np.bincount(sources) / len(ids)
    assert np.abs(shares - probs).max() < 0.005
    shorter = interleave_documents([10, 10], "interleave_under", [0.5, 0.5], seed=1)
    assert shorter.tolist() == [10, 11, 12, 13, 14, 15, 16, 0, 1, 17, 18, 2, 19]
    others = {
        tuple(interleave_documents([10, 10], "interleave_under", [0.5, 0.5], seed).tolist())
        for seed in range(10)
    }
    assert len(others) == 10


def test_undersampling_ends_with_the_first_dataset_however_rare_another_is() -> None:
    ids = interleave_documents([5, 5], "interleave_under", [1e-15, 1 - 1e-15], seed=0)
    assert ids.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("sizes", "strategy", "probs", "message"),
    [
        ([3, 4], "concat", None, "mix_strategy is 'concat'; choose one of interleave_under"),
        ([3, 0], "interleave_over", None, "dataset 1 has no documents; remove it"),
        ([3, 4], "interleave_over", [0.5], r"interleave_probs is \[0.5\]; give one number above"),
        ([3, 4], "interleave_under", [0.0, 1.0], "give one number above 0 for each of the 2"),
        ([3, 4], "interleave_under", [0.5, 0.6], "with sum 1"),
        ([3, 4], "interleave_under", [float("nan"), 1.0], "with sum 1"),
        ([3, 4], "interleave_over", [1e-12, 1 - 1e-12], "would need about 3,000,000,000,000"),
    ],
)
def test_mixing_that_cannot_be_is_refused(
    sizes: list[int], strategy: str, probs: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        interleave_documents(sizes, strategy, probs, 0)


def with_source(dataset: TokenList, sha256: str, num_samples: int | None = None) -> TokenList:
    files = [{"name": f"{sha256}.jsonl", "size": 1, "sha256": sha256}]
    dataset.metadata.recipe.sources = [{"num_samples": num_samples, "files": files}]
    return dataset


def test_copies_of_a_record_stay_on_one_side_of_the_split() -> None:
    turns = [[n + 1, n + 2] for n in range(30) for _ in range(1 + n % 3)]
    sampled = with_source(TokenList(turns), "a", num_samples=len(turns))
    # In a TokenList ids count on; copies must hold the same ones.
    firsts = [turns.index(each) for each in turns]
    tokens = [sampled.get(first) for first in firsts]
    sampled.get = tokens.__getitem__
    store = DocumentStore([with_source(random_documents(20), "b"), sampled])
    train, held_out = hold_out(store, 0.3, seed=1)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(store.total))
    record = [*range(20), *(20 + first for first in firsts)]
    assert not {record[i] for i in train} & {record[i] for i in held_out}
    assert len({record[i] for i in held_out}) == 15


def test_one_file_twice_cannot_be_held_out_of() -> None:
    store = DocumentStore(
        [with_source(random_documents(name="x"), "a"), with_source(random_documents(name="y"), "a")]
    )
    with pytest.raises(ValueError, match=r"one file is used twice, in x \(a.jsonl\) and y \(a"):
        hold_out(store, 0.5, seed=1)


def test_datasets_of_another_tokenizer_are_refused() -> None:
    other = random_documents(name="other")
    other.metadata.recipe.tokenizer_fingerprint = "u" * 64
    with pytest.raises(ValueError, match="other: it was made with another tokenizer than data"):
        DocumentStore([random_documents(), other])
