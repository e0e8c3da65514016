"""What one forward and backward come to, in numbers that no layout changes, and comparing two.

The loss, the gradient norm and the gradient norm of every parameter: each is one number of the
whole model however it is divided, so two layouts can be compared without moving tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_sdar.parallel.gradients import local_gradients
from megatron_sdar.parallel.launch import gather_from_all
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.parallel.sharding import replication
from megatron_sdar.training.step import TrainingStep

# Relative differences that rounding explains, by the dtype that layers compute in. The largest
# of the demo's model in seven layouts of four processes: 5e-16, 9e-7 and 8e-3.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}
# A parameter whose gradient is a small part of the whole is judged by this share of the whole.
FLOOR = 1e-2


@dataclass(frozen=True)
class StepNumbers:
    """Of one forward and backward.

    Attributes:
        loss, grad_norm: of the step.
        norms: gradient norm of every trained parameter by global name.
    """

    loss: float
    grad_norm: float
    norms: Mapping[str, float]


@dataclass(frozen=True)
class Difference:
    """One number of two, and how far apart they are relative to what is allowed (1: just)."""

    name: str
    expected: float
    found: float
    excess: float


def step_numbers(step: TrainingStep, loss: Tensor, mesh: ParallelMesh) -> StepNumbers:
    """The numbers of the gradients that `step` holds, the same on every rank.

    Collectives: all_reduce, all_gather_object (world).
    """
    gradients = local_gradients(step.parameters)
    squares: dict[str, float] = {}
    for name, gradient in gradients.items():
        parameter = step.parameters[name]
        assert isinstance(parameter, DTensor), f"{name} is not distributed"
        if name not in step.counted_elsewhere:
            squares[name] = gradient.double().square().sum().item() / replication(parameter)
    totals: dict[str, float] = {}
    for theirs in gather_from_all(squares, mesh):
        for name, value in theirs.items():
            totals[name] = totals.get(name, 0.0) + value
    norms = {name: math.sqrt(value) for name, value in totals.items()}
    return StepNumbers(loss.item(), step.grad_norm(gradients).item(), norms)


def differences(
    found: StepNumbers, expected: StepNumbers, tolerance: float
) -> tuple[list[Difference], list[str]]:
    """Every number with its difference, the worst first; and names that only one of them has.

    A number that is not finite differs from all.
    """
    floor = FLOOR * expected.grad_norm
    pairs = {
        "loss": (expected.loss, found.loss, 0.0),
        "gradient norm": (expected.grad_norm, found.grad_norm, 0.0),
    }
    for name in expected.norms.keys() & found.norms.keys():
        pairs[name] = (expected.norms[name], found.norms[name], floor)
    result = []
    for name, (theirs, ours, least) in pairs.items():
        allowed = tolerance * (abs(theirs) + least)
        distance = abs(ours - theirs)
        excess = 0.0 if distance == 0 else distance / allowed if allowed else math.inf
        if not math.isfinite(distance):
            excess = math.inf
        result.append(Difference(name, theirs, ours, excess))
    unmatched = sorted(expected.norms.keys() ^ found.norms.keys())
    return sorted(result, key=lambda each: (-each.excess, each.name)), unmatched


def format_differences(rows: list[Difference]) -> str:
    """A table: name, one process, this layout, difference in units of what is allowed."""
    cells = [("", "one process", "this layout", "of tolerance")]
    cells += [
        (row.name, f"{row.expected:.8g}", f"{row.found:.8g}", f"{row.excess:.2g}") for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return "\n".join(
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
