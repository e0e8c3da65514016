"""A small model of one process, whose loss and gradients two kernel families are compared by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from distributed.layouts import Layout
from torch import Tensor
from unit.packings import pack, random_document

from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.batch import to_device

ARCH = replace(Layout("small").arch, vocab_size=1003)
PADDED = 1024
CPU = torch.device("cpu")


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small_stage(fused_kernels: str, recompute: str, attention: str) -> SdarStage:
    """The whole model, initialised, in fp64."""
    options = ModelOptions(PADDED, torch.float64, False, recompute, attention, fused_kernels)
    (stage,) = build_stages(ARCH, build_mesh(CPU, 1, 1), options)
    materialize([stage], CPU)
    initialize([stage], seed=11)
    assert isinstance(stage, SdarStage)
    return stage


def loss_and_gradients(fused_kernels: str, recompute: str, attention: str) -> list[Tensor]:
    """The loss of one row, scalar, and every weight's gradient, all in fp64."""
    stage = small_stage(fused_kernels, recompute, attention)
    row = pack([random_document(np.random.default_rng(2), 4, 6, drop=False)], 4, 5).row
    loss = stage(None, to_device(row, CPU, 0.1))
    loss.backward()
    return [loss.detach(), *(weight.grad._local_tensor for weight in stage.parameters())]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Raises AssertionError where two results of `loss_and_gradients` differ."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * max(1.0, float(theirs.abs().max()))
