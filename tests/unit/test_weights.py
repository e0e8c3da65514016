"""Initial weights: Hugging Face's distribution, and independent of how they are cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed.layouts import Layout
from torch import Tensor

from megatron_sdar.architecture import Architecture
from megatron_sdar.model import weights
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.parallel.mesh import build_mesh

ARCH = replace(Layout("weights").arch, vocab_size=600, hidden_size=96)
PADDED = 640


def _initial(
    arch: Architecture = ARCH, seed: int = 3, dtype: torch.dtype = torch.float32, vpp: int = 1
) -> dict[str, Tensor]:
    options = ModelOptions(PADDED, dtype, False, "none", "tiled")
    stages = build_stages(arch, build_mesh(torch.device("cpu"), 1, 1), options, vpp)
    materialize(stages, torch.device("cpu"))
    initialize(stages, seed)
    return {
        name: parameter.full_tensor().detach()
        for stage in stages
        for name, parameter in stage.named_parameters()
    }


@pytest.fixture(scope="module")
def initial(single_process: None) -> dict[str, Tensor]:
    return _initial()


def test_matrices_are_normal_with_the_configured_spread(initial: dict[str, Tensor]) -> None:
    for name, value in initial.items():
        if value.dim() == 1:
            continue
        used = value[:600]
        count = used.numel()
        assert abs(used.mean()) < 5 * ARCH.initializer_range / count**0.5, name
        assert used.std() == pytest.approx(ARCH.initializer_range, rel=5 / count**0.5), name
        assert used.abs().max() < 6 * ARCH.initializer_range, name


def test_norm_scales_are_one(initial: dict[str, Tensor]) -> None:
    vectors = [name for name, value in initial.items() if value.dim() == 1]
    assert len(vectors) == 4 * ARCH.num_hidden_layers + 1
    assert all((initial[name] == 1).all() for name in vectors)


def test_vocabulary_padding_is_zero_and_nothing_else_is(initial: dict[str, Tensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert initial[name].shape[0] == PADDED
        assert (initial[name][600:] == 0).all()
        assert (initial[name][:600].abs().sum(dim=1) > 0).all()


def test_parameters_differ_from_each_other_and_between_row_blocks(
    initial: dict[str, Tensor],
) -> None:
    matrices = [value[:48, :48] for value in initial.values() if value.dim() == 2]
    embedding = initial["model.embed_tokens.weight"]
    matrices += [embedding[256:304, :48], embedding[512:560, :48]]
    for i, first in enumerate(matrices):
        for second in matrices[:i]:
            rows, columns = (min(a, b) for a, b in zip(first.shape, second.shape, strict=True))
            assert not torch.equal(first[:rows, :columns], second[:rows, :columns])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    initial: dict[str, Tensor],
) -> None:
    again, other = _initial(), _initial(seed=4)
    for name, value in initial.items():
        assert torch.equal(again[name], value), name
        assert value.dim() == 1 or not torch.equal(other[name], value), name


def test_weights_do_not_depend_on_the_number_of_stages(initial: dict[str, Tensor]) -> None:
    split = _initial(vpp=2)
    assert set(split) == set(initial)
    assert all(torch.equal(split[name], value) for name, value in initial.items())


def test_bf16_weights_are_the_fp32_ones_rounded(initial: dict[str, Tensor]) -> None:
    narrow = _initial(dtype=torch.bfloat16)
    assert all(torch.equal(narrow[name], initial[name].bfloat16()) for name in initial)


@pytest.mark.parametrize("vpp", [1, 2])
def test_a_tied_head_is_the_embedding(initial: dict[str, Tensor], vpp: int) -> None:
    tied = _initial(replace(ARCH, tie_word_embeddings=True), vpp=vpp)
    embedding = tied["model.embed_tokens.weight"]
    assert torch.equal(embedding, initial["model.embed_tokens.weight"])
    if vpp == 1:
        assert "lm_head.weight" not in tied, "one shared parameter has one name"
    else:
        assert torch.equal(tied["lm_head.weight"], embedding)


@pytest.mark.parametrize(
    "ranges",
    [
        (slice(0, 600), slice(0, 96)),
        (slice(100, 400), slice(0, 96)),
        (slice(255, 257), slice(10, 20)),
        (slice(256, 512), slice(0, 48)),
        (slice(511, 600), slice(48, 96)),
        (slice(599, 640), slice(0, 96)),
        (slice(610, 640), slice(0, 96)),
        (slice(640, 640), slice(0, 96)),
    ],
)
def test_a_shard_is_a_cut_of_the_whole(
    initial: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, ranges: tuple[slice, slice]
) -> None:
    name = "model.embed_tokens.weight"
    rows, columns = ranges
    options = ModelOptions(PADDED, torch.float32, False, "none", "tiled")
    (stage,) = build_stages(ARCH, build_mesh(torch.device("cpu"), 1, 1), options)
    wanted = dict(stage.named_parameters())[name]
    filled: dict[str, Tensor] = {}

    def local_ranges(parameter: Any) -> tuple[slice, ...]:
        if parameter is wanted:
            return ranges
        return tuple(slice(0, size) for size in parameter.shape)

    def fill_local(parameter: Any, values: Tensor) -> None:
        if parameter is wanted:
            filled[name] = values

    # A rank that holds `ranges` of the embedding: where a layout cuts is all that matters.
    monkeypatch.setattr(weights, "local_ranges", local_ranges)
    monkeypatch.setattr(weights, "fill_local", fill_local)
    initialize([stage], seed=3)
    assert torch.equal(filled[name], initial[name][rows, columns])


def test_a_parameter_that_is_not_distributed_is_refused(
    single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ModelOptions(PADDED, torch.float32, False, "none", "tiled")
    (stage,) = build_stages(ARCH, build_mesh(torch.device("cpu"), 1, 1), options)
    stage.model.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(AssertionError, match=r"model\.extra is not distributed"):
        initialize([stage], seed=0)
