"""The attention benchmark at toy size: what it reports, not how fast anything is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from rich.console import Console
from sdar_kernels.head_layout import HeadLayout

from megatron_sdar.benchmark import attention_paths
from megatron_sdar.benchmark.attention import (
    AttentionFigures,
    AttentionOptions,
    measure_attention,
)
from megatron_sdar.benchmark.attention_paths import DENSE, PER_DOCUMENT, make_path, own_paths
from megatron_sdar.benchmark.attention_plans import COUNTED_HEADS, packed_lengths, plan_figures
from megatron_sdar.benchmark.attention_report import plot_attention, show_attention

TOY = AttentionOptions(
    length=64,
    documents=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rounds=2,
    gemm_size=64,
    row_length=2048,
    create_length=256,
)
KEYS = (
    "speedup_vs_dense_1doc", "speedup_vs_dense_16docs", "limit_share_1doc", "limit_share_16docs",
    "waste_128_1024", "waste_256_2048", "waste_long", "block_mask_ms_20480",
)  # fmt: skip

OWN = own_paths(TOY.problem(1), lambda text: None)


@pytest.fixture(scope="module")
def measured() -> Iterator[tuple[AttentionFigures, list[str], int]]:
    """Figures, what was said, and torch's threads afterwards; before it had 2."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    said: list[str] = []
    yield measure_attention(TOY, said.append), said, torch.get_num_threads()
    torch.set_num_threads(threads)


def test_every_figure_is_there_and_positive(
    measured: tuple[AttentionFigures, list[str], int],
) -> None:
    figures, said, _ = measured
    values = json.loads(json.dumps(asdict(figures)))
    assert tuple(values)[: len(KEYS)] == KEYS
    assert all(values[key] > 0 for key in KEYS)
    assert all(values[key] >= 1 for key in KEYS if key.startswith("waste"))
    assert said[0] == "1 document(s) of 64 tokens, 2 rounds"


def test_every_path_runs_on_one_and_on_several_documents(
    measured: tuple[AttentionFigures, list[str], int],
) -> None:
    figures, _, _ = measured
    assert [(path.documents, path.path) for path in figures.paths] == [
        (documents, name) for documents in (1, 4) for name in (*OWN, DENSE, PER_DOCUMENT)
    ]
    for path in figures.paths:
        assert 0 < path.best_milliseconds <= path.milliseconds
        assert path.limit_share > 0
        assert path.peak_mb >= 0
        assert path.speedup_vs_dense == 1 or path.path != DENSE
    one, several = (
        min(
            (path for path in figures.paths if path.documents == count and path.path in OWN),
            key=lambda path: path.milliseconds,
        )
        for count in (1, 4)
    )
    assert figures.speedup_vs_dense_16docs == several.speedup_vs_dense
    assert figures.limit_share_1doc == one.limit_share


def test_the_number_of_threads_is_put_back(
    measured: tuple[AttentionFigures, list[str], int],
) -> None:
    assert measured[2] == 2


def test_tables_and_plot(measured: tuple[AttentionFigures, list[str], int], tmp_path: Path) -> None:
    figures, _, _ = measured
    text = StringIO()
    show_attention(figures, Console(file=text, width=120))
    for words in (*KEYS, "tiled", DENSE, PER_DOCUMENT, "128-1024", "create_block_mask"):
        assert words in text.getvalue()
    plot_attention(figures, tmp_path / "paths.png")
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")


def test_all_paths_compute_the_same() -> None:
    problem = TOY.problem(4)
    *leaves, _ = problem.inputs()
    outs = [make_path(name, problem)(*leaves) for name in (*OWN, DENSE, PER_DOCUMENT)]
    for out in outs[1:]:
        assert (out - outs[0]).abs().max() < 1e-5


def test_flops_count_the_allowed_pairs() -> None:
    problem = TOY.problem(1)
    # Per block of 4: clean queries see it and those before, noisy ones those before and their own.
    pairs = 2 * sum(4 * 4 * number for number in range(1, 17))
    assert problem.flops(problem.mask()) == 14 * pairs * 16 * 4


def test_a_length_that_is_not_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"length 2048 is not 12 documents.* multiple of 48"):
        measure_attention(AttentionOptions(documents=12), print)


def test_a_device_without_a_backend_of_ours_is_refused() -> None:
    said: list[str] = []
    with (
        mock.patch.object(attention_paths, "backend_problem", return_value="too old"),
        pytest.raises(ValueError, match="no attention backend of ours can train on cpu"),
    ):
        measure_attention(TOY, said.append)
    names = ("native", "tiled", "flex")
    assert said[-3:] == [f"  without {name}: too old" for name in names]


def test_rows_are_filled_by_documents_in_their_range() -> None:
    lengths = packed_lengths(20480, 128, 1024, 4)
    assert sum(lengths) == 20480
    assert all(128 <= length <= 1024 for length in lengths[:-1])
    assert not np.any(np.array(lengths) % 4)
    assert lengths == packed_lengths(20480, 128, 1024, 4)


def test_waste_of_a_row_is_that_of_its_worst_plan() -> None:
    figures = plan_figures([96, 32], 4, [HeadLayout(4, 2, 64)])
    assert figures.waste == max(figures.tiled, figures.triton) > 1


def test_waste_of_several_head_layouts_is_that_of_the_worst() -> None:
    layouts = [HeadLayout(16, 8, 128), HeadLayout(32, 4, 128)]
    one, other = (plan_figures([256, 1028], 4, [heads]).triton for heads in layouts)
    assert one != other
    assert plan_figures([256, 1028], 4, layouts).triton == max(one, other)


@pytest.mark.parametrize("heads", COUNTED_HEADS, ids=str)
@pytest.mark.parametrize(
    ("lengths", "most"),
    [
        (packed_lengths(20480, 128, 1024, 4), 1.25),
        (packed_lengths(20480, 256, 2048, 4), 1.12),
        ([20480], 1.02),
    ],
    ids=["128-1024", "256-2048", "long"],
)
def test_waste_is_within_the_goals(heads: HeadLayout, lengths: list[int], most: float) -> None:
    assert plan_figures(lengths, 4, [heads]).waste <= most
