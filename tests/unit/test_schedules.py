"""Learning-rate schedules equal transformers' at every step, and refuse what they cannot do."""

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from megatron_sdar.config_sections.optim import LR_SCHEDULER_TYPES
from megatron_sdar.optim.schedules import _SCHEDULES, lr_multiplier, resolve_warmup_steps

PEAK = 3e-4
WSD: dict[str, Any] = {"num_decay_steps": 7}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.25}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.5}),
    ("polynomial", {"power": 0}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 17}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.75}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.75, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", WSD),
    ("warmup_stable_decay", {**WSD, "num_stable_steps": 5, "min_lr_ratio": 0.2}),
    ("warmup_stable_decay", {**WSD, "warmup_type": "cosine", "decay_type": "linear"}),
    ("warmup_stable_decay", {**WSD, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"}),
    ("warmup_stable_decay", {**WSD, "num_cycles": 1.5, "min_lr_ratio": 0.1}),
]


def test_every_schedule_of_the_config_exists_and_is_covered() -> None:
    assert set(LR_SCHEDULER_TYPES) == set(_SCHEDULES) == {name for name, _ in CASES}


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize("warmup", [0, 1, 6])
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_equal_to_transformers(name: str, kwargs: dict[str, Any], warmup: int) -> None:
    total = 29
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
    multiplier = theirs.lr_lambdas[0]
    for step in range(total + 4):
        ours = lr_multiplier(name, step, total, warmup, kwargs, learning_rate=PEAK)
        assert ours == pytest.approx(multiplier(step), rel=1e-14, abs=1e-16), step
    starts_above_0 = ("constant", "warmup_stable_decay", "cosine_warmup_with_min_lr")
    if warmup and name not in starts_above_0:
        assert lr_multiplier(name, 0, total, warmup, kwargs, PEAK) == 0.0


def test_warm_up_of_the_whole_run_ends_at_the_floor() -> None:
    """transformers divides by zero here."""
    assert lr_multiplier("polynomial", 5, 5, 5, {"lr_end": 3e-5}, PEAK) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "kwargs", "peak", "message"),
    [
        ("step", {}, PEAK, "lr_scheduler_type: 'step' is unknown; use constant, constant_with"),
        ("linear", {"power": 2}, PEAK, "linear has no 'power'; it takes no arguments"),
        ("cosine", {"cycles": 2}, PEAK, "cosine has no 'cycles'; it takes num_cycles"),
        ("cosine", {"num_cycles": "two"}, PEAK, "num_cycles is 'two'; it must be a number"),
        ("cosine", {"num_cycles": True}, PEAK, "num_cycles is True; it must be a number"),
        ("warmup_stable_decay", {**WSD, "decay_type": 1}, PEAK, "decay_type is 1; it must be text"),
        ("warmup_stable_decay", {}, PEAK, "needs num_decay_steps"),
        ("warmup_stable_decay", {**WSD, "decay_type": "exp"}, PEAK, "decay_type 'exp' is unknown"),
        ("warmup_stable_decay", {**WSD, "warmup_type": "x"}, PEAK, "warmup_type 'x' is unknown"),
        ("cosine_with_min_lr", {}, PEAK, "exactly one of min_lr and min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 1}, PEAK, "exactly one of min_lr"),
        ("cosine_warmup_with_min_lr", {}, PEAK, "warmup_with_min_lr needs exactly one of min_lr"),
        ("cosine_with_min_lr", {"min_lr": 1e-6}, None, "lr_multiplier needs learning_rate"),
        ("polynomial", {}, None, "lr_multiplier needs learning_rate"),
        ("polynomial", {"lr_end": PEAK}, PEAK, "lr_end=0.0003 must be below learning_rate=0.0003"),
        ("polynomial", {"power": -1}, PEAK, "power=-1 must not be negative"),
        ("inverse_sqrt", {"timescale": 0}, PEAK, "timescale=0 must be positive"),
    ],
)
def test_refused(name: str, kwargs: dict[str, Any], peak: float | None, message: str) -> None:
    with pytest.raises(ValueError) as error:
        lr_multiplier(name, 0, 29, 6, kwargs, peak)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("steps", "ratio", "total", "expected"),
    [(0, 0.0, 100, 0), (0, 0.03, 100, 3), (0, 0.031, 100, 4), (7, 0.5, 100, 7), (0, 1.0, 9, 9)],
)
def test_warmup_steps(steps: int, ratio: float, total: int, expected: int) -> None:
    assert resolve_warmup_steps(steps, ratio, total) == expected
