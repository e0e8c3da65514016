"""Counter-based noise: which tokens of a document are masked, and with what probability.

The draw depends on (seed, epoch, document, piece, view) only, never on rank, worker,
micro-batch or row, so it is the same under every parallel layout and packing and after every
resume, and differs between documents wherever they are processed. Generator: Philox4x64, one
key per (seed, epoch), one counter stream per (document, piece, view).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNIFORM_SCALE = 2.0**-53

# First word of a counter stream: what it is drawn for.
NOISE_STREAM, ORDER_STREAM, SPLIT_STREAM, CHOICE_STREAM, GROUP_STREAM = range(5)
_PIECE_SHIFT = 32


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


class PhiloxStreams:
    """The counter streams of one (seed, epoch), each readable from its start at any time.

    One generator is placed on one counter after the other, since making a generator takes five
    times as long as the draws of a usual document. Not for several threads at once.

    Raw Philox words are used because numpy keeps those, unlike Generator methods, stable
    between versions.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        self._generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
        # The state of a generator that has drawn nothing: no words left in its buffer.
        self._state = self._generator.state
        self._counter: NDArray[np.uint64] = self._state["state"]["counter"]

    def words(self, stream: tuple[int, int, int], count: int) -> NDArray[np.uint64]:
        """The first `count` random words of a stream."""
        self._counter[1], self._counter[2], self._counter[3] = stream
        self._generator.state = self._state
        return self._generator.random_raw(count)


def philox_words(
    seed: int, epoch: int, stream: tuple[int, int, int], count: int
) -> NDArray[np.uint64]:
    """The first `count` random words of one counter stream of (seed, epoch)."""
    return PhiloxStreams(seed, epoch).words(stream, count)


def to_uniforms(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniforms in [0, 1) from random words, 53 bits of each."""
    return (words >> np.uint64(11)).astype(np.float64) * UNIFORM_SCALE


def uniforms(key: NoiseKey, document_id: int, count: int, piece: int = 0) -> NDArray[np.float64]:
    """The first `count` uniforms in [0, 1) of the stream of (key, document_id, piece)."""
    stream = _noise_stream(key, document_id, piece)
    return to_uniforms(philox_words(key.seed, key.epoch, stream, count))


def epoch_order(num_rows: int, seed: int, epoch: int, part: int = 0) -> NDArray[np.int64]:
    """The permutation of rows in one epoch; other epochs have no influence on it.

    `part` numbers the row sets of a blend: each has its own order. The stream is apart from
    every document's.
    """
    words = philox_words(seed, epoch, (ORDER_STREAM, part, 0), num_rows)
    return np.argsort(words, kind="stable")


def draw_noise(
    key: NoiseKey,
    document_id: int,
    maskable: NDArray[np.bool_],
    eps: float,
    piece: int = 0,
) -> NoiseDraw:
    """The noise of one document, see `draw_noises`; maskable is bool [n]."""
    return draw_noises(key, [document_id], [piece], [maskable.size], maskable, eps)[0]


def draw_noises(
    key: NoiseKey,
    document_ids: Sequence[int],
    pieces: Sequence[int],
    lengths: Sequence[int],
    maskable: NDArray[np.bool_],
    eps: float,
    highest: float = 1.0,
) -> list[NoiseDraw]:
    """Per document: draw t ~ U[0, 1), p = (1 - eps) t + eps, mask each maskable token with p.

    Args:
        key: seed, epoch and view.
        document_ids: global ids of D documents in the data set.
        pieces: which part of its document each is, 0 for whole documents.
        lengths: tokens of each.
        maskable: bool [sum of lengths]; prompt tokens are False and stay clean.
        eps: smallest masking probability (published: 1e-3).
        highest: largest masking probability (published: 1): p = (highest - eps) t + eps.

    Formula: BD3-LM's linear schedule as SDAR's published training code applies it, one t per
    document (and per piece).
    """
    streams = PhiloxStreams(key.seed, key.epoch)
    words = [
        streams.words(_noise_stream(key, document_id, piece), 1 + length)
        for document_id, piece, length in zip(document_ids, pieces, lengths, strict=True)
    ]
    t = to_uniforms(np.array([each[0] for each in words]))
    mask_probs = (highest - eps) * t + eps
    levels = to_uniforms(np.concatenate([each[1:] for each in words]))
    masked = maskable & (levels < np.repeat(mask_probs, lengths))
    ends = np.cumsum(lengths).tolist()
    return [
        NoiseDraw(mask_prob, masked[end - length : end])
        for mask_prob, length, end in zip(mask_probs.tolist(), lengths, ends, strict=True)
    ]


def draw_views(
    key: NoiseKey,
    document_ids: Sequence[int],
    pieces: Sequence[int],
    lengths: Sequence[int],
    maskable: NDArray[np.bool_],
    eps: float,
    num_views: int = 1,
    complementary: bool = False,
) -> list[tuple[NoiseDraw, ...]]:
    """Per document its noisy views: independent draws, or pairs that mask each token once.

    Args:
        key: of the first view; the others count on from it.
        document_ids, pieces, lengths, maskable, eps: as in `draw_noises`.
        num_views: K.
        complementary: view 2j + 1 masks exactly the maskable tokens that view 2j left, with
            probability 1 - p. Both are weighted by their own probability, so p is drawn from
            [eps, 1 - eps] there. With an odd K the last view stands alone.
    """
    drawn: list[list[NoiseDraw]] = []
    for view in range(num_views):
        if complementary and view % 2:
            drawn.append([])
            continue
        paired = complementary and view + 1 < num_views
        view_key = NoiseKey(key.seed, key.epoch, key.view + view)
        highest = 1.0 - eps if paired else 1.0
        drawn.append(draw_noises(view_key, document_ids, pieces, lengths, maskable, eps, highest))
    ends = np.cumsum(lengths).tolist()
    for view in range(1, num_views, 2):
        if complementary:
            drawn[view] = [
                NoiseDraw(1.0 - draw.mask_prob, maskable[end - length : end] & ~draw.masked)
                for draw, length, end in zip(drawn[view - 1], lengths, ends, strict=True)
            ]
    return list(zip(*drawn, strict=True))


def _noise_stream(key: NoiseKey, document_id: int, piece: int) -> tuple[int, int, int]:
    return NOISE_STREAM, document_id, key.view | piece << _PIECE_SHIFT
