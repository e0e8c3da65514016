"""Every parallel layout gives the loss, gradients, norm and weights of the plain oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed.layouts import (
    EIGHT,
    LAYOUTS,
    Layout,
    mismatches,
    read_result,
    reference,
    run_layout,
)
from distributed.world import run_world


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {}


def _result(
    layout: Layout,
    peers: list[Layout],
    worlds: dict[int, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, object]:
    if layout.world not in worlds:
        directory = tmp_path_factory.mktemp(f"world{layout.world}")
        worlds[layout.world] = directory
        jobs = [(run_layout, (peer, directory)) for peer in peers if peer.world == layout.world]
        run_world(layout.world, jobs, directory)
    return read_result(layout, worlds[layout.world])


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_equals_oracle(
    layout: Layout, worlds: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    result = _result(layout, LAYOUTS, worlds, tmp_path_factory)
    assert mismatches(result, reference(layout.arch, layout.silent_half, layout.views)) == []


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", EIGHT, ids=lambda layout: layout.name)
def test_eight_processes_equal_oracle(
    layout: Layout, worlds: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    result = _result(layout, EIGHT, worlds, tmp_path_factory)
    assert mismatches(result, reference(layout.arch, layout.silent_half, layout.views)) == []
