"""The equality suite with each attention backend, and with all fused kernels.

On CPU, Triton's kernels run in its interpreter and FlexAttention uncompiled; these and Inductor's
kernels in fp64, so the oracle's tolerances hold unchanged.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from distributed.layouts import (
    EVERY_FLEX,
    EVERY_NATIVE,
    EVERY_TRITON,
    FLEX,
    INDUCTOR,
    NATIVE,
    TRITON,
    Layout,
    mismatches,
    read_result,
    reference,
    run_layout,
)
from distributed.mutants import KERNEL_MUTANTS, run_mutant
from distributed.world import run_world
from sdar_kernels.native_attention import why_no_native
from unit.flex_on_cpu import flex_trains_on_cpu

INTERPRETER = {"TRITON_INTERPRET": "1"}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

WHY_NO_NATIVE = why_no_native(torch.device("cpu"), torch.float64)
needs_native = pytest.mark.skipif(
    WHY_NO_NATIVE is not None, reason=f"native attention cannot run here: {WHY_NO_NATIVE}"
)


def _run(layout: Layout, directory: Path) -> None:
    with flex_trains_on_cpu() if layout.backend == "flex" else nullcontext():
        run_layout(layout, directory)


def _run_all(layouts: list[Layout], directory: Path, environment: dict[str, str]) -> Path:
    for world in sorted({layout.world for layout in layouts}):
        jobs = [(_run, (layout, directory)) for layout in layouts if layout.world == world]
        run_world(world, jobs, directory, environment, time_limit=3600)
    return directory


def _mismatches(layout: Layout, directory: Path) -> list[str]:
    """Where what a layout left differs from the oracle."""
    oracle = reference(layout.arch, layout.silent_half, layout.views)
    return mismatches(read_result(layout, directory), oracle)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_all(NATIVE, tmp_path_factory.mktemp("native"), {})


@needs_native
@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", NATIVE, ids=lambda layout: layout.name)
def test_native_equals_oracle(layout: Layout, native: Path) -> None:
    assert _mismatches(layout, native) == []


@pytest.fixture(scope="module")
def flex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_all(FLEX, tmp_path_factory.mktemp("flex"), {})


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_all(TRITON, tmp_path_factory.mktemp("triton"), INTERPRETER)


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", FLEX, ids=lambda layout: layout.name)
def test_flex_equals_oracle(layout: Layout, flex: Path) -> None:
    assert _mismatches(layout, flex) == []


@needs_triton
@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", TRITON, ids=lambda layout: layout.name)
def test_triton_equals_oracle(layout: Layout, triton: Path) -> None:
    assert _mismatches(layout, triton) == []


@pytest.fixture(scope="module")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_all(INDUCTOR, tmp_path_factory.mktemp("inductor"), {})


@pytest.mark.backends
@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", INDUCTOR, ids=lambda layout: layout.name)
def test_inductor_equals_oracle(layout: Layout, inductor: Path) -> None:
    assert _mismatches(layout, inductor) == []


@pytest.fixture(scope="module")
def every_native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_all(EVERY_NATIVE, tmp_path_factory.mktemp("every_native"), {})


@needs_native
@pytest.mark.backends
@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", EVERY_NATIVE, ids=lambda layout: layout.name)
def test_native_equals_oracle_in_every_layout(layout: Layout, every_native: Path) -> None:
    assert _mismatches(layout, every_native) == []


@pytest.fixture(scope="module")
def every_flex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_all(EVERY_FLEX, tmp_path_factory.mktemp("every_flex"), {})


@pytest.fixture(scope="module")
def every_triton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_all(EVERY_TRITON, tmp_path_factory.mktemp("every_triton"), INTERPRETER)


@pytest.mark.backends
@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", EVERY_FLEX, ids=lambda layout: layout.name)
def test_flex_equals_oracle_in_every_layout(layout: Layout, every_flex: Path) -> None:
    assert _mismatches(layout, every_flex) == []


@needs_triton
@pytest.mark.backends
@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", EVERY_TRITON, ids=lambda layout: layout.name)
def test_triton_equals_oracle_in_every_layout(layout: Layout, every_triton: Path) -> None:
    assert _mismatches(layout, every_triton) == []


@needs_triton
@pytest.mark.backends
@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("name", KERNEL_MUTANTS)
def test_kernel_mutant_is_caught(name: str, tmp_path: Path) -> None:
    layout = KERNEL_MUTANTS[name][1]
    run_world(1, [(run_mutant, (name, tmp_path))], tmp_path, INTERPRETER)
    assert _mismatches(layout, tmp_path), f"the suite did not notice {name}"
