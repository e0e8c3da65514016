"""Models of real size: there and back bitwise, in little memory; loading holds one copy in all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_sdar.benchmark.convert import ConvertOptions, measure_convert

pytestmark = pytest.mark.slow

PEAK_MB = {"1.7b": 1000, "4b": 1000, "8b": 1500}
# Of bfloat16 in GB: the model, its copy in the other format, and a copy of that.
DISK_GB = {"1.7b": 13, "4b": 28, "8b": 50}


@pytest.mark.parametrize("shape", PEAK_MB)
def test_there_and_back(tmp_path: Path, shape: str) -> None:
    """`measure_convert` compares every tensor; this adds the bounds on memory."""
    if shutil.disk_usage(tmp_path).free < DISK_GB[shape] * 10**9:
        pytest.skip(f"needs {DISK_GB[shape]} GB of free disk in {tmp_path}")
    options = ConvertOptions(shape, rounds=1, ranks=4 if shape == "4b" else 0, saves=0)
    figures = measure_convert(options, tmp_path / "work", say=print)
    assert max(figures.to_native.peak_mb, figures.to_hf.peak_mb) < PEAK_MB[shape]
    if shape == "4b":
        assert figures.load_rss_vs_model is not None
        assert figures.load_rss_vs_model <= 1.3
