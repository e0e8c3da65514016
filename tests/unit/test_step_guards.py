"""Guards of the step and the run that the layout suite does not reach."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed.layouts import Layout, build, make_steps, micro_batches

from megatron_sdar.optim.adamw import takes_weight_decay
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.metrics import LOG_NAME, Reporter, StepRecord, trim_log
from megatron_sdar.training.plan import steps_between
from megatron_sdar.training.plot import plot_loss, read_log, smooth
from megatron_sdar.training.trackers import Trackers
from megatron_sdar.training.work_meter import WorkCounts

WORK = WorkCounts(noisy=10, clean=20, padding=2, flops=10**9)
RECORD = StepRecord(1, 2.5, 1.0, 1e-3, 0.5, 100.0, 300.0, 0.01, WORK, 40, 0.25, 512.0)
NOBODY = Trackers({}, print)


@pytest.mark.usefixtures("single_process")
def test_non_finite_loss_stops_before_any_weight_changes() -> None:
    layout = Layout("guard")
    step, optimizer = build(layout, build_mesh(torch.device("cpu"), 1, 1))
    batches = micro_batches(layout, make_steps(False)[0], 0)
    broken = replace(batches[0], loss_weights=batches[0].loss_weights * math.inf)
    before = {name: shard.clone() for name, shard in optimizer.shards.items()}
    with pytest.raises(FloatingPointError, match="loss"):
        step.run([broken, *batches[1:]], 1e-3)
    for name, shard in optimizer.shards.items():
        assert torch.equal(shard, before[name]), name


@pytest.mark.usefixtures("single_process")
def test_llamafactory_normalization_is_the_sum_of_micro_batch_means() -> None:
    layout = Layout("norm")
    mesh = build_mesh(torch.device("cpu"), 1, 1)
    batches = micro_batches(layout, make_steps(False)[0], 0)
    published, _ = build(layout, mesh)
    published.normalization = "llamafactory"
    total = published.backward(batches)[0].item()
    means = []
    for batch in batches:
        single, _ = build(layout, mesh)
        means.append(single.backward([batch])[0].item())
    assert total == pytest.approx(sum(means), rel=1e-12)


def test_decay_groups_are_llamafactorys() -> None:
    plain = ["model.layers.0.input_layernorm.weight", "x.post_attention_layernorm.weight", "a.bias"]
    decayed = ["model.norm.weight", "l.self_attn.q_norm.weight", "l.self_attn.k_proj.weight"]
    assert not any(map(takes_weight_decay, plain))
    assert all(map(takes_weight_decay, decayed))


@pytest.mark.parametrize(
    ("value", "total", "expected"), [(10, 60, 10), (0.1, 60, 6), (0.01, 60, 1), (1, 60, 1)]
)
def test_steps_between(value: float, total: int, expected: int) -> None:
    assert steps_between(value, total) == expected


def test_log_has_the_promised_fields_and_is_trimmed_on_resume(tmp_path: Path) -> None:
    trim_log(tmp_path / LOG_NAME, 0)
    with Reporter(tmp_path, total_steps=4, start_step=0, trackers=NOBODY) as reporter:
        for step in (1, 2, 3):
            reporter.log(replace(RECORD, step=step))
    records = read_log(tmp_path / LOG_NAME)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert {"step", "loss", "grad_norm", "lr", "epoch"} <= set(records[0])
    tokens = [records[0][f"{kind}_tokens"] for kind in ("noisy", "clean", "padding", "left_out")]
    assert tokens == [10, 20, 2, 40]
    assert (records[0]["mfu"], records[0]["memory_mb"]) == (0.25, 512.0)
    trim_log(tmp_path / LOG_NAME, 2)
    with Reporter(tmp_path, total_steps=4, start_step=2, trackers=NOBODY) as reporter:
        reporter.log(replace(RECORD, step=3, loss=9.0))
    records = read_log(tmp_path / LOG_NAME)
    assert [record["step"] for record in records] == [1, 2, 3], "no step is logged twice"
    assert records[-1]["loss"] == 9.0
    trim_log(tmp_path / LOG_NAME, 0)
    assert read_log(tmp_path / LOG_NAME) == [], "a fresh run starts a fresh log"


def test_a_log_line_torn_by_a_kill_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    log = tmp_path / LOG_NAME
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    trim_log(tmp_path / LOG_NAME, 2)
    assert read_log(log) == [{"step": 1, "loss": 2.0}]
    log.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match=rf"{LOG_NAME}:2: not a log record"):
        trim_log(tmp_path / LOG_NAME, 3)


def test_plot_is_written_and_smoothing_follows_the_values(tmp_path: Path) -> None:
    log = tmp_path / LOG_NAME
    log.write_text("")
    assert not plot_loss(log, tmp_path / "empty.png")
    log.write_text(
        "".join(json.dumps({"step": i, "loss": 5 - i / 10}) + "\n" for i in range(30))
        + json.dumps({"step": 29, "eval_loss": 3.0})
        + "\n"
    )
    assert plot_loss(log, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    curve = smooth([5.0] * 10 + [1.0] * 50)
    assert curve[0] == 5.0
    assert 1.0 < curve[15] < 5.0
    assert curve[-1] == pytest.approx(1.0, abs=0.1)
