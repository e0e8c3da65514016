"""What the configuration says about rows, with steps turned into rows of the stream."""

from __future__ import annotations

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import DataConfig, SdarConfig
from megatron_sdar.config_weights import parse_blend, parse_block_lengths
from megatron_sdar.data.loading.blend import BlendSchedule
from megatron_sdar.data.loading.row_options import RowOptions


def row_options(
    config: SdarConfig, arch: Architecture, pad_token_id: int, rows_per_step: int
) -> RowOptions:
    """How documents become rows.

    Args:
        config: validated configuration.
        arch: the model; its block size is what rows are packed for.
        pad_token_id: of the token files.
        rows_per_step: rows that all data-parallel ranks take in one step.
    """
    assert arch.block_size is not None, "validated"
    assert arch.mask_token_id is not None, "validated"
    diffusion = config.diffusion
    phases: list[tuple[int, int]] = []
    if diffusion.block_length_schedule is not None:
        phases = parse_block_lengths(diffusion.block_length_schedule)
    return RowOptions(
        cutoff_len=config.data.cutoff_len,
        block_length=arch.block_size,
        mask_token_id=arch.mask_token_id,
        pad_token_id=pad_token_id,
        noise_eps=diffusion.noise_eps if diffusion.noise_low is None else diffusion.noise_low,
        seed=config.training.seed,
        shuffle=not config.data.disable_shuffling,
        semantics=diffusion.semantics,
        row_length=diffusion.row_length,
        num_views=diffusion.noisy_views,
        complementary_views=diffusion.complementary_views,
        noise_high=diffusion.noise_high,
        noise_level_per=diffusion.noise_level_per,
        noise_sampling=diffusion.noise_sampling,
        loss_weight=diffusion.loss_weight,
        block_padding_labels=diffusion.block_padding_labels,
        block_lengths=tuple((step * rows_per_step, length) for step, length in phases),
    )


def blend_schedule(data: DataConfig, rows_per_step: int) -> BlendSchedule | None:
    """Which dataset of a blend gives each row; None without one."""
    if data.blend_weights is None:
        return None
    segments = parse_blend(data.blend_weights)
    return BlendSchedule([(step * rows_per_step, weights) for step, weights in segments])
