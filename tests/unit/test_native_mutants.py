"""Deliberate defects of the C++ attention: each is noticed by the checks that it must pass."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from sdar_kernels import native_attention, native_build
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.native_attention import why_no_native
from sdar_kernels.native_build import load_native_kernels
from sdar_kernels.self_check import attention_problem, document_intervals
from unit.attention_cases import attention_inputs, worst_error

CPU = torch.device("cpu")
# File, what stands there, what stands there instead.
MUTANTS = {
    "keys_behind_the_range": (
        "attention.cpp", "std::fill(row + end, row + columns, hidden);", "",
    ),
    "keys_before_the_range": ("attention.cpp", "std::fill(row, row + begin, hidden);", ""),
    "second_range_unseen": ("attention.cpp", "+ 2 * part.range", "+ 0 * part.range"),
    "no_delta": ("attention.cpp", "(other[i] - delta)", "other[i]"),
    "query_gradient_not_scaled": ("attention.cpp", "grad_queries[i] *= scale_", "(void)scale_"),
    "heads_share_one_sum": ("attention.cpp", "head * groups + row % groups", "head * groups"),
    "last_query_forgotten": (
        "attention.cpp", "multiply<A, true>(part.count, depth, rows, products",
        "multiply<A, true>(part.count, depth, rows - 1, products",
    ),
    "new_largest_score_ignored": ("attention.cpp", "*total *= share;", ""),
    "sums_not_cleared": (
        "tensors.h", "to.at(head, key) + depth_, A(0));", "to.at(head, key), A(0));",
    ),
    "last_key_of_a_square_not_turned": (
        "tensors.h", "column < keys; ++column", "column < keys - 1; ++column",
    ),
    "hull_of_the_last_query": ("tiles.h", "std::max(tile.high[i], high)", "high"),
    "a_term_of_exp": ("vectors.h", "terms = 14", "terms = 4"),
}  # fmt: skip


def _library(directory: Path, name: str | None) -> object:
    """The kernels with one defect, or none."""
    sources = directory / "native"
    sources.mkdir()
    for source in native_build._SOURCES.iterdir():
        text = source.read_text(encoding="utf-8")
        if name is not None and source.name == MUTANTS[name][0]:
            _, right, wrong = MUTANTS[name]
            assert right in text, f"{name}: {source.name} has changed"
            text = text.replace(right, wrong)
        (sources / source.name).write_text(text, encoding="utf-8")
    with mock.patch.object(native_build, "_SOURCES", sources):
        return load_native_kernels.__wrapped__(directory / "kept")


def _noticed(library: object) -> bool:
    """By the self-check, on queries in reverse, or on more keys than are held at once."""
    with mock.patch.object(native_attention, "load_native_kernels", return_value=library):
        attention = native_attention.native_attention
        if attention_problem(attention, CPU, torch.float64, HeadLayout(4, 2, 16)) is not None:
            return True
        backwards = AttentionMask.build(document_intervals([60], 4)).select(np.arange(120)[::-1])
        tensors = attention_inputs(0, backwards.num_tokens, (2, 1, 4), torch.float64)
        if not worst_error(attention, backwards, tensors) < 1e-12:
            return True
        mask = AttentionMask.build(document_intervals([1301], 4))
        q, k, v, upstream = attention_inputs(0, mask.num_tokens, (2, 1, 4), torch.float64)
        k[:, 0, 0] += torch.linspace(0, 30, mask.num_tokens, dtype=torch.float64)
        q[:, :, 0] = q[:, :, 0].abs() + 1
        return not worst_error(attention, mask, (q, k, v, upstream)) < 1e-10


@pytest.mark.backends
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_a_defect_is_noticed(name: str | None, tmp_path: Path) -> None:
    problem = why_no_native(CPU, torch.float64)
    if problem is not None:
        pytest.skip(f"native attention cannot run here: {problem}")
    library = _library(tmp_path, name)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        assert _noticed(library) == (name is not None)
    finally:
        torch.use_deterministic_algorithms(False)
