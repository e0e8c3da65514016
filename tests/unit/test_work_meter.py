"""Counts of a step's rows against a direct count, and the results files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.layouts import Layout, make_steps, micro_batches

from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.diffusion.rows import build_row, full_copies
from megatron_sdar.diffusion.savings import kept_copies
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.flops import RowWork, step_flops
from megatron_sdar.training.results import train_results, write_results
from megatron_sdar.training.work_meter import WorkMeter, count_row, measure_peak, memory_mb

IDS = np.arange(10, 26, dtype=np.int32)
LABELS = np.where(np.arange(16) < 6, -100, IDS).astype(np.int32)


def draw() -> NoiseDraw:
    masked = np.zeros(16, dtype=np.bool_)
    masked[[7, 9]] = True  # blocks 1 and 2 of 4 tokens
    return NoiseDraw(0.5, masked)


def test_tokens_are_itemised() -> None:
    full = build_row([full_copies(IDS, LABELS, 4, draw())], 40, 4, 99, 0)
    assert count_row(full)[:3].tolist() == [16, 16, 8]
    kept = build_row([kept_copies(IDS, LABELS, 4, (draw(),))], 40, 4, 99, 0)
    # Noisy blocks 1 and 2, and the clean blocks before block 2: 0 and 1.
    assert count_row(kept)[:3].tolist() == [8, 8, 24]
    # A noisy token sees its block and what is before: 4 x (4 + 4) and 4 x (4 + 8).
    assert count_row(kept)[3] == 4 * 4 + 4 * 8 + 4 * 8 + 4 * 12 + 24
    assert count_row(kept)[4:].tolist() == [2, 8 + 12]


@pytest.mark.usefixtures("single_process")
def test_flops_are_those_of_the_rows_and_sums_begin_anew() -> None:
    layout = Layout("meter")
    rows = micro_batches(layout, make_steps(False)[0], 0)
    mesh = build_mesh(torch.device("cpu"), 1, 1)
    for trimmed in (False, True):
        meter = WorkMeter(layout.arch, trimmed=trimmed)
        meter.add(rows)
        counts = meter.take(mesh)
        works = [RowWork.of(row) for row in rows]
        assert counts.flops == step_flops(layout.arch, works, trimmed=trimmed).total
        assert counts.tokens == sum(row.num_tokens for row in rows)
        assert counts.padding == sum(row.num_padding for row in rows)
        assert meter.take(mesh).tokens == 0
    assert measure_peak(mesh, torch.float32) > 1e6
    assert memory_mb(torch.device("cpu")) > 10


def test_results_are_gathered_in_one_file(tmp_path: Path) -> None:
    write_results(tmp_path, "eval_results.json", {"epoch": 1.0, "eval_loss": 3.0})
    results = train_results(
        epoch=2.0, train_loss=1.5, seconds=4.0, rows=20.0, steps=8, flops=10**12,
        effective_tokens=400.0,
    )  # fmt: skip
    write_results(tmp_path, "train_results.json", results)
    assert json.loads((tmp_path / "train_results.json").read_text()) == {
        "epoch": 2.0, "total_flos": 1e12, "train_loss": 1.5, "train_runtime": 4.0,
        "train_samples_per_second": 5.0, "train_steps_per_second": 2.0,
        "effective_tokens_per_sec": 100.0,
    }  # fmt: skip
    everything = json.loads((tmp_path / "all_results.json").read_text())
    assert everything == {**results, "eval_loss": 3.0}
