"""The Triton attention kernels, proved in the interpreter; and what can be said without it."""

from __future__ import annotations

import pytest
import torch
from interpreted import run_interpreted
from sdar_kernels.attention_backend import choose_backend
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.triton_configs import (
    ARCHITECTURES,
    HEAD_DIMS,
    MAX_HEAD_DIM_FP32,
    attention_config,
    padded_head_dim,
)

HEADS = HeadLayout(4, 2, 16)


def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted("interpreted_attention.py")


def test_triton_on_cpu_is_refused_with_the_reason() -> None:
    message = "triton cannot be used here: triton needs a GPU, the device is cpu"
    with pytest.raises(ValueError, match=message):
        choose_backend("triton", torch.device("cpu"), torch.float32, HEADS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_there_is_a_configuration_for_every_head_size_and_dtype(arch: str) -> None:
    for head_dim in (16, 48, *HEAD_DIMS):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if dtype == torch.float32 and head_dim > MAX_HEAD_DIM_FP32:
                continue
            config = attention_config(arch, head_dim, dtype)
            for kernel in (config.forward, config.backward_queries, config.backward_keys):
                for size in (kernel.rows, kernel.keys, kernel.masked):
                    assert size >= 16, "a matrix instruction needs 16"
                    assert size & (size - 1) == 0, "tiles are powers of two"


@pytest.mark.parametrize(
    ("head_dim", "padded"), [(8, 16), (16, 16), (64, 64), (80, 128), (96, 128), (256, 256)]
)
def test_heads_are_padded_to_powers_of_two(head_dim: int, padded: int) -> None:
    assert padded_head_dim(head_dim) == padded
