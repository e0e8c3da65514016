"""Noise depends on (seed, epoch, document, piece, view) only, is uniform and independent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_sdar.diffusion.noise import (
    NoiseKey,
    PhiloxStreams,
    draw_noise,
    draw_noises,
    epoch_order,
    uniforms,
)

EPS = 1e-3
KEY = NoiseKey(seed=42, epoch=0)


def _everything(length: int) -> NDArray[np.bool_]:
    return np.ones(length, dtype=bool)


def _picture(masked: NDArray[np.bool_]) -> str:
    return "".join("X" if m else "." for m in masked)


def test_the_generator_is_pinned() -> None:
    # These values may never change: a resumed run would go on with other noise.
    assert [value.hex() for value in uniforms(NoiseKey(7, 3, 1), 42, 3)] == [
        "0x1.2185732a31328p-4",
        "0x1.31c4cb539d832p-2",
        "0x1.d00f251cae736p-2",
    ]
    first = draw_noise(KEY, 5, _everything(24), EPS)
    assert first.mask_prob == 0.04717941102640726
    assert _picture(first.masked) == "........X..............."
    second = draw_noise(NoiseKey(42, 1, 1), 2**40, _everything(24), EPS)
    assert second.mask_prob == 0.7427691521117814
    assert _picture(second.masked) == "XXX...XXXXXXXXX.XXX.X.XX"


def numpys_words(
    seed: int, epoch: int, stream: tuple[int, int, int], count: int
) -> NDArray[np.uint64]:
    """The words of a generator made for this stream alone."""
    return np.random.Philox(
        key=np.array([seed, epoch], dtype=np.uint64),
        counter=np.array([0, *stream], dtype=np.uint64),
    ).random_raw(count)


def test_streams_read_in_any_order_are_numpys() -> None:
    streams = PhiloxStreams(2**63 + 5, 3)
    for stream, count in [
        ((0, 5, 0), 7),
        ((0, 5, 0), 1),
        ((1, 0, 0), 4),
        ((0, 2**40, 1), 201),
        ((0, 2**63 + 1, 2**64 - 1), 2),
        ((3, 0, 0), 0),
        ((0, 5, 0), 9),
    ]:
        words = streams.words(stream, count)
        assert words.dtype == np.uint64
        assert np.array_equal(words, numpys_words(2**63 + 5, 3, stream, count)), stream


def test_many_documents_at_once_draw_what_each_draws_alone() -> None:
    rng = np.random.default_rng(0)
    key = NoiseKey(7, 2, 1)
    lengths = [9, 1, 0, 40, 4]
    ids, pieces = [3, 2**40, 3, 0, 3], [0, 0, 1, 0, 2]
    maskable = rng.random(sum(lengths)) < 0.8
    draws = draw_noises(key, ids, pieces, lengths, maskable, EPS)
    parts = np.split(maskable, np.cumsum(lengths)[:-1])
    for document, piece, part, draw in zip(ids, pieces, parts, draws, strict=True):
        words = numpys_words(7, 2, (0, document, 1 | piece << 32), 1 + part.size).tolist()
        t, *levels = [(word >> 11) / 2**53 for word in words]
        assert draw.mask_prob == (1 - EPS) * t + EPS
        expected = [bool(m) and u < draw.mask_prob for m, u in zip(part, levels, strict=True)]
        assert draw.masked.tolist() == expected
        alone = draw_noise(key, document, part, EPS, piece)
        assert alone.mask_prob == draw.mask_prob
        assert np.array_equal(alone.masked, draw.masked)


def test_the_epoch_order_is_pinned() -> None:
    assert epoch_order(12, 42, 0).tolist() == [8, 5, 4, 0, 1, 11, 7, 6, 10, 2, 9, 3]
    assert epoch_order(12, 42, 1).tolist() == [6, 4, 3, 2, 8, 1, 7, 11, 10, 0, 5, 9]


def test_the_draw_does_not_depend_on_what_was_drawn_before() -> None:
    alone = draw_noise(KEY, 3, _everything(40), EPS)
    np.random.default_rng(0).random(5)
    for document in (0, 7, 3, 1):
        again = draw_noise(KEY, document, _everything(40), EPS)
        if document == 3:
            assert again.mask_prob == alone.mask_prob
            assert np.array_equal(again.masked, alone.masked)


def test_a_token_keeps_its_draw_when_the_document_is_cut() -> None:
    whole = draw_noise(KEY, 3, _everything(40), EPS)
    cut = draw_noise(KEY, 3, _everything(16), EPS)
    assert cut.mask_prob == whole.mask_prob
    assert np.array_equal(cut.masked, whole.masked[:16])


def test_tokens_that_may_not_be_masked_stay_clean_and_leave_the_others_alone() -> None:
    maskable = np.arange(60) % 3 != 0
    some = draw_noise(replace(KEY, view=1), 9, maskable, EPS)
    every = draw_noise(replace(KEY, view=1), 9, _everything(60), EPS)
    assert some.mask_prob == every.mask_prob
    assert every.masked.any()
    assert np.array_equal(some.masked, every.masked & maskable)


def test_a_document_without_maskable_tokens_stays_clean() -> None:
    assert not draw_noise(KEY, 0, np.zeros(30, dtype=bool), EPS).masked.any()


def test_t_is_uniform_over_documents() -> None:
    draws = [draw_noise(KEY, document, _everything(0), EPS) for document in range(4000)]
    probabilities = np.array([draw.mask_prob for draw in draws])
    t = np.sort((probabilities - EPS) / (1 - EPS))
    assert t[0] >= 0
    assert t[-1] < 1
    # Kolmogorov-Smirnov at the 0.1% level: 1.95 / sqrt(n).
    ranks = np.arange(t.size)
    distance = max((t - ranks / t.size).max(), ((ranks + 1) / t.size - t).max())
    assert distance < 1.95 / np.sqrt(t.size)


@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_p_goes_from_eps_to_one(eps: float) -> None:
    key = replace(KEY, epoch=3)
    for document in range(50):
        t = float(uniforms(key, document, 1)[0])
        probability = draw_noise(key, document, _everything(4), eps).mask_prob
        assert probability == pytest.approx(eps + (1 - eps) * t, rel=1e-12)
        assert eps <= probability <= 1


def test_the_masked_fraction_is_p() -> None:
    length, deviations = 512, []
    for document in range(400):
        draw = draw_noise(KEY, document, _everything(length), EPS)
        sigma = np.sqrt(draw.mask_prob * (1 - draw.mask_prob) / length)
        deviations.append((draw.masked.mean() - draw.mask_prob) / sigma)
    # Standard normal: mean within 4 / sqrt(400), spread near 1, and no outlier.
    assert abs(np.mean(deviations)) < 0.2
    assert 0.85 < np.std(deviations) < 1.15
    assert np.abs(deviations).max() < 5


def _stream(key: NoiseKey, document: int, piece: int = 0) -> NDArray[np.float64]:
    return uniforms(key, document, 4096, piece) - 0.5


@pytest.mark.parametrize(
    ("key", "document", "piece"),
    [
        (KEY, 1, 0),
        (KEY, 2**33, 0),
        (KEY, 0, 1),
        (KEY, 0, 2**20),
        (replace(KEY, epoch=1), 0, 0),
        (replace(KEY, view=1), 0, 0),
        (replace(KEY, seed=43), 0, 0),
        (NoiseKey(seed=0, epoch=42), 0, 0),
    ],
)
def test_other_documents_pieces_epochs_views_and_seeds_are_uncorrelated(
    key: NoiseKey, document: int, piece: int
) -> None:
    ours, theirs = _stream(KEY, 0), _stream(key, document, piece)
    limit = 4.5 / np.sqrt(ours.size)
    for shift in (-4, -1, 0, 1, 4):  # overlapping counter streams would be equal when shifted
        correlation = np.corrcoef(ours, np.roll(theirs, shift))[0, 1]
        assert abs(correlation) < limit, f"shift {shift}"


def test_neighbouring_streams_share_no_value() -> None:
    streams = [
        uniforms(NoiseKey(seed, epoch, view), document, 64)
        for seed in (0, 1)
        for epoch in (0, 1)
        for view in (0, 1)
        for document in range(8)
    ]
    values = np.concatenate(streams)
    assert np.unique(values).size == values.size


@pytest.mark.parametrize("num_rows", [1, 2, 17, 1000])
def test_an_epoch_order_is_a_permutation(num_rows: int) -> None:
    assert np.array_equal(np.sort(epoch_order(num_rows, 1, 2)), np.arange(num_rows))


def test_epochs_seeds_and_parts_have_different_orders() -> None:
    orders = {
        tuple(epoch_order(50, seed, epoch, part))
        for seed in range(3)
        for epoch in range(3)
        for part in range(3)
    }
    assert len(orders) == 27


def test_an_epoch_order_favours_no_place() -> None:
    firsts = np.array([epoch_order(10, 0, epoch)[0] for epoch in range(2000)])
    counts = np.bincount(firsts, minlength=10)
    # Chi square with 9 degrees of freedom: 27.9 is the 0.1% level.
    assert ((counts - 200) ** 2 / 200).sum() < 27.9
