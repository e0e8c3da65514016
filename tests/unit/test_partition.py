"""Cutting layers into stages."""

from __future__ import annotations

import pytest
import torch
from distributed.layouts import Layout

from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages, stage_ranges
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel.mesh import build_mesh


def _sizes(num_layers: int, num_stages: int) -> list[int]:
    return [stage.end - stage.start for stage in stage_ranges(num_layers, num_stages)]


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_every_split_covers_all_layers_once_with_one_first_and_one_last(num_stages: int) -> None:
    for num_layers in range(num_stages, 40):
        ranges = stage_ranges(num_layers, num_stages)
        layers = [layer for stage in ranges for layer in range(stage.start, stage.end)]
        assert layers == list(range(num_layers))
        assert [stage.is_first for stage in ranges] == [i == 0 for i in range(num_stages)]
        assert [stage.is_last for stage in ranges] == [
            i == num_stages - 1 for i in range(num_stages)
        ]
        sizes = _sizes(num_layers, num_stages)
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "sizes"),
    [
        (8, 4, [2, 2, 2, 2]),
        (9, 4, [2, 3, 2, 2]),
        (10, 4, [2, 3, 3, 2]),
        (11, 4, [3, 3, 3, 2]),
        (5, 2, [3, 2]),
        (28, 8, [3, 4, 4, 4, 4, 3, 3, 3]),
    ],
)
def test_the_middle_gets_the_layers_that_are_left_over(
    num_layers: int, num_stages: int, sizes: list[int]
) -> None:
    assert _sizes(num_layers, num_stages) == sizes


def test_an_explicit_split_is_taken_as_it_is() -> None:
    ranges = stage_ranges(7, 3, [4, 1, 2])
    assert [(stage.start, stage.end) for stage in ranges] == [(0, 4), (4, 5), (5, 7)]


def test_a_split_that_was_not_validated_is_refused() -> None:
    for split in ([4, 4], [7, 0, 0]):
        with pytest.raises(AssertionError, match="layer split was validated"):
            stage_ranges(7, 2, split)


def test_one_rank_builds_its_virtual_chunks_in_order_on_the_meta_device(
    single_process: None,
) -> None:
    arch = Layout("partition").arch
    options = ModelOptions(136, torch.float32, False, "none", "tiled")
    stages = build_stages(arch, build_mesh(torch.device("cpu"), 1, 1), options, virtual_size=2)
    owned = []
    for stage in stages:
        assert isinstance(stage, SdarStage)
        owned.append(list(stage.model.layers))
        assert all(parameter.device.type == "meta" for parameter in stage.parameters())
    assert owned == [["0", "1"], ["2", "3"]]
    names = [{name for name, _ in stage.named_parameters()} for stage in stages]
    assert not names[0] & names[1]
    assert "model.embed_tokens.weight" in names[0]
    assert {"model.norm.weight", "lm_head.weight"} <= names[1]
