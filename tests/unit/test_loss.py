"""Weights and denominators of the loss, in both normalisations."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sdar.diffusion.loss import block_weights, micro_batch_scales


def test_a_masked_token_weighs_one_over_p() -> None:
    assert block_weights(0.25, 3).tolist() == [4.0, 4.0, 4.0]
    assert block_weights(0.25, 0).shape == (0,)
    assert block_weights(np.array([0.25, 1.0, 0.5]), 3).tolist() == [4.0, 1.0, 2.0]


def test_noise_of_another_block_length_is_refused() -> None:
    with pytest.raises(AssertionError, match="drawn with another block length"):
        block_weights(np.array([0.25, 1.0, 0.5]), 6)


def test_global_is_one_over_the_step_s_label_count_whatever_the_split() -> None:
    assert micro_batch_scales([3, 0, 5], 16, "global", 2) == [1 / 16] * 3


def test_global_loss_does_not_depend_on_the_split() -> None:
    sums, labels = np.array([3.0, 1.0, 8.0, 2.0]), np.array([6, 2, 8, 4])
    whole = sums.sum() / labels.sum()
    for ranks in (1, 2, 4):
        loss = 0.0
        for rank in range(ranks):
            mine = slice(rank, None, ranks)
            scales = micro_batch_scales(labels[mine].tolist(), int(labels.sum()), "global", ranks)
            loss += float((sums[mine] * scales).sum())
        assert loss == pytest.approx(whole, rel=1e-12)


def test_llamafactory_sums_micro_batch_means_and_averages_ranks() -> None:
    # Published: backward of every micro-batch mean, gradients averaged over 2 ranks.
    sums, labels = {0: [3.0, 1.0], 1: [8.0, 2.0]}, {0: [6, 2], 1: [8, 4]}
    published = np.mean(
        [sum(s / n for s, n in zip(sums[rank], labels[rank], strict=True)) for rank in sums]
    )
    ours = 0.0
    for rank, counts in labels.items():
        scales = micro_batch_scales(counts, 20, "llamafactory", 2)
        ours += sum(s * scale for s, scale in zip(sums[rank], scales, strict=True))
    assert ours == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("normalization", ["global", "llamafactory"])
def test_nothing_to_learn_from_contributes_nothing(normalization: str) -> None:
    assert micro_batch_scales([0, 0], 0, normalization, 2) == [0.0, 0.0]


def test_llamafactory_gives_an_empty_micro_batch_no_weight() -> None:
    assert micro_batch_scales([0, 4], 4, "llamafactory", 1) == [0.0, 0.25]


def test_an_unknown_normalization_is_refused() -> None:
    with pytest.raises(AssertionError, match="unvalidated loss_normalization 'mean'"):
        micro_batch_scales([1], 1, "mean", 1)
