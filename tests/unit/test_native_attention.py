"""What only native attention has: groups of keys, tiles, threads, and what it refuses."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sdar_kernels import native_attention
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.native_attention import why_no_native
from sdar_kernels.self_check import document_intervals
from torch import Tensor
from unit.attention_cases import (
    Attention,
    attention_inputs,
    reference_results,
    run_attention,
    worst_error,
)
from unit.packings import random_packing

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    problem = why_no_native(CPU, torch.float32)
    if problem is not None:
        pytest.skip(f"native attention cannot run here: {problem}")


def _native(tile: int | None = None) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        return native_attention.native_attention(q, k, v, mask, tile)

    return attention


def _worst(mask: AttentionMask, tensors: tuple[Tensor, ...], tile: int | None = None) -> float:
    return worst_error(_native(tile), mask, tensors)


@pytest.mark.parametrize("growing", [-1.0, 0.0, 1.0])
def test_more_keys_than_are_held_at_once(growing: float) -> None:
    """Three groups of columns; the largest score comes first, anywhere, or last."""
    mask = AttentionMask.build(document_intervals([1300, 70], 4))
    q, k, v, upstream = attention_inputs(0, mask.num_tokens, (2, 1, 4), torch.float64)
    ramp = growing * torch.linspace(0, 30, mask.num_tokens, dtype=torch.float64)
    k[:, 0, 0] += ramp
    q[:, :, 0] = q[:, :, 0].abs() + 1
    assert _worst(mask, (q, k, v, upstream)) < 1e-10


@pytest.mark.parametrize("what", ["query", "key", "value", "infinite key"])
def test_what_is_not_a_number_reaches_its_document_and_no_other(what: str) -> None:
    """The trainer stops at such a loss; if softmax swallowed it, weights would be spoilt unseen."""
    mask = AttentionMask.build(document_intervals([40, 24], 4))
    q, k, v, upstream = attention_inputs(0, mask.num_tokens, (4, 2, 16), torch.float32)
    tensor = {"query": q, "key": k, "value": v, "infinite key": k}[what]
    tensor[0] = torch.inf if what == "infinite key" else torch.nan
    out, *grads = run_attention(_native(), mask, (q, k, v, upstream))
    first = torch.cat((torch.arange(40), torch.arange(64, 104)))
    others = torch.cat((torch.arange(40, 64), torch.arange(104, 128)))
    assert not torch.isfinite(out[0]).any()
    for result in (out, *grads):
        assert torch.isfinite(result[others]).all()
    assert not all(bool(torch.isfinite(result[first]).all()) for result in grads)


def test_memory_of_earlier_calls_is_never_read(request: pytest.FixtureRequest) -> None:
    # In this mode torch.empty gives NaN.
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    mask = AttentionMask.build(document_intervals([300, 60, 60], 4, padding=3))
    for heads in ((4, 2, 4), (2, 1, 16)):
        tensors = attention_inputs(0, mask.num_tokens, heads, torch.float64)
        assert _worst(mask, tensors) < 1e-12


def test_layers_do_not_disturb_each_other_and_share_a_plan() -> None:
    """All forward passes, then all backward passes, as in training."""
    mask = random_packing(7, 4).mask()
    layers = [attention_inputs(seed, mask.num_tokens, (4, 2, 8), torch.float64) for seed in (0, 1)]
    leaves = [[x.detach().clone().requires_grad_() for x in layer[:3]] for layer in layers]
    outs = [native_attention.native_attention(*each, mask) for each in leaves]
    for out, each, layer in reversed(list(zip(outs, leaves, layers, strict=True))):
        grads = torch.autograd.grad(out, each, layer[3])
        for ours, theirs in zip((out, *grads), reference_results(mask, layer), strict=True):
            assert (ours - theirs).abs().max() < 1e-12
    assert len(mask._plans) == 1


def test_backward_keeps_inputs_output_and_one_number_per_query_and_head() -> None:
    mask = random_packing(7, 4).mask()
    tensors = attention_inputs(0, mask.num_tokens, (4, 2, 8), torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        native_attention.native_attention(
            *(tensor.clone().requires_grad_() for tensor in tensors[:3]), mask
        )
    q, k = tensors[:2]
    assert sum(x.numel() for x in kept) == 2 * q.numel() + 2 * k.numel() + mask.num_tokens * 4


def test_little_is_computed_in_vain() -> None:
    """Pairs in the hulls of tiles over allowed ones: rows of GSM8K's lengths, and long ones."""
    for lengths, tile, most in (([200] * 4, 32, 1.28), ([200] * 4, 16, 1.14), ([2048], 32, 1.03)):
        mask = AttentionMask.build(document_intervals(lengths, 4))
        plan = native_attention._make_plan(mask, tile)
        assert 1 <= plan.num_computed / mask.num_pairs < most


def test_tiles_of_a_document_are_one_component_and_those_of_others_are_not() -> None:
    lengths = [40, 24, 8]
    intervals = document_intervals(lengths, 4, padding=2)
    tiles = native_attention._make_plan(AttentionMask.build(intervals), 4).tiles.tolist()
    document = np.append(np.tile(np.repeat(np.arange(3), lengths), 2), [3, 3])
    owners: dict[int, set[int]] = {}
    for begin, *_, component in tiles:
        owners.setdefault(component, set()).add(int(document[begin]))
    assert all(len(owner) == 1 for owner in owners.values()), "no thread waits for another document"
    for number in range(3):
        # All but the first noisy block, which sees nothing but itself.
        mine = [tile for tile in tiles if document[tile[0]] == number and tile[4] > tile[2]]
        assert len({component for *_, component in mine}) == 1, "they add to the same keys"


_BITS = """
import sys
sys.path[:0] = ["kernels", "tests"]
import hashlib
import torch
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.native_attention import native_attention
from sdar_kernels.self_check import document_intervals
from unit.attention_cases import attention_inputs, run_attention

torch.set_num_threads(int(sys.argv[1]))
mask = AttentionMask.build(document_intervals([300, 200, 40], 4, padding=5))
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    tensors = attention_inputs(0, mask.num_tokens, (8, 2, 64), dtype)
    for result in run_attention(native_attention, mask, tensors):
        digest.update(result.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_threads_change_no_bit() -> None:
    """In processes of their own: one that has taken threads cannot fork any more."""
    digests = [
        subprocess.run(
            [sys.executable, "-c", _BITS, str(threads)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout
        for threads in (1, 2, 5)
    ]  # fmt: skip
    assert len(digests[0].strip()) == 2 * hashlib.sha256().digest_size
    assert len(set(digests)) == 1


def test_devices_and_dtypes_without_a_form_are_named() -> None:
    assert why_no_native(torch.device("cuda"), torch.float32) == (
        "it is for CPUs, the device is cuda"
    )
    assert why_no_native(CPU, torch.float16) == "it has no form for torch.float16"


def test_keys_of_another_mask_are_refused() -> None:
    mask = random_packing(5, 4).mask()
    q, k, v, _ = attention_inputs(0, mask.num_tokens + 4, (2, 2, 4), torch.float64)
    with pytest.raises(AssertionError, match="keys and mask belong together"):
        native_attention.native_attention(q[:-4], k, v, mask)


def test_queries_of_another_mask_are_refused() -> None:
    mask = random_packing(5, 4).mask()
    q, k, v, _ = attention_inputs(0, mask.num_tokens + 4, (2, 2, 4), torch.float64)
    with pytest.raises(AssertionError, match="queries and mask belong together"):
        native_attention.native_attention(q, k[:-4], v[:-4], mask)
