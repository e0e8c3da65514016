"""The noise of an evaluation: fixed, and spread evenly over the noise levels.

The t of a document is stratified: level s of N draws one t from [s / N, (s + 1) / N). All draws
follow from a seed of their own, the document and the level, never from the run, its step or its
rows, so two evaluations differ by the weights only. The range of p is the published one whatever
is trained with, and a masked token weighs 1/p: the mean over t bounds the likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.diffusion.noise import (
    NoiseDraw,
    NoiseKey,
    mask_tokens,
    noise_words,
    to_uniforms,
)

EVALUATION_SEED = 20251006
LOWEST_PROB = 1e-3


def level_edges(num_levels: int) -> list[float]:
    """Where each noise level's range of t begins."""
    return [level / num_levels for level in range(num_levels)]


def evaluation_noises(
    document_id: int,
    piece: int,
    maskable: NDArray[np.bool_],
    levels: Sequence[int],
    num_levels: int,
) -> tuple[NoiseDraw, ...]:
    """One draw per level.

    Args:
        document_id, piece: of the document in its evaluation set.
        maskable: bool [n]; prompt tokens are False and stay clean.
        levels: which levels, each from 0 to num_levels - 1.
        num_levels: N, into how many ranges [0, 1) is divided.
    """
    draws = []
    for level in levels:
        key = NoiseKey(EVALUATION_SEED, num_levels, level)
        words = noise_words(key, [document_id], [piece], [maskable.size])
        t = (level + float(to_uniforms(words[0][:1])[0])) / num_levels
        prob = (1.0 - LOWEST_PROB) * t + LOWEST_PROB
        draws.append(NoiseDraw(prob, mask_tokens(words, np.full(maskable.size, prob), maskable)))
    return tuple(draws)
