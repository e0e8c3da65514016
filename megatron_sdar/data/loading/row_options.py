"""How documents become rows: what the rows of a stream depend on besides its documents.

A checkpoint keeps these options and a run on others is refused. Options that a checkpoint does not
mention are younger than it and had their default.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import MISSING, dataclass, fields

from megatron_sdar.diffusion.noise_schedule import NoiseSchedule


@dataclass(frozen=True)
class RowOptions:
    """How documents become rows.

    Attributes:
        cutoff_len: document tokens of a row; the row has twice as many positions.
        block_length: what rows are packed for, the largest of `block_lengths`.
        mask_token_id, pad_token_id: special tokens.
        noise_eps: smallest masking probability.
        seed: of noise and order.
        shuffle: False keeps rows in pack order in every epoch.
        semantics: "exact": blocks without a part in the loss are left out and rows are packed by
            what is left (grouped_stream); "paper": both copies whole.
        row_length: tokens of a row with semantics exact; None: room for the longest document
            whatever its noise, (1 + num_views) * cutoff_len.
        num_views, complementary_views, noise_high, noise_level_per, noise_sampling,
            loss_weight: see `NoiseSchedule`; its range begins at noise_eps.
        block_padding_labels: see `packing.pad_to_block`.
        block_lengths: (first_row, block length), ascending from row 0, each length a multiple of
            the one before; empty: block_length throughout.
    """

    cutoff_len: int
    block_length: int
    mask_token_id: int
    pad_token_id: int
    noise_eps: float
    seed: int
    shuffle: bool = True
    semantics: str = "paper"
    row_length: int | None = None
    num_views: int = 1
    complementary_views: bool = False
    noise_high: float = 1.0
    noise_level_per: str = "document"
    noise_sampling: str = "uniform"
    loss_weight: str = "inverse_p"
    block_padding_labels: str = "learn"
    block_lengths: tuple[tuple[int, int], ...] = ()

    @property
    def noise(self) -> NoiseSchedule:
        """How noise is drawn."""
        return NoiseSchedule(
            low=self.noise_eps,
            high=self.noise_high,
            level_per=self.noise_level_per,
            sampling=self.noise_sampling,
            loss_weight=self.loss_weight,
            num_views=self.num_views,
            complementary=self.complementary_views,
        )

    def block_length_at(self, position: int) -> int:
        """The block length of the row at a position of the stream."""
        if not self.block_lengths:
            return self.block_length
        return self.block_lengths[self.phase_at(position)][1]

    def phase_at(self, position: int) -> int:
        """Which of `block_lengths` holds at a position; 0 without any."""
        return max(0, bisect_right(self.block_lengths, position, key=lambda phase: phase[0]) - 1)

    @classmethod
    def defaults(cls) -> dict[str, object]:
        """The options that have one, as JSON."""
        with_default = {key.name: key.default for key in fields(cls) if key.default is not MISSING}
        return {**with_default, "block_lengths": []}
