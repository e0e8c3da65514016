"""Which tokens stay of a document that is too long."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.golden_sft import golden

from megatron_sdar.data.loading.truncation import cut_turns, infer_seqlen

LENGTHS = st.lists(st.integers(0, 40), min_size=2, max_size=12).map(lambda it: it[: len(it) & ~1])


@pytest.mark.parametrize("case", golden("infer_seqlen_cases"), ids=str)
def test_golden_room(case):
    found = infer_seqlen(case["source_len"], case["target_len"], case["cutoff_len"])
    assert list(found) == case["result"]


@pytest.mark.parametrize(
    ("source", "target", "cutoff", "expected"),
    [
        (10, 5, 100, (10, 5)),
        (200, 5, 64, (59, 5)),
        (5, 200, 64, (5, 59)),
        (100, 300, 64, (16, 48)),
        # Exactly half of the room is not less than half.
        (100, 32, 64, (49, 15)),
        (32, 100, 64, (16, 48)),
        (32, 32, 64, (32, 32)),
        (0, 100, 64, (0, 64)),
        (100, 0, 64, (64, 0)),
        (0, 0, 1, (0, 0)),
        (1, 1, 1, (1, 0)),
    ],
)
def test_room_is_divided(source, target, cutoff, expected):
    assert infer_seqlen(source, target, cutoff) == expected


def test_proportional_share_is_rounded_in_floating_point():
    source, target, cutoff = next(
        (s, t, c)
        for c in range(2, 200)
        for s in range(c // 2, 60)
        for t in range(c // 2, 60)
        if 2 * t >= c and 2 * s >= c and int(c * (t / (s + t))) != c * t // (s + t)
    )
    assert infer_seqlen(source, target, cutoff)[1] == cutoff * target // (source + target) - 1


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 300))
def test_room_is_never_exceeded_and_never_wasted(source, target, cutoff):
    kept_source, kept_target = infer_seqlen(source, target, cutoff)
    assert 0 <= kept_source <= source
    assert 0 <= kept_target <= target
    assert kept_source + kept_target <= cutoff
    if source + target <= cutoff:
        assert (kept_source, kept_target) == (source, target)


@pytest.mark.parametrize(
    ("turns", "limit", "mask_history", "expected"),
    [
        ([4, 6], 10, False, [(0, 10)]),
        ([4, 6], 8, False, [(0, 8)]),
        ([4, 6], 7, False, [(0, 3), (4, 8)]),
        ([0, 100], 16, False, [(0, 16)]),
        ([4, 6, 4, 6], 15, False, [(0, 12), (14, 17)]),
        # Used up exactly: later turns are gone.
        ([4, 6, 4, 6], 10, False, [(0, 10)]),
        # The last turn first: the first one gets what is left.
        ([4, 6, 4, 6], 15, True, [(0, 2), (4, 7), (10, 20)]),
        ([4, 6, 4, 6], 10, True, [(10, 20)]),
        ([0, 0, 4, 6], 7, False, [(0, 3), (4, 8)]),
        ([5, 5], 0, False, []),
    ],
)
def test_ranges(turns, limit, mask_history, expected):
    assert cut_turns(turns, limit, mask_history) == expected


@given(LENGTHS, st.integers(0, 200), st.booleans())
def test_ranges_are_what_the_published_loop_keeps(turns, limit, mask_history):
    tokens, pairs = 0, []
    for source, target in zip(turns[::2], turns[1::2], strict=True):
        pairs.append(
            (range(tokens, tokens + source), range(tokens + source, tokens + source + target))
        )
        tokens += source + target
    kept: list[int] = []
    for source, target in pairs[::-1] if mask_history else pairs:
        if len(kept) >= limit:
            break
        room = infer_seqlen(len(source), len(target), limit - len(kept))
        turn = [*source[: room[0]], *target[: room[1]]]
        kept = turn + kept if mask_history else kept + turn
    ranges = cut_turns(turns, limit, mask_history)
    assert [token for start, stop in ranges for token in range(start, stop)] == kept
    assert len(kept) <= limit
    assert all(a[1] < b[0] for a, b in pairwise(ranges))
    if tokens <= limit:
        assert kept == list(range(tokens))
