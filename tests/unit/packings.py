"""Random packed rows for the mask and attention tests, and the attention rule in words.

Every token of a row is described by a `Token`, written down here without looking at key
intervals, so that the rule can be applied to pairs of tokens and compared with the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sdar_kernels.block_mask import AttentionMask
from torch import Tensor

from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.diffusion.rows import Row, RowDocument, View, build_row, concatenate_rows

MASK_ID, PAD_ID = 999, 0


@dataclass(frozen=True)
class Token:
    """Where a token comes from; `copy` is "clean", "noisy" or "padding"."""

    document: int
    copy: str
    view: int
    block: int


@dataclass(frozen=True)
class Packing:
    """A row, where each of its tokens comes from, and the documents it was made of."""

    row: Row
    tokens: list[Token]
    documents: list[RowDocument]
    block_length: int

    def mask(self) -> AttentionMask:
        return AttentionMask.build(self.row.key_intervals)


def may_see(query: Token, key: Token, same_token: bool) -> bool:
    """The published rule (design: "Attention (BD3-LM)"), in words."""
    if query.copy == "padding" or key.copy == "padding":
        return same_token  # a padding token is a document of its own
    if query.document != key.document:
        return False  # nothing crosses documents
    if query.copy == "clean":
        return key.copy == "clean" and key.block <= query.block
    if key.copy == "clean":
        return key.block < query.block  # clean blocks strictly before it
    return query.view == key.view and query.block == key.block  # its own noisy block


def rule_mask(tokens: list[Token]) -> Tensor:
    """bool [T, T] of the rule."""
    return torch.tensor(
        [[may_see(q, k, i == j) for j, k in enumerate(tokens)] for i, q in enumerate(tokens)]
    )


def random_document(
    rng: np.random.Generator, block_length: int, max_blocks: int, drop: bool
) -> RowDocument:
    """A document with 1 to 3 views; with `drop`, noisy and trailing clean blocks are left out."""
    num_blocks = int(rng.integers(1, max_blocks + 1))
    length = num_blocks * block_length
    ids = rng.integers(1, 900, size=length).astype(np.int32)
    labels = ids.copy()
    labels[: int(rng.integers(0, length))] = -100
    views = []
    for _ in range(int(rng.integers(1, 4))):
        probability = float(rng.uniform(0.05, 1.0))
        masked = (labels != -100) & (rng.random(length) < probability)
        kept = np.arange(num_blocks)
        if drop:
            kept = kept[rng.random(num_blocks) < 0.6]
        views.append(View(NoiseDraw(probability, masked), kept))
    num_clean = num_blocks
    if drop:
        needed = max((int(view.kept_blocks.max(initial=0)) for view in views), default=0)
        num_clean = int(rng.integers(needed, num_blocks + 1))
    return RowDocument(ids, labels, num_clean, tuple(views))


def random_packing(
    seed: int,
    block_length: int,
    *,
    max_documents: int = 4,
    max_blocks: int = 5,
    max_padding: int = 9,
    drop: bool = True,
) -> Packing:
    """A row of several documents and a padding tail (which may be empty)."""
    rng = np.random.default_rng(seed)
    documents = [
        random_document(rng, block_length, max_blocks, drop)
        for _ in range(int(rng.integers(1, max_documents + 1)))
    ]
    return pack(documents, block_length, int(rng.integers(0, max_padding + 1)))


def pack(documents: list[RowDocument], block_length: int, padding: int) -> Packing:
    """Lay out a row and write down where its tokens come from: clean copies, noisy, padding."""
    tokens = [
        Token(index, "clean", -1, block)
        for index, document in enumerate(documents)
        for block in range(document.num_clean_blocks)
        for _ in range(block_length)
    ]
    tokens += [
        Token(index, "noisy", view_index, int(block))
        for index, document in enumerate(documents)
        for view_index, view in enumerate(document.views)
        for block in view.kept_blocks
        for _ in range(block_length)
    ]
    if not tokens:
        padding = max(padding, 1)
    tokens += [Token(-1, "padding", -1, -1)] * padding
    row = build_row(documents, len(tokens), block_length, MASK_ID, PAD_ID)
    return Packing(row, tokens, documents, block_length)


def concatenated(packings: list[Packing]) -> tuple[Row, list[Token]]:
    """Several rows on one token axis; documents keep distinct numbers."""
    tokens = []
    for number, packing in enumerate(packings):
        shift = 1000 * number
        tokens += [Token(t.document + shift, t.copy, t.view, t.block) for t in packing.tokens]
    return concatenate_rows([packing.row for packing in packings]), tokens
