"""The attention problem that is measured, the ways to compute it, and their clock and memory.

Every path is a forward and backward of the same inputs. Where a path runs in a process of its own
to measure memory, the problem is made again from its size and the same seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
from sdar_kernels.attention import block_diffusion_attention
from sdar_kernels.attention_backend import backend_problem
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.reference import dense_mask
from sdar_kernels.self_check import document_intervals
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_sdar.training.resident_memory import resident_mb

DENSE, PER_DOCUMENT = "dense SDPA", "per-document SDPA"
_OWN = {"cpu": ("native", "tiled", "flex"), "cuda": ("flex", "triton")}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionProblem:
    """A row of both copies of equal documents: 2 * sum(documents) tokens.

    Attributes:
        documents: their lengths.
        heads, block_length, dtype, device: as in training.
        num_threads: of torch, on a CPU.
    """

    documents: tuple[int, ...]
    heads: HeadLayout
    block_length: int
    dtype: torch.dtype
    device: torch.device
    num_threads: int

    def mask(self) -> AttentionMask:
        return AttentionMask.build(
            document_intervals(self.documents, self.block_length), self.device
        )

    def inputs(self) -> list[Tensor]:
        """q [T, N, H], k and v [T, K, H], an upstream gradient like q."""
        generator = torch.Generator().manual_seed(0)
        num_heads, num_kv_heads = self.heads.num_heads, self.heads.num_kv_heads
        return [
            torch.randn(2 * sum(self.documents), count, self.heads.head_dim, generator=generator)
            .to(self.device, self.dtype)
            .requires_grad_(count_number < 3)
            for count_number, count in enumerate((num_heads, num_kv_heads, num_kv_heads, num_heads))
        ]

    def flops(self, mask: AttentionMask) -> int:
        """Of forward and backward: 7 products over the allowed pairs."""
        return 14 * mask.num_pairs * self.heads.head_dim * self.heads.num_heads


def own_paths(problem: AttentionProblem, say: Callable[[str], None]) -> list[str]:
    """Our backends that can train here; says why one is left out."""
    names = []
    for name in _OWN.get(problem.device.type, ("tiled",)):
        reason = backend_problem(name, problem.device, problem.dtype, problem.heads, True)
        if reason is None:
            names.append(name)
        else:
            say(f"  without {name}: {reason}")
    return names


def make_path(name: str, problem: AttentionProblem) -> Attention:
    """The path of that name: a backend of ours, DENSE or PER_DOCUMENT."""
    mask = problem.mask()
    if name == DENSE:
        allowed = dense_mask(mask.key_intervals)
        return lambda q, k, v: _masked_sdpa(q, k, v, allowed)
    if name == PER_DOCUMENT:
        return _PerDocument(problem)
    return lambda q, k, v: block_diffusion_attention(q, k, v, mask, name)


class _PerDocument:
    """Dense attention inside each document, in a loop."""

    def __init__(self, problem: AttentionProblem) -> None:
        device, total = problem.device, sum(problem.documents)
        self._places, self._masks = [], []
        start = 0
        for length in problem.documents:
            clean = torch.arange(start, start + length, device=device)
            self._places.append(torch.cat((clean, clean + total)))
            intervals = document_intervals((length,), problem.block_length)
            self._masks.append(dense_mask(torch.from_numpy(intervals)).to(device))
            start += length

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            _masked_sdpa(q[places], k[places], v[places], allowed)
            for places, allowed in zip(self._places, self._masks, strict=True)
        ]
        return torch.zeros_like(q).index_copy(0, torch.cat(self._places), torch.cat(parts))


def _masked_sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """[T, heads, H] under a boolean [T, T]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out: Tensor = scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)


def forward_and_backward(path: Attention, inputs: Sequence[Tensor]) -> None:
    """One of each; the gradients are dropped."""
    *leaves, upstream = inputs
    torch.autograd.grad(path(*leaves), leaves, upstream)


def seconds(work: Callable[[], None], device: torch.device, num_threads: int) -> float:
    """Seconds of one call: of the GPU; of this process on one thread; else of the clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000
    # Time that other processes take from us does not count, if no second thread waits for it.
    clock = time.process_time if num_threads == 1 else time.perf_counter
    started = clock()
    work()
    return clock() - started


def gemm(problem: AttentionProblem, size: int) -> tuple[Callable[[], None], int]:
    """A square product of that size and its FLOPs."""
    left, right = (
        torch.randn(size, size, device=problem.device).to(problem.dtype) for _ in range(2)
    )
    out = torch.empty_like(left)

    def work() -> None:
        torch.mm(left, right, out=out)

    return work, 2 * size**3


def peak_mb(name: str, problem: AttentionProblem) -> float:
    """MiB beyond the inputs at the peak of one forward and backward, mask and plan included."""
    if problem.device.type == "cuda":
        inputs = problem.inputs()
        torch.cuda.reset_peak_memory_stats(problem.device)
        before = torch.cuda.memory_allocated(problem.device)
        forward_and_backward(make_path(name, problem), inputs)
        return (torch.cuda.max_memory_allocated(problem.device) - before) / 2**20
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as process:
        return process.submit(_process_peak_mb, name, problem).result()


def _process_peak_mb(name: str, problem: AttentionProblem) -> float:
    torch.set_num_threads(problem.num_threads)
    tiny = replace(problem, documents=(2 * problem.block_length,))
    forward_and_backward(make_path(name, tiny), tiny.inputs())
    inputs = problem.inputs()
    before = resident_mb("VmRSS")
    forward_and_backward(make_path(name, problem), inputs)
    return resident_mb("VmHWM") - before
