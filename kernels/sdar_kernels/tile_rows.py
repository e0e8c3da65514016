"""Reading and writing the rows of a tile: token vectors of one key head, many tokens at a time.

Rows are gathered by index. Writing by index is several times slower in torch than copying, so
rows that form a few stretches of tokens, as those of a document or of its copies do, are written
through strided views.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A document's copies: clean and up to three noisy views. More are written by index.
_MAX_STRETCHES = 4


@dataclass(frozen=True)
class Rows:
    """Rows of a source [T * K, columns]: [entries, heads, num_tokens], one behind the other.

    Attributes:
        index: int64 [entries * heads * num_tokens], token * K + key head.
        num_tokens: of each entry.
        num_kv_heads: K.
        num_heads, first_head: which of the K heads.
        stretches: (first token, length) in the first entry, one behind the other; empty if the
            tokens are not a few stretches that are the same in every entry but for `step`.
        step: tokens from one entry's to the next one's.
    """

    index: Tensor
    num_tokens: int
    num_kv_heads: int
    num_heads: int
    first_head: int
    stretches: tuple[tuple[int, int], ...]
    step: int

    @classmethod
    def of_tokens(cls, tokens: NDArray[np.int64], num_kv_heads: int, device: torch.device) -> Rows:
        """All heads of tokens [entries, num_tokens]."""
        index = tokens[:, None] * num_kv_heads + np.arange(num_kv_heads)[:, None]
        stretches, step = _stretches(tokens)
        return cls(
            torch.from_numpy(index.ravel()).to(device), tokens.shape[1], num_kv_heads,
            num_kv_heads, 0, stretches, step,
        )  # fmt: skip

    def part(self, start: int, end: int, first: int, last: int) -> Rows:
        """Tokens [first, last) of each of [start, end) of the entries times heads."""
        assert self.num_heads == self.num_kv_heads, "only all heads are divided"
        index = self.index[start * self.num_tokens + first : (end - 1) * self.num_tokens + last]
        entry, head = divmod(start, self.num_kv_heads)
        if end - start <= self.num_kv_heads - head:
            num_heads = end - start
        elif head == 0 and end % self.num_kv_heads == 0:
            num_heads = self.num_kv_heads
        else:
            return replace(self, index=index, num_tokens=last - first, stretches=())
        stretches = []
        at = 0
        for token, length in self.stretches:
            begin, stop = max(first, at), min(last, at + length)
            if begin < stop:
                stretches.append((token + begin - at + entry * self.step, stop - begin))
            at += length
        return replace(
            self, index=index, num_tokens=last - first, num_heads=num_heads, first_head=head,
            stretches=tuple(stretches),
        )  # fmt: skip

    def gather(self, source: Tensor, out: Tensor) -> Tensor:
        """The rows of source, copied to `out`."""
        return torch.index_select(source, 0, self.index, out=out)

    def put(self, target: Tensor, values: Tensor) -> None:
        """target[rows] = values; no row may occur twice."""
        if not self.stretches:
            target.index_copy_(0, self.index, values)
            return
        for part, view in self._views(target, values):
            view.copy_(part)

    def add(self, target: Tensor, values: Tensor) -> None:
        """target[rows] += values."""
        if not self.stretches:
            target.index_add_(0, self.index, values)
            return
        for part, view in self._views(target, values):
            view.add_(part)

    def _views(self, target: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Per stretch: its part of values and of target, [entries, heads, length, columns]."""
        columns = target.shape[1]
        by_entry = values.view(-1, self.num_heads, self.num_tokens, columns)
        token_step = self.num_kv_heads * columns
        strides = (self.step * token_step, columns, token_step, 1)
        at = 0
        for token, length in self.stretches:
            offset = token * token_step + self.first_head * columns
            part = by_entry[:, :, at : at + length]
            yield part, target.as_strided(part.shape, strides, target.storage_offset() + offset)
            at += length


def _stretches(tokens: NDArray[np.int64]) -> tuple[tuple[tuple[int, int], ...], int]:
    """See `Rows`; tokens [entries, num_tokens]."""
    if tokens.size == 0:
        return (), 0
    first = tokens[0]
    step = int(tokens[1, 0] - first[0]) if len(tokens) > 1 else 0
    if (tokens != first + step * np.arange(len(tokens))[:, None]).any():
        return (), 0
    borders = np.flatnonzero(np.diff(first) != 1) + 1
    if len(borders) >= _MAX_STRETCHES:
        return (), 0
    starts = np.concatenate(([0], borders))
    lengths = np.diff(starts, append=len(first))
    if len(tokens) > 1 and step < lengths.max():
        return (), 0  # entries overlap: a view would add to one place several times at once
    return tuple(zip(first[starts].tolist(), lengths.tolist(), strict=True)), step
