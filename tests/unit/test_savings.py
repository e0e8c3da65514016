"""What enters a row: every block that the loss depends on, and no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sdar_kernels.reference import dense_mask

from megatron_sdar.diffusion.noise import NoiseDraw, NoiseKey, draw_noises
from megatron_sdar.diffusion.noise_schedule import NoiseSchedule, NoisyDocuments, draw_views
from megatron_sdar.diffusion.rows import build_row, full_copies
from megatron_sdar.diffusion.savings import kept_copies, masked_blocks, num_row_blocks

BLOCK, MASK_ID, PAD_ID, EPS = 4, 999, 998, 1e-3


def document(masked_tokens: list[int], num_blocks: int = 5) -> tuple[np.ndarray, NoiseDraw]:
    ids = np.arange(10, 10 + BLOCK * num_blocks, dtype=np.int32)
    masked = np.zeros(ids.size, dtype=np.bool_)
    masked[masked_tokens] = True
    return ids, NoiseDraw(0.5, masked)


def test_blocks_of_an_example() -> None:
    ids, noise = document([5, 14, 15])
    kept = kept_copies(ids, ids, BLOCK, [noise])
    assert kept.views[0].kept_blocks.tolist() == [1, 3]
    # Noisy block 3 sees clean blocks 0 to 2; clean blocks 3 and 4 are seen by nobody.
    assert kept.num_clean_blocks == 3
    assert num_row_blocks(kept) == 5
    assert masked_blocks(noise.masked, BLOCK).tolist() == [1, 3]


def test_views_share_the_clean_copy_that_the_furthest_needs() -> None:
    ids, near = document([5])
    far, silent = document([12])[1], document([])[1]
    kept = kept_copies(ids, ids, BLOCK, [near, silent, far])
    assert [view.kept_blocks.tolist() for view in kept.views] == [[1], [], [3]]
    assert kept.num_clean_blocks == 3
    row = build_row([kept], 64, BLOCK, MASK_ID, PAD_ID)
    assert row.num_label_tokens == 3 * ids.size, "a silent view counts in the denominator"


def test_a_document_without_masked_token_takes_no_room_but_counts() -> None:
    ids, noise = document([])
    kept = kept_copies(ids, ids, BLOCK, [noise])
    assert num_row_blocks(kept) == 0
    row = build_row([kept], 16, BLOCK, MASK_ID, PAD_ID)
    assert row.num_padding == 16
    assert row.num_label_tokens == 20


def test_a_mask_in_the_first_block_only_needs_no_clean_token() -> None:
    ids, noise = document([0, 3])
    kept = kept_copies(ids, ids, BLOCK, [noise])
    assert kept.num_clean_blocks == 0
    row = build_row([kept], 8, BLOCK, MASK_ID, PAD_ID)
    assert row.input_ids.tolist() == [MASK_ID, 11, 12, MASK_ID] + [PAD_ID] * 4


@given(st.integers(0, 2**32), st.integers(1, 12), st.floats(0.01, 0.9))
def test_masked_tokens_reach_the_same_tokens_as_in_full_copies(
    seed: int, num_blocks: int, prob: float
) -> None:
    """The keys that a masked token depends on, over any number of layers, are all kept."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(900)[: BLOCK * num_blocks].astype(np.int32)
    noise = NoiseDraw(prob, rng.random(ids.size) < prob)
    length = 2 * ids.size
    full = build_row([full_copies(ids, ids, BLOCK, noise)], length, BLOCK, MASK_ID, PAD_ID)
    less = build_row([kept_copies(ids, ids, BLOCK, [noise])], length, BLOCK, MASK_ID, PAD_ID)
    assert full.target_ids.tolist() == less.target_ids.tolist()
    assert full.loss_weights.tolist() == less.loss_weights.tolist()
    assert full.num_label_tokens == less.num_label_tokens
    assert reached(full) == reached(less)
    # And nothing else is: every kept token is reached by some masked one.
    needed = set().union(*reached(less)) if less.loss_positions.size else set()
    kept = {(int(t), int(p)) for t, p in zip(*tokens(less)[:2], strict=True)}
    assert {place for place in kept if place[0] != PAD_ID} == needed


def tokens(row: object) -> tuple[np.ndarray, np.ndarray]:
    return row.input_ids, row.position_ids


def reached(row: object) -> list[set[tuple[int, int]]]:
    """Per masked token: the (token, position) pairs its output depends on."""
    sees = dense_mask(torch.from_numpy(row.key_intervals)).numpy()
    closure = np.linalg.matrix_power((sees | np.eye(len(sees), dtype=bool)).astype(float), 4) > 0
    return [
        {
            (int(row.input_ids[key]), int(row.position_ids[key]))
            for key in np.flatnonzero(closure[place])
        }
        for place in row.loss_positions
    ]


# Views.


def views(num_views: int, complementary: bool, size: int = 4000) -> list[tuple[NoiseDraw, ...]]:
    maskable = np.arange(size) % 3 != 0
    lengths = [size // 4, size - size // 4]
    documents = NoisyDocuments([3, 9], [0, 2], [0, 0], [0, 1], lengths, maskable)
    schedule = NoiseSchedule(EPS, num_views=num_views, complementary=complementary)
    return draw_views(schedule, NoiseKey(7, 1), documents, BLOCK)


def test_one_view_is_the_plain_draw() -> None:
    maskable = np.arange(4000) % 3 != 0
    plain = draw_noises(NoiseKey(7, 1), [3, 9], [0, 2], [1000, 3000], maskable, EPS)
    for (view,), draw in zip(views(1, False), plain, strict=True):
        assert view.mask_prob == draw.mask_prob
        assert np.array_equal(view.masked, draw.masked)


def test_views_are_independent_and_the_first_ones_do_not_depend_on_their_number() -> None:
    two, three = views(2, False), views(3, False)
    for few, more in zip(two, three, strict=True):
        assert len({draw.mask_prob for draw in more}) == 3
        for ours, theirs in zip(few, more, strict=False):
            assert ours.mask_prob == theirs.mask_prob
            assert np.array_equal(ours.masked, theirs.masked)


@pytest.mark.parametrize("num_views", [2, 3, 4])
def test_pairs_mask_every_maskable_token_once(num_views: int) -> None:
    maskable = np.split(np.arange(4000) % 3 != 0, [1000])
    for draws, allowed in zip(views(num_views, True), maskable, strict=True):
        assert len(draws) == num_views
        for first, second in zip(draws[0::2], draws[1::2], strict=False):
            assert np.array_equal(first.masked ^ second.masked, allowed)
            assert not (first.masked & second.masked).any()
            assert first.mask_prob + second.mask_prob == pytest.approx(1.0, abs=1e-15)
            assert min(first.mask_prob, second.mask_prob) >= EPS
            assert first.masked[allowed].mean() == pytest.approx(first.mask_prob, abs=0.06)
    assert len({draws[0].mask_prob for draws in views(4, True)}) == 2
