"""What happens to gradients between the last backward and the optimizer.

Data-parallel sums are FSDP's; here the remaining ones run once per step: replicated parameters
that each tp rank saw only a part of, and tied embeddings on two pipeline stages. Then the
global norm, counted once per element of the model whatever the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_sdar.parallel.collectives import all_reduce_sum
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.parallel.sharding import local_tensor, replication


def local_gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Local shards of all gradients by parameter name."""
    gradients = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} took no part in the step"
        gradients[name] = local_tensor(parameter.grad)
    return gradients


def sum_partial_gradients(
    gradients: Mapping[str, Tensor], partial_names: Set[str], mesh: ParallelMesh
) -> None:
    """Sum over tp the gradients that are partial there, in place.

    Collective: one all_reduce (tp) of all of them in one buffer.
    """
    chosen = [gradients[name] for name in sorted(partial_names)]
    if mesh.tp_size == 1 or not chosen:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in chosen])
    all_reduce_sum(flat, mesh.tp.get_group())
    start = 0
    for gradient in chosen:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def sum_tied_gradients(
    gradients: Mapping[str, Tensor], tied_name: str | None, mesh: ParallelMesh
) -> None:
    """Sum the embedding's and the head's gradient when two stages hold the tied weight.

    Args:
        tied_name: the copy on this rank, or None on stages that hold none.

    Collective: all_reduce (first and last stage).
    """
    if tied_name is not None:
        assert mesh.tied_group is not None, "a split tied weight needs a pipeline"
        dist.all_reduce(gradients[tied_name], group=mesh.tied_group)


def global_grad_norm(
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, Tensor],
    skipped: Set[str],
    device: torch.device,
) -> Tensor:
    """L2 norm over the whole model, a float64 scalar, the same on every rank.

    Args:
        parameters: this rank's parameters (their placements say how often an element occurs).
        gradients: local shards.
        skipped: names counted elsewhere (the second copy of a tied weight).
        device: where the sum is reduced.

    Collective: all_reduce of one number (world).
    """
    squares = torch.zeros((), dtype=torch.float64, device=device)
    counted = [name for name in gradients if name not in skipped and gradients[name].numel()]
    norms = torch._foreach_norm([gradients[name] for name in counted]) if counted else []
    for name, norm in zip(counted, norms, strict=True):
        parameter = parameters[name]
        assert isinstance(parameter, DTensor), f"{name} is not distributed"
        squares += norm.double().square() / replication(parameter)
    dist.all_reduce(squares)
    return squares.sqrt()


def scale_gradients(gradients: Mapping[str, Tensor], factor: float) -> None:
    """Multiply all gradients by a number, in place."""
    if gradients:  # a pipeline stage may have nothing to train
        torch._foreach_mul_(list(gradients.values()), factor)
