"""Noise schedules: how masking probabilities are drawn, and what a masked token then weighs.

The default is the published schedule, bit for bit that of `noise.draw_noises`. Every other one
changes where t comes from or which range p is drawn from; the tokens of a document keep their own
random numbers. As there, nothing depends on rank, worker, row or step: stratified noise follows
from a document's place in the order of its epoch, which is known before rows are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.diffusion.noise import (
    SHIFT_STREAM,
    NoiseDraw,
    NoiseKey,
    block_words,
    mask_tokens,
    noise_words,
    philox_words,
    to_uniforms,
)

Number = TypeVar("Number", bound=np.generic)

# Steps of two Kronecker sequences on the circle of 2^64 points: the fractional parts of the golden
# ratio, whose points lie most evenly at any number of them, and of the square root of 2. Odd.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SILVER = np.uint64(0x6A09E667F3BCC909)


@dataclass(frozen=True)
class NoiseSchedule:
    """How p is drawn, and what it does to the loss.

    Attributes:
        low, high: the range of p = (high - low) t + low, 0 < low < high <= 1.
        level_per: "document": one t for each view of a document; "block": one for each block.
        sampling: "uniform": every t alone; "stratified": consecutive documents of an epoch (and
            the blocks of one) have t spread evenly over [0, 1).
        loss_weight: "inverse_p": a masked token weighs 1/p; "flat": 1 / (mean of p's range).
        num_views: K, noisy copies of a document.
        complementary: view 2j + 1 masks exactly the maskable tokens that view 2j left, with
            probability 1 - p. With an odd K the last view stands alone.
    """

    low: float = 1e-3
    high: float = 1.0
    level_per: str = "document"
    sampling: str = "uniform"
    loss_weight: str = "inverse_p"
    num_views: int = 1
    complementary: bool = False

    def range_of(self, view: int) -> tuple[float, float]:
        """(low, high) of one view: of a complementary pair, where p and 1 - p both lie in it."""
        if not self.is_paired(view):
            return self.low, self.high
        return max(self.low, 1.0 - self.high), min(self.high, 1.0 - self.low)

    def is_paired(self, view: int) -> bool:
        """Whether a view has a complement (or is one)."""
        return self.complementary and view - view % 2 + 1 < self.num_views

    @property
    def num_draws(self) -> int:
        """Views of a document that are drawn; complements follow from them."""
        return self.num_views - self.num_views // 2 if self.complementary else self.num_views

    def flat_prob(self, view: int) -> float | None:
        """What the loss of a view divides by in place of p, so that weights have mean 1."""
        return sum(self.range_of(view)) / 2 if self.loss_weight == "flat" else None


@dataclass(frozen=True)
class NoisyDocuments:
    """D documents (or pieces of them) of one epoch, as noise sees them.

    Attributes:
        ids: global ids in the data set.
        pieces: which part of its document each is, 0 for whole documents.
        parts: which dataset of a blend each is from; they have epochs of their own.
        places: how many documents the epoch of that dataset has before each.
        lengths: tokens of each, multiples of the block length.
        maskable: bool [sum of lengths]; prompt tokens are False and stay clean.
    """

    ids: Sequence[int]
    pieces: Sequence[int]
    parts: Sequence[int]
    places: Sequence[int]
    lengths: Sequence[int]
    maskable: NDArray[np.bool_]


def draw_views(
    schedule: NoiseSchedule, key: NoiseKey, documents: NoisyDocuments, block_length: int
) -> list[tuple[NoiseDraw, ...]]:
    """Per document its K noisy views: independent draws, or pairs that mask each token once.

    Args:
        schedule: what is drawn.
        key: of the first view; the others count on from it.
        documents: whose noise.
        block_length: B, which every length is a multiple of.
    """
    drawn: list[list[NoiseDraw]] = []
    for view in range(schedule.num_views):
        if schedule.is_paired(view) and view % 2:
            drawn.append(_complements(drawn[-1], documents))
        else:
            drawn.append(_draw_view(schedule, key, view, documents, block_length))
    return list(zip(*drawn, strict=True))


def _draw_view(
    schedule: NoiseSchedule,
    key: NoiseKey,
    view: int,
    documents: NoisyDocuments,
    block_length: int,
) -> list[NoiseDraw]:
    low, high = schedule.range_of(view)
    view_key = NoiseKey(key.seed, key.epoch, key.view + view)
    words = noise_words(view_key, documents.ids, documents.pieces, documents.lengths)
    per_block = schedule.level_per == "block"
    num_blocks = [length // block_length for length in documents.lengths]
    if schedule.sampling == "stratified":
        levels = _stratified(schedule, key, view, documents, num_blocks)
    elif per_block:
        levels = np.concatenate(block_words(view_key, documents.ids, documents.pieces, num_blocks))
    else:
        levels = np.array([each[0] for each in words])
    mask_probs = (high - low) * to_uniforms(levels) + low
    repeats = block_length if per_block else documents.lengths
    masked = mask_tokens(words, np.repeat(mask_probs, repeats), documents.maskable)
    probs: Sequence[float | NDArray[np.float64]] = mask_probs.tolist()
    if per_block:
        probs = _parts(mask_probs, num_blocks)
    flat_prob = schedule.flat_prob(view)
    return [
        NoiseDraw(prob, own, flat_prob)
        for prob, own in zip(probs, _parts(masked, documents.lengths), strict=True)
    ]


def _parts(values: NDArray[Number], lengths: Sequence[int]) -> list[NDArray[Number]]:
    """Consecutive parts of these lengths (np.split takes several times as long)."""
    ends = accumulate(lengths)
    return [values[end - length : end] for length, end in zip(lengths, ends, strict=True)]


def _stratified(
    schedule: NoiseSchedule,
    key: NoiseKey,
    view: int,
    documents: NoisyDocuments,
    num_blocks: Sequence[int],
) -> NDArray[np.uint64]:
    """Words of t: uint64 [D], or [sum of num_blocks] with one t per block.

    A Kronecker sequence over the documents of an epoch and the views of each, shifted by one
    random word per epoch and dataset: every t alone is uniform, and any run of consecutive ones
    covers [0, 1) evenly. With one t per block every document runs through such a sequence, from
    a start that is itself a point of one.
    """
    shifts = {
        part: philox_words(key.seed, key.epoch, (SHIFT_STREAM, part, 0), 1)[0]
        for part in set(documents.parts)
    }
    shift = np.array([shifts[part] for part in documents.parts], dtype=np.uint64)
    numbers = np.array(documents.places, dtype=np.uint64) * np.uint64(schedule.num_draws)
    numbers += np.uint64(view // 2 if schedule.complementary else view)
    if schedule.level_per == "document":
        return shift + numbers * _GOLDEN
    blocks = np.concatenate([np.arange(count, dtype=np.uint64) for count in num_blocks])
    return np.repeat(shift + numbers * _SILVER, num_blocks) + blocks * _GOLDEN


def _complements(draws: Sequence[NoiseDraw], documents: NoisyDocuments) -> list[NoiseDraw]:
    maskable = _parts(documents.maskable, documents.lengths)
    return [complement(draw, own) for draw, own in zip(draws, maskable, strict=True)]


def complement(draw: NoiseDraw, maskable: NDArray[np.bool_]) -> NoiseDraw:
    """The view that masks exactly what this one left of the maskable tokens, with 1 - p."""
    return NoiseDraw(1.0 - draw.mask_prob, maskable & ~draw.masked, draw.flat_prob)
