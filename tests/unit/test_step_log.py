"""Rates and sums of log lines, by a clock that the tests move."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed.layouts import Layout, make_steps, micro_batches

from megatron_sdar.config import DataConfig, DiffusionConfig, ReportingConfig
from megatron_sdar.config_sections.finetuning import FinetuningConfig
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training import step_log
from megatron_sdar.training.step import StepResult
from megatron_sdar.training.step_log import StepLog, Throughput
from megatron_sdar.training.work_meter import WorkMeter

pytestmark = pytest.mark.usefixtures("single_process")
LAYOUT = Layout("log")
PEAK_TFLOPS = 0.5
CUTOFF_LEN = 32
FULL = FinetuningConfig()


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(step_log, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Run:
    """A StepLog with a loader that says what the tests want."""

    def __init__(self, clock: Clock, finetuning: FinetuningConfig = FULL, **reporting: Any) -> None:
        self.clock = clock
        self.mesh = build_mesh(torch.device("cpu"), 1, 1)
        self.rows = micro_batches(LAYOUT, make_steps(False)[0], 0)
        self.loader = SimpleNamespace(epoch=0.0, num_rows=10, wait_seconds=0.0)
        config = SimpleNamespace(
            reporting=ReportingConfig(peak_tflops_per_device=PEAK_TFLOPS, **reporting),
            diffusion=DiffusionConfig(), data=DataConfig(cutoff_len=CUTOFF_LEN),
            finetuning=finetuning,
        )  # fmt: skip
        self.log = StepLog(config, LAYOUT.arch, self.mesh, self.loader)  # type: ignore[arg-type]

    def step(self, loss: float, seconds: float) -> None:
        self.clock.now += seconds
        self.loader.wait_seconds += seconds / 4
        self.loader.epoch += 0.5
        self.log.add(self.rows, StepResult(loss, 1.0, 60))

    def record(self) -> step_log.StepRecord:
        return self.log.record(1, 1e-3)


def test_rates_are_of_training_alone(clock: Clock) -> None:
    run = Run(clock)
    clock.now += 1000  # preparations
    run.loader.wait_seconds += 50
    run.log.begin()
    run.step(3.0, 2.0)
    with run.log.paused():
        clock.now += 500
    run.step(1.0, 6.0)
    meter = WorkMeter(LAYOUT.arch, trimmed=True)
    meter.add(run.rows * 2)
    work = meter.take(run.mesh)
    record = run.record()
    assert record.work == work
    assert record.loss == 2.0
    assert record.label_tokens_per_s == 120 / 8
    assert record.row_tokens_per_s == work.tokens / 8
    assert record.data_wait_share == 0.25
    assert record.mfu == pytest.approx(work.flops / 8 / (PEAK_TFLOPS * 1e12))
    # An epoch is 10 rows with a noisy and a clean copy of their tokens.
    assert record.left_out == 10 * 2 * CUTOFF_LEN - work.tokens > 0
    assert (run.log.steps, run.log.loss, run.log.left_out) == (2, 4.0, record.left_out)
    assert run.log.logged == Throughput(8.0, 120, work)
    assert run.log.total_flops == work.flops


def test_a_resumed_interval_keeps_its_sums_but_no_time(clock: Clock) -> None:
    whole, first = Run(clock), Run(clock)
    for run in (whole, first):
        run.log.begin()
        run.step(3.0, 2.0)
    state = json.loads(json.dumps(first.log.state_dict()))
    assert first.record().work.tokens > 0, "saving takes nothing from the line to come"
    again = Run(clock)
    again.loader.epoch = first.loader.epoch
    again.log.load_state_dict(state)
    for run in (whole, again):
        run.log.begin()
        run.step(1.0, 4.0)
    expected, found = whole.record(), again.record()
    assert found.work == expected.work
    assert (found.loss, found.left_out) == (expected.loss, expected.left_out)
    assert again.log.total_flops == whole.log.total_flops == 2 * again.log.logged.work.flops
    assert (again.log.steps, again.log.logged.seconds) == (1, 4.0)
    assert found.label_tokens_per_s == 60 / 4
    assert found.row_tokens_per_s == expected.work.tokens / 2 / 4
    assert found.mfu == pytest.approx(expected.work.flops / 2 / 4 / (PEAK_TFLOPS * 1e12))


def test_the_denominators_are_said(clock: Clock) -> None:
    said = Run(clock).log.describe()
    assert "answer tok/s: label tokens trained, of: all tokens computed (noisy, clean, pad" in said
    assert "MFU: model FLOPs (kept tokens, allowed pairs, nothing recomputed) over 0.5 TF" in said
    silent = Run(clock, report_mfu=False)
    assert "MFU" not in silent.log.describe()
    silent.step(1.0, 1.0)
    assert silent.record().mfu is None


def test_flops_are_of_what_is_trained(clock: Clock) -> None:
    flops = []
    for kind in ("full", "lora"):
        run = Run(clock, FinetuningConfig(finetuning_type=kind, lora_rank=1))
        run.step(1.0, 1.0)
        flops.append(run.record().work.flops)
    # Of three passes over the weights two are left; attention has all of them.
    assert 0.66 < flops[1] / flops[0] < 0.8
