"""Keys and values of decoded sequences, and attention over them.

While a model decodes, a forward holds only tokens whose keys and values are not final yet:
`CachedTokens` says where they lie, and takes the place of a training mask. Each layer writes the
forward's keys and values to their places and then reads its sequences' from the beginning, so a
block that runs again simply overwrites itself. Block-causal: a token sees its sequence up to the
end of its own block.
Shapes: R sequences, T tokens of a forward, K key heads of this tp rank, G query heads per key
head, H head_dim, S positions that a forward may see, W longest run of one sequence in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyValueCache:
    """Keys and values of R sequences of at most `capacity` tokens, layer by layer.

    Memory on this rank: 2 * its layers * R * capacity * K * H elements of the compute dtype,
    allocated by the first forward. The sequences' slots are rows 0 .. R - 1.
    """

    def __init__(self, num_rows: int, capacity: int) -> None:
        self._shape = (num_rows, capacity)
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def write(
        self, layer: nn.Module, rows: Tensor, positions: Tensor, k_TKH: Tensor, v_TKH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put a forward's keys and values in their places; returns all, each [R, K, capacity, H].

        A place that occurs twice in `rows` and `positions` [T] is given the same values twice.
        """
        if layer not in self._layers:
            num_rows, capacity = self._shape
            shape = (num_rows, k_TKH.shape[1], capacity, k_TKH.shape[2])
            # Zeros, since hidden keys get weight 0 and 0 * NaN would be NaN.
            self._layers[layer] = (k_TKH.new_zeros(shape), v_TKH.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[rows, :, positions] = k_TKH
        values[rows, :, positions] = v_TKH
        return keys, values

    def move(self, source: int, target: int) -> None:
        """Sequence `source` takes the slot `target`, whose own is over."""
        for tensors in self._layers.values():
            for tensor in tensors:
                tensor[target] = tensor[source]


@dataclass(frozen=True)
class CachedTokens:
    """Where the tokens of one forward lie, and what each may see.

    Attributes:
        cache: of all sequences.
        first_row: the forward's sequences lie in successive slots from here on.
        key_mask: bool [sequences of the forward, 1, W, S].
        rows, columns: int64 [T], each token's place in the first and third axis of key_mask.
        positions: int64 [T], each token's position in its sequence.
    """

    cache: KeyValueCache
    first_row: int
    key_mask: Tensor
    rows: Tensor
    columns: Tensor
    positions: Tensor

    @classmethod
    def at(
        cls,
        cache: KeyValueCache,
        first_row: int,
        starts: Sequence[int],
        lengths: Sequence[int],
        block_length: int,
        device: torch.device,
    ) -> CachedTokens:
        """Per sequence from `first_row` on, `lengths` tokens from position `starts` on."""
        num_sequences = len(starts)
        columns = [column for length in lengths for column in range(length)]
        offsets = torch.arange(max(lengths), device=device)
        # Columns behind a shorter run see keys too, since a query without any would be NaN.
        places = torch.tensor(starts, device=device).unsqueeze(1) + offsets
        ends = (places // block_length + 1) * block_length
        num_keys = max(start + length for start, length in zip(starts, lengths, strict=True))
        num_keys = -(-num_keys // block_length) * block_length
        seen = torch.arange(num_keys, device=device) < ends.unsqueeze(-1)
        rows = torch.arange(num_sequences, device=device)
        token_rows = rows.repeat_interleave(torch.tensor(lengths, device=device))
        token_columns = torch.tensor(columns, device=device)
        return cls(
            cache,
            first_row,
            seen.unsqueeze(1),
            token_rows,
            token_columns,
            places[token_rows, token_columns],
        )

    @property
    def num_tokens(self) -> int:
        return int(self.rows.shape[0])

    def select(self, indices: Tensor) -> CachedTokens:
        """The tokens at `indices` [M] of the forward; a token may occur several times."""
        return replace(
            self,
            rows=self.rows[indices],
            columns=self.columns[indices],
            positions=self.positions[indices],
        )

    def attend(
        self, layer: nn.Module, q_MNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, written: CachedTokens
    ) -> Tensor:
        """Attention of these M tokens to their sequences: [M, query heads, H].

        Args:
            layer: whose keys and values they are.
            k_TKH, v_TKH: of the tokens `written`, put into the cache first.
        """
        num_sequences, _, width, num_keys = self.key_mask.shape
        slots = written.rows + written.first_row
        keys, values = self.cache.write(layer, slots, written.positions, k_TKH, v_TKH)
        mine = slice(self.first_row, self.first_row + num_sequences)
        keys, values = keys[mine, :, :num_keys], values[mine, :, :num_keys]
        num_kv_heads, head_dim = k_TKH.shape[1:]
        groups = q_MNH.shape[1] // num_kv_heads
        grid = q_MNH.new_zeros(num_sequences, num_kv_heads, groups, width, head_dim)
        places = (self.rows, slice(None), slice(None), self.columns)
        grid[places] = q_MNH.view(-1, num_kv_heads, groups, head_dim)
        # The query heads of a key head become queries of one head, so that keys are not repeated.
        out = F.scaled_dot_product_attention(
            grid.flatten(2, 3), keys, values, attn_mask=self.key_mask.repeat(1, 1, groups, 1)
        )
        return out.view(grid.shape)[places].reshape(q_MNH.shape)
