"""The evaluation's noise: fixed, stratified, apart for each document and level."""

from __future__ import annotations

import numpy as np

from megatron_sdar.diffusion.evaluation_noise import evaluation_noises, level_edges

EVERYTHING = np.ones(5000, dtype=bool)


def test_a_level_draws_from_its_own_range_and_masks_as_often() -> None:
    shares = []
    for document in range(200):
        for level, noise in enumerate(evaluation_noises(document, 0, EVERYTHING, range(4), 4)):
            t = (float(noise.mask_prob) - 1e-3) / (1 - 1e-3)
            assert level_edges(4)[level] <= t < level_edges(4)[level] + 0.25
            assert noise.loss_prob == noise.mask_prob, "weighs 1/p"
            # Five standard deviations of a share of 5000 tokens.
            assert abs(noise.masked.mean() - noise.mask_prob) < 5 * 0.5 / 5000**0.5
            shares.append(4 * t % 1)
    # Uniform inside the ranges: mean and variance of 800 draws.
    assert abs(np.mean(shares) - 0.5) < 5 * 12**-0.5 / 800**0.5
    assert abs(np.var(shares) - 1 / 12) < 0.02


def test_draws_depend_on_document_piece_and_level_only() -> None:
    whole = evaluation_noises(7, 0, EVERYTHING, range(4), 4)
    np.random.default_rng(0)
    np.random.seed(1)
    (alone,) = evaluation_noises(7, 0, EVERYTHING, [2], 4)
    assert alone.mask_prob == whole[2].mask_prob
    assert np.array_equal(alone.masked, whole[2].masked)
    others = [
        evaluation_noises(8, 0, EVERYTHING, [2], 4)[0],
        evaluation_noises(7, 1, EVERYTHING, [2], 4)[0],
        evaluation_noises(7, 0, EVERYTHING, [4], 8)[0],
        whole[1],
    ]
    for other in others:
        # Draws that share their words agree on all tokens between both p.
        uncertain = EVERYTHING & (alone.masked != other.masked)
        independent = 2 * alone.masked.mean() * other.masked.mean()
        expected = alone.masked.mean() + other.masked.mean() - independent
        assert abs(uncertain.mean() - expected) < 0.05


def test_a_longer_document_begins_as_a_shorter_one() -> None:
    """So another block length, which pads more, masks the same of the document itself."""
    (short,) = evaluation_noises(3, 0, EVERYTHING[:40], [1], 4)
    (long,) = evaluation_noises(3, 0, EVERYTHING[:48], [1], 4)
    assert short.mask_prob == long.mask_prob
    assert np.array_equal(short.masked, long.masked[:40])


def test_prompts_stay_clean() -> None:
    maskable = np.arange(5000) >= 3000
    for noise in evaluation_noises(1, 0, maskable, range(4), 4):
        assert not noise.masked[:3000].any()
        assert noise.masked[3000:].any()


def test_the_noise_is_the_same_in_every_version() -> None:
    """Losses of different versions are compared: changing this needs a note in the changelog."""
    noises = evaluation_noises(5, 2, EVERYTHING[:64], range(2), 2)
    found = [(round(float(each.mask_prob), 12), int(each.masked.sum())) for each in noises]
    assert found == [(0.289922761881, 19), (0.762118973605, 43)]
