"""Counter-based noise: which tokens of a document are masked, and with what probability.

The draw depends on (seed, epoch, document, view) only, never on rank, worker, micro-batch or
row, so it is the same under every parallel layout and packing and after every resume, and
differs between documents wherever they are processed. Generator: Philox4x64, one counter
stream per (document, view), one key per (seed, epoch).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNIFORM_SCALE = 2.0**-53


@dataclass(frozen=True)
class NoiseKey:
    """What identifies one noise draw besides the document."""

    seed: int
    epoch: int
    view: int = 0


@dataclass(frozen=True)
class NoiseDraw:
    """One noisy view of a document of n tokens.

    Attributes:
        mask_prob: p in [eps, 1], the probability every maskable token was masked with.
        masked: bool [n], the tokens that became the mask token.
    """

    mask_prob: float
    masked: NDArray[np.bool_]


def philox_words(
    seed: int, epoch: int, stream: tuple[int, int, int], count: int
) -> NDArray[np.uint64]:
    """`count` random words of one counter stream of (seed, epoch).

    Raw Philox words are used because numpy keeps those, unlike Generator methods, stable
    between versions.
    """
    generator = np.random.Philox(
        key=np.array([seed, epoch], dtype=np.uint64),
        counter=np.array([0, *stream], dtype=np.uint64),
    )
    return generator.random_raw(count)


def uniforms(key: NoiseKey, document_id: int, count: int) -> NDArray[np.float64]:
    """`count` uniforms in [0, 1) of the stream of (key, document_id)."""
    words = philox_words(key.seed, key.epoch, (0, document_id, key.view), count)
    return (words >> np.uint64(11)).astype(np.float64) * UNIFORM_SCALE


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of rows in one epoch; other epochs have no influence on it.

    Its stream (1, 0, 0) is apart from every document's (0, document, view).
    """
    return np.argsort(philox_words(seed, epoch, (1, 0, 0), num_rows), kind="stable")


def draw_noise(
    key: NoiseKey, document_id: int, maskable: NDArray[np.bool_], eps: float
) -> NoiseDraw:
    """Draw t ~ U[0, 1), p = (1 - eps) t + eps, and mask each maskable token with p.

    Args:
        key: seed, epoch and view.
        document_id: global id of the document in the data set.
        maskable: bool [n]; prompt tokens are False and stay clean.
        eps: smallest masking probability (published: 1e-3).

    Formula: BD3-LM's linear schedule as SDAR's published training code applies it, one t per
    document.
    """
    draws = uniforms(key, document_id, 1 + maskable.size)
    mask_prob = (1.0 - eps) * float(draws[0]) + eps
    return NoiseDraw(mask_prob, maskable & (draws[1:] < mask_prob))
