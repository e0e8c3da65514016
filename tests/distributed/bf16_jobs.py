"""Gradients of many bf16 micro-batches: summed by the trainer, and summed exactly by the test.

Under llamafactory normalization a micro-batch's scale does not depend on the others, so its
gradient can be had alone: every rank but one trains on a row without masked tokens, whose
gradient is zero. Those are bf16 numbers in fp32 storage, whatever the trainer reduces in; their
fp64 sum differs from the trainer's gradient by nothing but how the trainer adds up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from distributed.layouts import Document, Layout, build, make_steps, micro_batches
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.diffusion.rows import Row
from megatron_sdar.parallel import data_parallel
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh
from megatron_sdar.training.step import TrainingStep

Gradients = dict[str, Tensor]
MICRO_BATCHES = 8


@contextmanager
def reducing_in_bf16() -> Iterator[None]:
    """The defect: FSDP accumulates and reduces gradients in the compute dtype."""

    def policy(param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> MixedPrecisionPolicy:
        del reduce_dtype
        return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=param_dtype)

    with mock.patch.object(data_parallel, "MixedPrecisionPolicy", policy):
        yield


def run_accumulation(layout: Layout, directory: Path) -> None:
    """Save, per pipeline rank, the gradients of one step of MICRO_BATCHES per rank.

    `exact`: fp64 sum of micro-batches run alone; `product`: one backward of all; `defective`:
    the same with the defect in place.
    """
    mesh = build_mesh(
        torch.device("cpu"),
        layout.tp,
        layout.pp,
        replicate_data_parallel=layout.strategy == "no_shard",
    )
    rows = [row for step_rows in make_steps(silent_half=False) for row in step_rows] * 2
    batches = micro_batches(layout, rows[: MICRO_BATCHES * layout.dp], mesh.dp_rank)
    assert len(batches) == MICRO_BATCHES, len(batches)
    silence = micro_batches(layout, [[_silent(d) for d in rows[0]]] * layout.dp, mesh.dp_rank)

    step = _new_step(layout, mesh)
    exact: Gradients = {}
    for batch in batches:
        for dp_rank in range(layout.dp):
            alone = _gradients(step, [batch] if mesh.dp_rank == dp_rank else silence)
            for name, gradient in alone.items():
                exact[name] = exact.get(name, torch.zeros(())) + gradient.double()
    product = _gradients(step, batches)
    with reducing_in_bf16():
        defective = _gradients(_new_step(layout, mesh), batches)
    if mesh.tp_rank == 0 and mesh.dp_rank == 0:
        result = {"exact": exact, "product": product, "defective": defective}
        torch.save(result, directory / f"{layout.name}.{mesh.pp_rank}.pt")


def _silent(document: Document) -> Document:
    noise = NoiseDraw(document.noise.mask_prob, document.noise.masked & False)
    return replace(document, noise=noise)


def _new_step(layout: Layout, mesh: ParallelMesh) -> TrainingStep:
    step, _ = build(layout, mesh)
    step.normalization = "llamafactory"
    return step


def _gradients(step: TrainingStep, batches: Sequence[Row]) -> Gradients:
    """Unsharded gradients of this pipeline rank after one backward. Collective: all_gather."""
    for parameter in step.parameters.values():
        parameter.grad = None
    step.backward(batches)
    whole = {}
    for name, parameter in step.parameters.items():
        assert isinstance(parameter.grad, DTensor), name
        whole[name] = parameter.grad.full_tensor().clone()
    return whole


def summation_errors(layout: Layout, directory: Path, which: str) -> dict[str, float]:
    """Largest error of each gradient of `which`, relative to its largest exact element."""
    errors = {}
    for rank in range(layout.pp):
        result = torch.load(directory / f"{layout.name}.{rank}.pt", weights_only=True)
        assert set(result[which]) == set(result["exact"])
        for name, exact in result["exact"].items():
            assert name not in errors, f"{name} is owned twice"
            difference = (result[which][name].double() - exact).abs().max()
            errors[name] = (difference / exact.abs().max()).item()
    return errors
