"""The comparison of LoRA and freeze goes red for every deliberate defect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from distributed.finetuning_layouts import DROPOUT, LORA, SOME, Case, expected, run_case
from distributed.layouts import Layout, mismatches, read_result
from distributed.world import run_world
from torch import Tensor

from megatron_sdar.model.finetuning import Finetuning
from megatron_sdar.parallel.lora import Dropout, LoraOptions, LowRankUpdate
from megatron_sdar.training import step as training_step

Patch = Callable[[], mock._patch]
DROPPING = Case(Layout("alone"), DROPOUT)


def _factors_not_summed() -> mock._patch:
    """A factor that every tp rank holds whole keeps the part of its gradient that each rank saw."""
    original = training_step.sum_partial_gradients

    def skipping(gradients: dict, names: set, mesh: object) -> None:
        original(gradients, {name for name in names if ".lora_" not in name}, mesh)

    return mock.patch.object(training_step, "sum_partial_gradients", skipping)


def _backward_without_scale() -> mock._patch:
    return mock.patch.object(
        LowRankUpdate, "upstream", lambda self, grad: torch.mm(grad, self.up.local())
    )


def _input_without_the_updates_gradient() -> mock._patch:
    return mock.patch.object(LowRankUpdate, "add_input_gradient", return_value=None)


def _scale_by_rank() -> mock._patch:
    return mock.patch.object(LoraOptions, "scale", property(lambda self: self.alpha / self.rank))


def _frozen_weight_learns() -> mock._patch:
    original, frozen = Finetuning.trains, "model.layers.2.mlp.up_proj.weight"
    return mock.patch.object(
        Finetuning, "trains", lambda self, name: name == frozen or original(self, name)
    )


def _every_rank_drops_the_first_ranks_columns() -> mock._patch:
    original = Dropout.of

    def of(probability: float, seed: int, layer: str, first_column: int) -> Dropout:
        del first_column
        return original(probability, seed, layer, 0)

    return mock.patch.object(Dropout, "of", of)


def _recomputation_drops_others() -> mock._patch:
    original, calls = Dropout.__call__, iter(range(10**9))

    def again(self: Dropout, x: Tensor) -> Tensor:
        return original(Dropout(self.probability, self.key + next(calls), self.first_column), x)

    return mock.patch.object(Dropout, "__call__", again)


MUTANTS: dict[str, tuple[Patch, Case]] = {
    "factors_not_summed": (_factors_not_summed, Case(Layout("m1", tp=2), LORA)),
    "backward_without_scale": (_backward_without_scale, Case(Layout("m2"), LORA)),
    "input_without_the_updates_gradient": (
        _input_without_the_updates_gradient, Case(Layout("m3"), LORA),
    ),
    "scale_by_rank": (_scale_by_rank, Case(Layout("m4"), SOME)),
    "frozen_weight_learns": (_frozen_weight_learns, Case(Layout("m5"), LORA)),
    "every_rank_drops_the_first_ranks_columns": (
        _every_rank_drops_the_first_ranks_columns, Case(Layout("m6", tp=2), DROPOUT),
    ),
    "recomputation_drops_others": (
        _recomputation_drops_others, Case(Layout("m7", recompute="full"), DROPOUT),
    ),
}  # fmt: skip


def run_mutant(name: str, directory: Path) -> None:
    patch, case = MUTANTS[name]
    with patch():
        run_case(case, directory)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finetuning_mutants")
    for world in (1, 2):
        jobs = [
            (run_mutant, (name, directory))
            for name, (_, case) in MUTANTS.items()
            if case.world == world
        ]
        if world == 1:
            jobs.append((run_case, (DROPPING, directory)))
        run_world(world, jobs, directory)
    return directory


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, results: Path) -> None:
    case = MUTANTS[name][1]
    right = expected(case.finetuning, 2)
    if case.finetuning is DROPOUT:
        right = read_result(DROPPING.layout, results)
    found = mismatches(read_result(case.layout, results), right)
    assert found, f"the suite did not notice {name}"
    assert not any(line.startswith("initial") for line in found), "only the step was changed"
