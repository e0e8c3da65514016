"""Kernels of known shape for test_ahead_of_time.py: a small attention forward, and a plain copy.

A file of its own, since the processes that compile import it by name.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from sdar_kernels.triton_attention import attention_specs
from sdar_kernels.triton_configs import attention_config
from sdar_kernels.triton_runtime import KernelSpec


@triton.jit
def attention_sample(
    q, k, v, o, full_end, end,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One query tile: keys [0, full_end) unmasked, [full_end, end) where key <= query."""
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    columns = tl.arange(0, HEAD_DIM)
    keys = tl.arange(0, TILE_N)
    query = tl.load(q + rows[:, None] * HEAD_DIM + columns[None, :])
    top = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    sums = tl.zeros([TILE_M, HEAD_DIM], tl.float32)
    for first in range(0, full_end, TILE_N):
        at = (first + keys)[:, None] * HEAD_DIM + columns[None, :]
        score = tl.dot(query, tl.trans(tl.load(k + at)))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 1)
        sums = tl.dot(weight.to(query.dtype), tl.load(v + at), sums * fade[:, None])
        top = new_top
    for first in range(full_end, end, TILE_N):
        at = (first + keys)[:, None] * HEAD_DIM + columns[None, :]
        score = tl.dot(query, tl.trans(tl.load(k + at)))
        seen = (first + keys)[None, :] <= rows[:, None]
        score = tl.where(seen & ((first + keys) < end)[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 1)
        sums = tl.dot(weight.to(query.dtype), tl.load(v + at), sums * fade[:, None])
        top = new_top
    out = sums / total[:, None]
    tl.store(o + rows[:, None] * HEAD_DIM + columns[None, :], out.to(query.dtype))


@triton.jit
def copy_sample(source, target, size, TILE: tl.constexpr):
    """target = source, element by element; no matrix multiplication."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(target + at, tl.load(source + at, at < size), at < size)


def attention_spec(
    name: str, *, tile: int = 64, head_dim: int = 64, num_warps: int = 4, num_stages: int = 2
) -> KernelSpec:
    """In bf16; fits every architecture as it is."""
    return KernelSpec(
        name=name,
        kernel=attention_sample,
        signature={**dict.fromkeys("qkvo", "*bf16"), "full_end": "i32", "end": "i32"},
        constexprs={"TILE_M": tile, "TILE_N": 64, "HEAD_DIM": head_dim},
        num_warps=num_warps,
        num_stages=num_stages,
        aligned=("q", "k", "v", "o", "full_end", "end"),
    )


def spilling_spec(arch: str) -> KernelSpec:
    """An accumulator of 256 registers in each thread, or of 256 vector registers on gfx942."""
    if arch == "gfx942":
        return attention_spec("spilling sample", head_dim=256, num_warps=1, num_stages=1)
    return attention_spec("spilling sample", tile=128, head_dim=256, num_stages=1)


def sample_specs(arch: str) -> list[KernelSpec]:
    """What the tests ship in place of the project's own kernels."""
    del arch
    copy = KernelSpec(
        name="copy sample",
        kernel=copy_sample,
        signature={"source": "*fp32", "target": "*fp32", "size": "i32"},
        constexprs={"TILE": 1024},
        num_warps=4,
        num_stages=1,
        aligned=("source", "target"),
    )
    return [attention_spec("attention sample"), copy]


def full_width_specs(arch: str) -> list[KernelSpec]:
    """SDAR's forward kernel, with steps of equal size where those with the mask fit the registers.

    Elsewhere as it is shipped.
    """
    shipped = attention_config(arch, 128, torch.bfloat16, 4)
    if arch in ("sm_90", "sm_100"):
        forward = replace(shipped.forward, masked=shipped.forward.keys)
        shipped = replace(shipped, forward=forward)
    return attention_specs(arch, shipped, 128, torch.bfloat16, 4)[:1]


def faulty_specs(arch: str) -> list[KernelSpec]:
    """One kernel for each way of not being fit to ship, and one that is fit."""
    copy = sample_specs(arch)[1]
    return [
        spilling_spec(arch),
        attention_spec("large sample", head_dim=128, num_warps=8, num_stages=8),
        replace(copy, name="odd sample", constexprs={"TILE": 1000}),
        copy,
    ]
