"""The Triton attention kernels, proved in the interpreter; and what can be said without it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from interpreted import run_interpreted
from sdar_kernels import triton_configs
from sdar_kernels.attention_backend import choose_backend
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.triton_configs import (
    ARCHITECTURES,
    HEAD_DIMS,
    MAX_GROUP,
    attention_config,
    default_config,
    listed_architecture,
    padded_head_dim,
    why_no_config,
)

HEADS = HeadLayout(4, 2, 16)


def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted("interpreted_attention.py")


@pytest.mark.backends
def test_the_kernels_in_the_interpreter_on_many_more_rows() -> None:
    run_interpreted("interpreted_attention.py", "backends")


def test_triton_on_cpu_is_refused_with_the_reason() -> None:
    message = "triton cannot be used here: triton needs a GPU, the device is cpu"
    with pytest.raises(ValueError, match=message):
        choose_backend("triton", torch.device("cpu"), torch.float32, HEADS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_there_is_a_configuration_for_every_head_size_and_dtype(arch: str) -> None:
    for head_dim in (16, 48, *HEAD_DIMS):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for group in (1, 2, 3, 4, 8, MAX_GROUP):
                config = attention_config(arch, head_dim, dtype, group)
                for kernel in (config.forward, config.backward_queries, config.backward_keys):
                    for size in (kernel.rows, kernel.keys, kernel.masked):
                        assert size >= 16, "a matrix instruction needs 16"
                        assert size & (size - 1) == 0, "tiles are powers of two"
                    if group > 1:
                        assert kernel.rows // group <= 32, "waste grows with a tile's queries"


@pytest.mark.parametrize(
    ("head_dim", "padded"), [(8, 16), (16, 16), (64, 64), (80, 128), (96, 128), (256, 256)]
)
def test_heads_are_padded_to_powers_of_two(head_dim: int, padded: int) -> None:
    assert padded_head_dim(head_dim) == padded


@pytest.mark.parametrize(
    ("arch", "listed"),
    [
        ("sm_80", "sm_80"), ("sm_87", "sm_86"), ("sm_90", "sm_90"), ("sm_103", "sm_100"),
        ("sm_121", "sm_120"), ("sm_75", None), ("gfx942", "gfx942"), ("gfx950", "gfx942"),
        ("gfx1100", None), ("cpu", None),
    ],
)  # fmt: skip
def test_a_gpu_takes_the_newest_listed_form_that_suits_it(arch: str, listed: str | None) -> None:
    device = torch.device("cuda")
    with mock.patch.object(triton_configs, "device_architecture", return_value=arch):
        assert listed_architecture(device) == listed
        problem = why_no_config(device, HeadLayout(32, 8, 128), torch.bfloat16)
        if listed is None:
            assert problem == f"no configuration for {arch}"
        else:
            assert problem is None
            config = default_config(device, 128, torch.bfloat16, 4)
            assert config == attention_config(listed, 128, torch.bfloat16, 4)


@pytest.mark.parametrize(
    ("heads", "dtype", "said"),
    [
        (HeadLayout(8, 4, 320), torch.bfloat16, "head_dim 320 is above 256"),
        (HeadLayout(64, 2, 64), torch.bfloat16, "32 query heads share a key head"),
        (HeadLayout(8, 4, 64), torch.float64, "no fp64 form on a GPU"),
        (HeadLayout(8, 4, 257), torch.float32, "head_dim 257 is above 256"),
    ],
)
def test_what_has_no_form_says_so(heads: HeadLayout, dtype: torch.dtype, said: str) -> None:
    with mock.patch.object(triton_configs, "device_architecture", return_value="sm_90"):
        problem = why_no_config(torch.device("cuda"), heads, dtype)
    assert problem is not None
    assert said in problem
