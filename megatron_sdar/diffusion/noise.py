"""Counter-based noise: which tokens of a document are masked, and with what probability.

The draw depends on (seed, epoch, document, piece, view) only, never on rank, worker,
micro-batch or row, so it is the same under every parallel layout and packing and after every
resume, and differs between documents wherever they are processed. Generator: Philox4x64, one
key per (seed, epoch), one counter stream per (document, piece, view). Here is the published
schedule; `noise_schedule` has the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNIFORM_SCALE = 2.0**-53

# First word of a counter stream: what it is drawn for.
NOISE_STREAM, ORDER_STREAM, SPLIT_STREAM, CHOICE_STREAM, GROUP_STREAM = range(5)
BLOCK_STREAM, SHIFT_STREAM = 5, 6
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
        mask_prob: p in (0, 1], the probability every maskable token was masked with; or float64
            [blocks], one per block.
        masked: bool [n], the tokens that became the mask token.
        flat_prob: what the loss divides by instead of p, the same for every token of the
            schedule; None: p.
    """

    mask_prob: float | NDArray[np.float64]
    masked: NDArray[np.bool_]
    flat_prob: float | None = None

    @property
    def loss_prob(self) -> float | NDArray[np.float64]:
        """A masked token weighs 1 / this in the loss."""
        return self.mask_prob if self.flat_prob is None else self.flat_prob


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
    stream = _stream(NOISE_STREAM, key, document_id, piece)
    return to_uniforms(philox_words(key.seed, key.epoch, stream, count))


def epoch_order(num_rows: int, seed: int, epoch: int, part: int = 0) -> NDArray[np.int64]:
    """The permutation of rows in one epoch; other epochs have no influence on it.

    `part` numbers the row sets of a blend: each has its own order. The stream is apart from
    every document's.
    """
    words = philox_words(seed, epoch, (ORDER_STREAM, part, 0), num_rows)
    return np.argsort(words, kind="stable")


def noise_words(
    key: NoiseKey, document_ids: Sequence[int], pieces: Sequence[int], lengths: Sequence[int]
) -> list[NDArray[np.uint64]]:
    """Per document 1 + length random words: of its t, then of every token."""
    streams = PhiloxStreams(key.seed, key.epoch)
    return [
        streams.words(_stream(NOISE_STREAM, key, document_id, piece), 1 + length)
        for document_id, piece, length in zip(document_ids, pieces, lengths, strict=True)
    ]


def block_words(
    key: NoiseKey, document_ids: Sequence[int], pieces: Sequence[int], num_blocks: Sequence[int]
) -> list[NDArray[np.uint64]]:
    """Per document one random word for every block, apart from those of its tokens."""
    streams = PhiloxStreams(key.seed, key.epoch)
    return [
        streams.words(_stream(BLOCK_STREAM, key, document_id, piece), count)
        for document_id, piece, count in zip(document_ids, pieces, num_blocks, strict=True)
    ]


def mask_tokens(
    words: Sequence[NDArray[np.uint64]],
    token_probs: NDArray[np.float64],
    maskable: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Which tokens become the mask token, bool [sum of lengths].

    Args:
        words: of `noise_words`.
        token_probs: float64 [sum of lengths], the masking probability of each token.
        maskable: bool [sum of lengths]; prompt tokens are False and stay clean.
    """
    levels = to_uniforms(np.concatenate([each[1:] for each in words]))
    return maskable & (levels < token_probs)


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
) -> list[NoiseDraw]:
    """Per document: draw t ~ U[0, 1), p = (1 - eps) t + eps, mask each maskable token with p.

    Args:
        key: seed, epoch and view.
        document_ids: global ids of D documents in the data set.
        pieces: which part of its document each is, 0 for whole documents.
        lengths: tokens of each.
        maskable: bool [sum of lengths]; prompt tokens are False and stay clean.
        eps: smallest masking probability (published: 1e-3).

    Formula: BD3-LM's linear schedule as SDAR's published training code applies it, one t per
    document (and per piece).
    """
    words = noise_words(key, document_ids, pieces, lengths)
    t = to_uniforms(np.array([each[0] for each in words]))
    mask_probs = (1.0 - eps) * t + eps
    masked = mask_tokens(words, np.repeat(mask_probs, lengths), maskable)
    ends = np.cumsum(lengths).tolist()
    return [
        NoiseDraw(mask_prob, masked[end - length : end])
        for mask_prob, length, end in zip(mask_probs.tolist(), lengths, ends, strict=True)
    ]


def _stream(purpose: int, key: NoiseKey, document_id: int, piece: int) -> tuple[int, int, int]:
    return purpose, document_id, key.view | piece << _PIECE_SHIFT
