"""The front door to attention, the choice of its backend, and the check that guards the choice."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from sdar_kernels import attention_backend, reference
from sdar_kernels.attention import block_diffusion_attention
from sdar_kernels.attention_backend import BACKENDS, backend_problem, choose_backend, run_backend
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.native_attention import why_no_native
from sdar_kernels.self_check import attention_problem, document_intervals
from sdar_kernels.tiled_attention import tiled_attention
from torch import Tensor
from unit.packings import pack, random_document, random_packing, rule_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS = HeadLayout(4, 2, 16)


def _inputs(seed: int, num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = (HEADS.num_heads, HEADS.num_kv_heads, HEADS.num_kv_heads)
    return [
        torch.randn(num_tokens, count, HEADS.head_dim, generator=generator).to(dtype)
        for count in counts
    ]


# The reference and the front door.


def test_the_reference_is_softmax_attention_under_the_rule_in_words() -> None:
    packing = random_packing(11, 4)
    q, k, v = _inputs(0, len(packing.tokens), torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)),
        attn_mask=rule_mask(packing.tokens),
        enable_gqa=True,
    ).transpose(0, 1)
    out = reference.attention(q, k, v, packing.mask().key_intervals)
    assert (out - expected).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_a_document_does_not_depend_on_its_neighbours(backend: str) -> None:
    rng = np.random.default_rng(4)
    document = random_document(rng, 4, 4, drop=False)
    neighbour = random_document(rng, 4, 4, drop=False)
    alone, packed = pack([document], 4, 0), pack([document, neighbour], 4, 5)
    mine = [place for place, token in enumerate(packed.tokens) if token.document == 0]
    inputs = _inputs(1, len(alone.tokens), torch.float32)
    mixed = _inputs(2, len(packed.tokens), torch.float32)
    for tensor, values in zip(mixed, inputs, strict=True):
        tensor[mine] = values
    out = block_diffusion_attention(*mixed, packed.mask(), backend)[mine]
    assert (out - block_diffusion_attention(*inputs, alone.mask(), backend)).abs().max() < 1e-6


def test_the_front_door_runs_the_backend_it_is_told() -> None:
    mask = random_packing(1, 4).mask()
    q, k, v = _inputs(0, mask.num_tokens, torch.float32)
    exact = block_diffusion_attention(q, k, v, mask, "reference")
    assert torch.equal(exact, reference.attention(q, k, v, mask.key_intervals))
    tiled = block_diffusion_attention(q, k, v, mask, "tiled")
    assert torch.equal(tiled, tiled_attention(q, k, v, mask))
    auto = choose_backend("auto", CPU, torch.float32, HEADS).name
    chosen = block_diffusion_attention(q, k, v, mask, auto)
    assert torch.equal(chosen, block_diffusion_attention(q, k, v, mask)), "auto is asked for"
    with pytest.raises(AssertionError, match="unresolved attention backend 'fast'"):
        block_diffusion_attention(q, k, v, mask, "fast")


# The choice.


def _pretend(problems: dict[str, str | None]) -> mock._patch:
    """Backends whose problems are known, on whatever device."""

    def problem(name: str, *args: object) -> str | None:
        return problems[name]

    return mock.patch.object(attention_backend, "backend_problem", problem)


@pytest.mark.parametrize(
    ("problems", "name", "reason"),
    [
        ({"flex": None}, "flex", "first choice on cuda; its self-check passed"),
        (
            {"flex": "key gradient is off by 3.1e-01 of its size", "triton": None},
            "triton",
            "flex failed: key gradient is off by 3.1e-01 of its size; using triton",
        ),
        (
            {"flex": "a", "triton": "b", "tiled": None},
            "tiled",
            "flex failed: a; triton failed: b; using tiled",
        ),
    ],
)
def test_auto_on_a_gpu_takes_the_first_that_works(
    problems: dict[str, str | None], name: str, reason: str
) -> None:
    with _pretend(problems):
        choice = choose_backend("auto", CUDA, torch.bfloat16, HEADS)
    assert (choice.name, choice.reason) == (name, reason)


@pytest.mark.parametrize(
    ("problems", "name", "reason"),
    [
        ({"native": None}, "native", "first choice on cpu; its self-check passed"),
        (
            {"native": "g++ is not installed", "tiled": None},
            "tiled",
            "native failed: g++ is not installed; using tiled",
        ),
    ],
)
def test_auto_on_a_cpu_is_native_where_it_can_be_built(
    problems: dict[str, str | None], name: str, reason: str
) -> None:
    with _pretend(problems):
        choice = choose_backend("auto", CPU, torch.float32, HEADS)
    assert (choice.name, choice.reason) == (name, reason)


def test_nothing_that_works_is_an_error_with_every_reason() -> None:
    with (
        _pretend({"flex": "a", "triton": "b", "tiled": "c"}),
        pytest.raises(ValueError, match=r"no backend works for 4/2 heads of 16 .*a; .*b; .*c"),
    ):
        choose_backend("auto", CUDA, torch.bfloat16, HEADS)


def test_a_forced_backend_that_is_wrong_is_refused_with_the_reason() -> None:
    with (
        _pretend({"flex": "output is not finite"}),
        pytest.raises(ValueError, match="flex cannot be used here: output is not finite; use"),
    ):
        choose_backend("flex", CUDA, torch.bfloat16, HEADS)


def test_flex_on_cpu_is_refused_for_training_only() -> None:
    with pytest.raises(ValueError, match="flex cannot be used here: torch's FlexAttention has no"):
        choose_backend("flex", CPU, torch.float32, HEADS)
    with pytest.warns(UserWarning, match="flex_attention called without"):
        choice = choose_backend("flex", CPU, torch.float32, HEADS, training=False)
    assert choice.name == "flex"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'flash' is not one of auto, flex, triton, native, "):
        choose_backend("flash", CPU, torch.float32, HEADS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads", [HEADS, HeadLayout(8, 8, 64), HeadLayout(6, 2, 80)])
def test_correct_backends_pass_their_check(heads: HeadLayout, dtype: torch.dtype) -> None:
    for name in ("tiled", "reference", *(["native"] if why_no_native(CPU, dtype) is None else [])):
        assert backend_problem(name, CPU, dtype, heads, True) is None


def test_every_backend_has_a_place_in_the_choice() -> None:
    for name in BACKENDS:
        if name != "auto":
            backend_problem(name, CPU, torch.float32, HEADS, True)  # raises for none of them


# Deliberately broken backends: each must be caught.


class _WrongKeyGradient(torch.autograd.Function):
    """What pytorch 158212 describes: right output, wrong gradient of the keys."""

    @staticmethod
    def forward(ctx: object, k: Tensor) -> Tensor:
        return k.view_as(k)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        wrong = grad.clone()
        wrong[: grad.shape[0] // 4] *= 0.5
        return wrong


def _correct(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    return run_backend("reference", q, k, v, mask)


def _wrong_key_gradient(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    return _correct(q, _WrongKeyGradient.apply(k), v, mask)


def _wrong_value_gradient(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    return _correct(q, k, _WrongKeyGradient.apply(v), mask)


def _not_a_number(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    out = _correct(q, k, v, mask)
    return torch.where(torch.arange(len(out))[:, None, None] == 3, torch.nan, out)


def _gradient_not_a_number(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    # 0 * inf in backward only, as an unguarded log of a masked row gives.
    return _correct(q, k, v, mask) + (v.sum() * 0).sqrt() * 0


def _sees_one_block_too_many(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    intervals = mask.host_intervals.copy()
    noisy = (intervals[:, 3] > intervals[:, 2]) & (intervals[:, 1] > intervals[:, 0])
    intervals[noisy, 1] += 4  # its own clean block: the answer
    return _correct(q, k, v, AttentionMask.build(intervals))


class _KeepsItsFirstMask:
    """A compiled closure that is used again for another mask of the same shape."""

    def __init__(self) -> None:
        self.mask: AttentionMask | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        self.mask = self.mask or mask
        return _correct(q, k, v, self.mask)


def _raises(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    raise RuntimeError("out of resource:\n shared memory, Required: 131072")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (_wrong_key_gradient, "key gradient is off by"),
        (_wrong_value_gradient, "value gradient is off by"),
        (_not_a_number, "output is not finite"),
        (_gradient_not_a_number, "value gradient is not finite"),
        (_sees_one_block_too_many, "output is off by"),
        (_KeepsItsFirstMask(), "output is off by"),
        (_raises, "RuntimeError: out of resource: shared memory, Required: 131072"),
    ],
)
def test_a_broken_backend_is_caught(
    broken: Callable[..., Tensor], said: str, dtype: torch.dtype
) -> None:
    problem = attention_problem(broken, CPU, dtype, HEADS)
    assert problem is not None
    assert problem.startswith(said)
    assert attention_problem(_correct, CPU, dtype, HEADS) is None, "the check itself is sound"


def test_a_broken_backend_is_not_chosen() -> None:
    with (
        mock.patch.object(attention_backend, "tiled_attention", _wrong_key_gradient),
        pytest.raises(ValueError, match="tiled cannot be used here: key gradient is off by"),
    ):
        choose_backend("tiled", CPU, torch.float32, HEADS)


def test_the_check_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    attention_problem(_correct, CPU, torch.float32, HEADS)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_the_checks_rows_are_block_diffusion_rows() -> None:
    from unit.packings import Token

    tokens = [
        Token(document, copy, -1 if copy == "clean" else 0, place // 4)
        for copy in ("noisy", "clean")
        for document, length in enumerate((20, 12))
        for place in range(length)
    ] + [Token(-1, "padding", -1, -1)] * 5
    intervals = document_intervals((20, 12), 4, noisy_first=True, padding=5)
    assert torch.equal(reference.dense_mask(torch.from_numpy(intervals)), rule_mask(tokens))
