"""Reports of compiled kernels: what is a problem, and how a table shows it."""

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from sdar_kernels.ahead_of_time import CompiledKernel, problems
from sdar_kernels.sass import MatrixLoop

from megatron_sdar.benchmark.compiled_kernels import Outcome, show_kernels

FIT = CompiledKernel("k", "sm_100", 128, 0, 232_448, 512, False, 900, ())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"spill_bytes": 4}, "k on sm_100: spills 4 bytes of registers"),
        ({"shared_bytes": 232_449}, "needs 232,449 bytes of shared memory, limit 232,448"),
        ({"arch": "sm_120"}, "k on sm_120: needs 232,448 bytes of shared memory, limit 101,376"),
        ({"arch": "gfx942", "shared_bytes": 65_537}, "shared memory, limit 65,536"),
        ({"tensor_memory_columns": 1024}, "needs 1024 columns of tensor memory, limit 512"),
        ({"serialized": True}, "ptxas serialized its wgmma instructions"),
    ],
)
def test_each_limit_alone(change: dict[str, Any], what: str) -> None:
    assert problems(FIT) == []
    (found,) = problems(replace(FIT, **change))
    assert what in found


def test_ratio_needs_two_loops() -> None:
    full, masked = MatrixLoop(0, 400, 8), MatrixLoop(8000, 600, 8)
    assert replace(FIT, loops=(full, masked)).masked_ratio == 1.5
    assert replace(FIT, loops=(full,)).masked_ratio is None
    assert FIT.masked_ratio is None
    assert replace(FIT, loops=None).full_loop is None


def test_a_table_without_reports() -> None:
    shown = StringIO()
    outcomes = [Outcome("k", "sm_80", None, ("k on sm_80: [x] does not compile",))]
    assert not show_kernels(outcomes, Console(file=shown, width=120))
    assert "k on sm_80: [x] does not compile" in shown.getvalue()
    assert "1 configurations, 1 architectures: 1 problems" in shown.getvalue()
