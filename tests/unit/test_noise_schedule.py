"""Noise schedules: every t is uniform, strata are covered, weights and ranges are what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_sdar.diffusion.noise import NoiseDraw, NoiseKey, draw_noises
from megatron_sdar.diffusion.noise_schedule import NoiseSchedule, NoisyDocuments, draw_views

EPS, BLOCK = 1e-3, 4
PUBLISHED = NoiseSchedule(EPS)
STRATIFIED = replace(PUBLISHED, sampling="stratified")
PER_BLOCK = replace(PUBLISHED, level_per="block")
BOTH = replace(STRATIFIED, level_per="block")
EVERY = [PUBLISHED, STRATIFIED, PER_BLOCK, BOTH]


def name(schedule: NoiseSchedule) -> str:
    return f"{schedule.level_per}-{schedule.sampling}"


def documents(
    count: int, num_blocks: int = 1, *, first: int = 0, part: int = 0, prompt: int = 0
) -> NoisyDocuments:
    """COUNT documents in order from place FIRST on; their ids have nothing to do with it."""
    maskable = np.tile(np.arange(num_blocks * BLOCK) >= prompt, count)
    ids = [(7919 * (first + number)) % 100_003 for number in range(count)]
    places = range(first, first + count)
    lengths = [num_blocks * BLOCK] * count
    return NoisyDocuments(ids, [0] * count, [part] * count, places, lengths, maskable)


def draw(
    schedule: NoiseSchedule, drawn: NoisyDocuments, epoch: int = 0, seed: int = 5
) -> list[tuple[NoiseDraw, ...]]:
    return draw_views(schedule, NoiseKey(seed, epoch), drawn, BLOCK)


def levels(views: Sequence[tuple[NoiseDraw, ...]]) -> NDArray[np.float64]:
    """t of every document, view and block, flat."""
    probs = np.concatenate([np.atleast_1d(each.mask_prob) for draws in views for each in draws])
    return (probs - EPS) / (1 - EPS)


def distance(values: NDArray[np.float64]) -> float:
    """Kolmogorov-Smirnov distance from the uniform distribution on [0, 1)."""
    ordered, ranks = np.sort(values), np.arange(values.size)
    above = (ranks + 1) / values.size - ordered
    return float(max((ordered - ranks / values.size).max(), above.max()))


def test_the_default_is_the_published_draw_bit_for_bit() -> None:
    drawn = documents(9, 5, prompt=6)
    plain = draw_noises(NoiseKey(5, 2), drawn.ids, drawn.pieces, drawn.lengths, drawn.maskable, EPS)
    for (view,), expected in zip(draw(PUBLISHED, drawn, 2), plain, strict=True):
        assert view.mask_prob == expected.mask_prob
        assert np.array_equal(view.masked, expected.masked)
        assert view.flat_prob is None


@pytest.mark.parametrize("schedule", EVERY, ids=name)
def test_t_of_one_document_is_uniform_over_epochs(schedule: NoiseSchedule) -> None:
    """A late document and a late block of it: what a shift per epoch must achieve."""
    one = documents(1, 6, first=1234)
    last = np.array([levels(draw(schedule, one, epoch))[-1] for epoch in range(1500)])
    assert last.min() >= 0
    assert last.max() < 1
    # Kolmogorov-Smirnov at the 0.1% level.
    assert distance(last) < 1.95 / np.sqrt(last.size)


@pytest.mark.parametrize("num_views", [1, 3])
@pytest.mark.parametrize("size", [5, 8, 21, 40])
def test_any_run_of_documents_covers_the_levels(size: int, num_views: int) -> None:
    schedule = replace(STRATIFIED, num_views=num_views)
    count = size * num_views
    for first in (0, 1, 17, 10_000):
        t = np.sort(levels(draw(schedule, documents(size, first=first))))
        gaps = np.diff([*t, t[0] + 1])
        assert t.size == count
        assert gaps.max() < 2.7 / count
        assert gaps.min() > 0.3 / count
        assert distance(t) < 3.0 / count
    if count > 20:
        alone = np.sort(levels(draw(replace(schedule, sampling="uniform"), documents(size))))
        gaps = np.diff([*alone, alone[0] + 1])
        assert gaps.max() > 2.7 / count, "it would hold without strata too"


def test_blocks_of_every_document_cover_the_levels() -> None:
    views = draw(BOTH, documents(12, 34, first=50))
    for each in views:
        assert distance(levels([each])) < 2.0 / 34
    starts = np.array([levels([each])[0] for each in views])
    assert distance(starts) < 4.0 / starts.size, "documents begin at levels of their own"
    assert distance(levels(views)) < 0.02


def test_blocks_drawn_alone_are_independent() -> None:
    t = levels(draw(PER_BLOCK, documents(400, 10))).reshape(400, 10) - 0.5
    limit = 4.5 / np.sqrt(t[:, 1:].size)
    for shift in (1, 2, 5):
        pairs = t[:, :-shift].ravel(), t[:, shift:].ravel()
        assert abs(np.corrcoef(*pairs)[0, 1]) < limit, shift
    neighbours = np.corrcoef(t[:-1].ravel(), t[1:].ravel())[0, 1]
    assert abs(neighbours) < limit
    assert distance(t.ravel() + 0.5) < 1.95 / np.sqrt(t.size)


def test_the_level_of_a_block_says_nothing_of_tokens_elsewhere() -> None:
    count, blocks = 2000, 6
    views = draw(PER_BLOCK, documents(count, blocks))
    t = levels(views).reshape(count, blocks)
    masked = np.stack([view.masked for (view,) in views]).astype(float)
    correlation = np.corrcoef(t.T, masked.T)[:blocks, blocks:].reshape(blocks, blocks, BLOCK)
    own = np.eye(blocks, dtype=bool)
    assert correlation[own].min() > 0.5
    assert np.abs(correlation[~own]).max() < 5 / np.sqrt(count)


def test_a_block_keeps_its_draw_when_the_document_is_cut() -> None:
    for schedule in (PER_BLOCK, BOTH):
        ((whole,),) = draw(schedule, documents(1, 9))
        ((cut,),) = draw(schedule, documents(1, 4))
        assert np.array_equal(cut.mask_prob, np.asarray(whole.mask_prob)[:4])
        assert np.array_equal(cut.masked, whole.masked[: 4 * BLOCK])


@pytest.mark.parametrize("schedule", EVERY, ids=name)
def test_the_draw_does_not_depend_on_who_is_drawn_along(schedule: NoiseSchedule) -> None:
    schedule = replace(schedule, num_views=2)
    whole = draw(schedule, documents(10, 3, first=4))
    parts = [*draw(schedule, documents(3, 3, first=4)), *draw(schedule, documents(7, 3, first=7))]
    for ours, theirs in zip(whole, parts, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            assert np.array_equal(one.mask_prob, two.mask_prob)
            assert np.array_equal(one.masked, two.masked)


def test_seeds_epochs_and_datasets_of_a_blend_have_shifts_of_their_own() -> None:
    firsts = [
        levels(draw(STRATIFIED, documents(1, part=part), epoch, seed))[0]
        for part in (0, 1)
        for epoch in (0, 1)
        for seed in (5, 6)
    ]
    assert np.unique(firsts).size == 8


@pytest.mark.parametrize("schedule", EVERY, ids=name)
def test_the_masked_fraction_is_p_in_every_block(schedule: NoiseSchedule) -> None:
    drawn = documents(600, 8)
    p = EPS + (1 - EPS) * levels(draw(schedule, drawn))
    masked = np.stack([view.masked for (view,) in draw(schedule, drawn)]).reshape(600, 8, BLOCK)
    p = p.reshape(600, -1, 1)
    deviations = (masked - p).sum(axis=(0, 2)) / np.sqrt((BLOCK * p * (1 - p)).sum(axis=(0, 2)))
    # Standard normal, 8 of them.
    assert np.abs(deviations).max() < 4.5
    assert not np.array_equal(masked[:, 0], masked[:, 1])


@pytest.mark.parametrize("schedule", EVERY, ids=name)
@pytest.mark.parametrize(("low", "high"), [(EPS, 1.0), (0.3, 0.8)])
def test_p_lies_in_its_range_and_weights_have_mean_one(
    schedule: NoiseSchedule, low: float, high: float
) -> None:
    drawn = documents(3000, 4)
    for weight in ("inverse_p", "flat"):
        chosen = replace(schedule, low=low, high=high, loss_weight=weight)
        p, total = [], 0.0
        for (view,) in draw(chosen, drawn):
            p.append(np.atleast_1d(view.mask_prob))
            weights = np.broadcast_to(1 / np.asarray(view.loss_prob), p[-1].shape)
            total += float(
                (np.repeat(weights, view.masked.size // weights.size) * view.masked).sum()
            )
            if weight == "flat":
                assert np.unique(weights).tolist() == [2 / (low + high)]
        every = np.concatenate(p)
        assert low <= every.min() < low + 0.01
        assert high - 0.01 < every.max() <= high
        # 1/p near eps is heavy-tailed.
        assert total / drawn.maskable.size == pytest.approx(1, abs=0.1 if low == EPS else 0.03)


@pytest.mark.parametrize("schedule", EVERY, ids=name)
@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize(("low", "high"), [(EPS, 1.0), (0.3, 0.6), (0.45, 0.95)])
def test_complements_mask_what_is_left_within_the_range(
    schedule: NoiseSchedule, num_views: int, low: float, high: float
) -> None:
    chosen = replace(
        schedule, low=low, high=high, num_views=num_views, complementary=True, loss_weight="flat"
    )
    maskable = np.arange(12) >= 3
    for views in draw(chosen, documents(40, 3, prompt=3)):
        first, second = views[:2]
        assert np.array_equal(first.masked ^ second.masked, maskable)
        assert np.asarray(first.mask_prob) + second.mask_prob == pytest.approx(1.0)
        for view in views:
            assert (np.asarray(view.mask_prob) >= low - 1e-12).all()
            assert (np.asarray(view.mask_prob) <= high + 1e-12).all()
        assert first.flat_prob == second.flat_prob == pytest.approx(0.5)
        if num_views == 3:
            assert views[2].flat_prob == pytest.approx((low + high) / 2)
