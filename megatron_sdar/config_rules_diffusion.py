"""Rules that relate the noise, its views and the block length to each other and to the rows."""

from collections.abc import Iterator

from megatron_sdar.config_fields import SdarConfig
from megatron_sdar.config_weights import parse_block_lengths


def diffusion_problems(config: SdarConfig) -> Iterator[str]:
    """Every rule of the diffusion section that CONFIG violates, one line each."""
    yield from _views(config)
    yield from _range(config)
    yield from _block_lengths(config)


def _views(config: SdarConfig) -> Iterator[str]:
    views = config.diffusion.noisy_views
    if config.diffusion.semantics == "paper" and views > 1:
        yield f"noisy_views={views} needs semantics=exact; the paper has one noisy copy"
    length = config.diffusion.row_length
    if length is not None and config.diffusion.semantics == "paper":
        yield f"row_length={length} needs semantics=exact; the paper's rows are 2 * cutoff_len"
    if length is not None and length % (config.data.block_length or 1):
        yield f"row_length={length} is not a multiple of block_length={config.data.block_length}"
    if config.diffusion.complementary_views and views < 2:
        yield f"complementary_views needs at least two views, found noisy_views={views}; use 2"


def _range(config: SdarConfig) -> Iterator[str]:
    diffusion = config.diffusion
    name = "noise_eps" if diffusion.noise_low is None else "noise_low"
    low, high = getattr(diffusion, name), diffusion.noise_high
    if low >= high:
        yield f"{name}={low} must be below noise_high={high}"
    elif diffusion.complementary_views and not low < 0.5 < high:
        yield (
            f"complementary_views masks with p and 1 - p, which both lie between {name}={low} and "
            f"noise_high={high} only if 0.5 does; change the range or complementary_views"
        )


def _block_lengths(config: SdarConfig) -> Iterator[str]:
    diffusion, data, max_steps = config.diffusion, config.data, config.training.max_steps
    if diffusion.block_length_schedule is None:
        return
    if data.block_length is not None:
        yield (
            f"block_length={data.block_length} and block_length_schedule exclude each other; "
            "remove block_length"
        )
    try:
        step, last = parse_block_lengths(diffusion.block_length_schedule)[-1]
    except ValueError as error:
        yield str(error)
        return
    if diffusion.row_length is not None and diffusion.row_length % last:
        yield (
            f"row_length={diffusion.row_length} is not a multiple of {last}, the last of "
            "block_length_schedule"
        )
    if 0 < max_steps <= step:
        yield (
            f"block_length_schedule: {last} would begin at step {step}, but max_steps={max_steps}; "
            "the model is exported with the last block length, so it must be trained with it"
        )
