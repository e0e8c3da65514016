"""global_batch_size on different numbers of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from unit.test_config import MODEL

from megatron_sdar.config import SdarConfig, load_config, validate
from megatron_sdar.config_batch import with_global_batch

Load = Callable[..., SdarConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(**keys: object) -> SdarConfig:
        path = tmp_path / "config.yaml"
        path.write_text("model_name_or_path: m\noutput_dir: o\ndataset: d\n")
        return load_config([str(path), *(f"{name}={value}" for name, value in keys.items())])

    return load


@pytest.mark.parametrize(("world", "tp", "steps"), [(1, 1, 8), (2, 1, 4), (4, 2, 4), (8, 1, 1)])
def test_the_batch_stays(load: Load, world: int, tp: int, steps: int) -> None:
    keys = {"per_device_train_batch_size": 2, "tensor_model_parallel_size": tp}
    config = load(global_batch_size=16, **keys)
    validate(config, MODEL, world)
    chosen = with_global_batch(config, world)
    assert chosen.training.gradient_accumulation_steps == steps
    assert chosen.warnings == config.warnings
    assert with_global_batch(load(**keys, gradient_accumulation_steps=3), world) == load(
        **keys, gradient_accumulation_steps=3
    )


def test_what_does_not_fit_is_refused(load: Load) -> None:
    config = load(global_batch_size=16, per_device_train_batch_size=3)
    with pytest.raises(
        ValueError, match=r"per_device_train_batch_size=3 x 4 .* = 12; use 12 or 24"
    ):
        validate(config, MODEL, 4)
    with pytest.raises(ValueError, match="= 24; use 24, or another"):
        validate(config, MODEL, 8)
    validate(load(global_batch_size=12, per_device_train_batch_size=3), MODEL, 4)


def test_another_number_of_steps_is_not_ignored_in_silence(load: Load) -> None:
    config = load(global_batch_size=8, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert with_global_batch(config, 2).warnings == config.warnings
    (warning,) = with_global_batch(config, 4).warnings
    assert warning.startswith("gradient_accumulation_steps is 2, by global_batch_size=8")
    assert warning.endswith("4 is ignored")
