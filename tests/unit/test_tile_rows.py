"""Rows written as stretches of tokens are rows written by index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sdar_kernels.tile_rows import Rows

HEADS, TOKENS, COLUMNS = 3, 40, 2

# Tokens [entries, num_tokens], and into how many stretches an entry falls (0: by index).
CASES = {
    "a document": ([[4, 5, 6, 7]], 1),
    "two copies": ([[0, 1, 2, 20, 21]], 2),
    "two copies of equal documents": ([[0, 1, 20, 21], [2, 3, 22, 23], [4, 5, 24, 25]], 2),
    "blocks one behind the other": ([[8, 9], [10, 11], [12, 13], [14, 15]], 1),
    "the last key repeated": ([[3, 4, 5, 3, 3]], 3),
    "unequal steps": ([[0, 1], [2, 3], [7, 8]], 0),
    "unlike entries": ([[0, 1, 9], [3, 4, 13]], 0),
    "entries that overlap": ([[0, 1, 2], [1, 2, 3]], 0),
    "entries in descending order": ([[6, 7], [3, 4]], 0),
    "many pieces": ([[0, 2, 4, 6, 8]], 0),
}


def _rows(tokens: list[list[int]]) -> Rows:
    return Rows.of_tokens(np.array(tokens), HEADS, torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_stretches_are_found_where_a_view_may_add(name: str) -> None:
    tokens, stretches = CASES[name]
    assert len(_rows(tokens).stretches) == stretches


@pytest.mark.parametrize("name", CASES)
def test_every_part_is_read_and_written_as_by_index(name: str) -> None:
    tokens, _ = CASES[name]
    rows = _rows(tokens)
    entries, num_tokens = len(tokens), len(tokens[0])
    batch = [
        (start, end)
        for start in range(entries * HEADS)
        for end in range(start + 1, entries * HEADS + 1)
    ]
    parts = [(start, end, 0, num_tokens) for start, end in batch]
    parts += [
        (entry, entry + 1, first, last)
        for entry in range(entries * HEADS)
        for first in range(num_tokens)
        for last in range(first + 1, num_tokens + 1)
    ]
    generator = torch.Generator().manual_seed(0)
    # Not the beginning of its storage, as a view of a larger tensor is not.
    source = torch.randn(HEADS * TOKENS + 1, COLUMNS, generator=generator)[1:]
    for part in parts:
        piece = rows.part(*part)
        wide = np.array(tokens)[:, None] * HEADS + np.arange(HEADS)[:, None]
        expected = wide.reshape(-1, num_tokens)[part[0] : part[1], part[2] : part[3]].ravel()
        assert piece.index.tolist() == expected.tolist(), part
        values = torch.randn(len(expected), COLUMNS, generator=generator)
        gathered = piece.gather(source, torch.empty_like(values))
        assert torch.equal(gathered, source[piece.index]), part
        added, by_index = source.clone(), source.clone()
        piece.add(added, values)
        by_index.index_add_(0, piece.index, values)
        assert torch.allclose(added, by_index, rtol=0, atol=1e-6), part
        if len(set(expected.tolist())) == len(expected):
            put, by_index = source.clone(), source.clone()
            piece.put(put, values)
            by_index.index_copy_(0, piece.index, values)
            assert torch.equal(put, by_index), part


def test_no_tokens() -> None:
    rows = Rows.of_tokens(np.zeros((1, 0), dtype=np.int64), HEADS, torch.device("cpu"))
    assert rows.stretches == ()
    target = torch.ones(HEADS, COLUMNS)
    rows.put(target, target[:0])
    assert torch.equal(target, torch.ones(HEADS, COLUMNS))
