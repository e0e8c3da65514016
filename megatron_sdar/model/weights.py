"""Materialising and initialising parameters so that they do not depend on the layout.

Each parameter's values come from generators keyed by (seed, name, row block), and each rank
draws only the row blocks its shard touches. So TP, PP and DP sizes leave the initial weights
unchanged, and no rank ever holds a whole parameter it does not own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_sdar.model.decoder_layer import SdarDecoderLayer
from megatron_sdar.model.finetuning import UP, is_factor
from megatron_sdar.model.sdar import EMBEDDING, HEAD, SdarStage
from megatron_sdar.parallel.sharding import fill_local, local_ranges

ROW_BLOCK = 256
Draw = Callable[..., Tensor]


def materialize(stages: Iterable[nn.Module], device: torch.device) -> None:
    """Give meta parameters (uninitialised) storage on `device`, gate and up side by side."""
    for stage in stages:
        assert isinstance(stage, SdarStage)
        stage.to_empty(device=device)
        stage.tie_weights()
        for layer in stage.model.layers.values():
            assert isinstance(layer, SdarDecoderLayer)
            layer.mlp.place_weights()


def initialize(stages: Iterable[nn.Module], seed: int) -> None:
    """Initialise as Hugging Face's Qwen3 does: N(0, initializer_range), norm scales 1.

    Vocabulary padding rows become 0 and stay 0: they never reach the loss. The head of a tied
    model is drawn under the embedding's name, so that copies on two stages start equal. Low-rank
    factors are `initialize_factors`' to fill.
    """
    for stage in stages:
        assert isinstance(stage, SdarStage)
        for name, parameter in stage.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not distributed"
            ranges = local_ranges(parameter)
            if is_factor(name):
                continue
            if parameter.dim() == 1:
                fill_local(parameter, torch.ones(parameter._local_tensor.shape))
                continue
            drawn_as = EMBEDDING if name == HEAD and stage.arch.tie_word_embeddings else name
            values = _slice(drawn_as, parameter.shape, ranges, seed, torch.randn)
            values *= stage.arch.initializer_range
            if name in (EMBEDDING, HEAD):
                values[max(0, stage.arch.vocab_size - ranges[0].start) :] = 0.0
            fill_local(parameter, values)


def initialize_factors(stages: Iterable[nn.Module], seed: int) -> None:
    """Fill the low-rank factors as PEFT does: A uniform in +-1 / sqrt(in features), B zero."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if not is_factor(name):
                continue
            assert isinstance(parameter, DTensor), f"{name} is not distributed"
            if name.endswith(f".{UP}.weight"):
                fill_local(parameter, torch.zeros(parameter._local_tensor.shape))
                continue
            values = _slice(name, parameter.shape, local_ranges(parameter), seed, torch.rand)
            fill_local(parameter, (2 * values - 1) / parameter.shape[1] ** 0.5)


def _slice(
    name: str, shape: torch.Size, ranges: tuple[slice, ...], seed: int, draw: Draw
) -> Tensor:
    """Rows and columns `ranges` of the global draw of a 2-D parameter."""
    rows, columns = ranges
    if rows.stop <= rows.start:
        return torch.empty(0, columns.stop - columns.start)
    pieces = []
    for block in range(rows.start // ROW_BLOCK, (rows.stop - 1) // ROW_BLOCK + 1):
        first = block * ROW_BLOCK
        drawn = _draw_block(name, block, shape[1], seed, draw)
        inside = slice(max(rows.start - first, 0), min(rows.stop - first, ROW_BLOCK))
        pieces.append(drawn[inside, columns])
    return torch.cat(pieces)


def _draw_block(name: str, block: int, columns: int, seed: int, draw: Draw) -> Tensor:
    """ROW_BLOCK whole rows, even where the parameter has fewer left.

    torch.randn draws the last 16 values of an odd-sized tensor apart, so a shorter block would
    make the values depend on where the padded vocabulary ends.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return draw(ROW_BLOCK, columns, generator=generator)
