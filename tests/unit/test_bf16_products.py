"""Whether this CPU multiplies bfloat16 at a useful speed: a measurement, and where it matters."""

from __future__ import annotations

import pytest
import torch
from sdar_kernels import bf16_products
from sdar_kernels.bf16_products import bf16_is_slow, bf16_slowdown

from megatron_sdar.doctor import machine
from megatron_sdar.doctor.findings import OK, SLOW


def test_it_compares_the_fastest_of_both_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    seconds = {
        torch.bfloat16: iter([9.0, 6.0, 8.0, 7.0]),
        torch.float32: iter([5.0, 4.0, 2.0, 3.0]),
    }

    def product(left: torch.Tensor, right: torch.Tensor) -> None:
        clock[0] += next(seconds[left.dtype])

    monkeypatch.setattr(bf16_products.torch, "mm", product)
    monkeypatch.setattr(bf16_products.time, "perf_counter", lambda: clock[0])
    # The first product of each does not count.
    assert bf16_slowdown() == 6.0 / 2.0


def test_it_runs() -> None:
    assert bf16_slowdown() > 0


def test_units_and_plain_loops_are_told_apart() -> None:
    assert [bf16_is_slow(slowdown) for slowdown in (0.5, 1.5, 20.0, 70.0)] == [
        False,
        False,
        True,
        True,
    ]


def test_the_doctor_says_so() -> None:
    found = machine.bf16_units(70.0)
    assert found.state == SLOW
    assert "70 times" in found.text
    assert found.remedy == "set bf16: false for runs on this CPU"
    assert machine.bf16_units(0.6).state == OK
