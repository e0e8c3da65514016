"""What decoding asks of the last stage: whole logits, and its word to all ranks of the pipeline.

Every function is called by all ranks of one tensor- and pipeline-parallel replica.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_sdar.parallel.collectives import all_gather_tokens
from megatron_sdar.parallel.mesh import ParallelMesh


def gather_vocabulary(
    logits_MV: Tensor, shard_size: int, vocab_size: int, mesh: ParallelMesh
) -> Tensor:
    """Whole logits [M, vocab_size] from every tp rank's valid columns, [M, at most shard_size].

    Collective: all_gather (tp).
    """
    if mesh.tp_size == 1:
        return logits_MV
    columns = logits_MV.new_zeros(shard_size, logits_MV.shape[0])
    columns[: logits_MV.shape[1]] = logits_MV.t()
    return all_gather_tokens(columns, mesh.tp.get_group())[:vocab_size].t()


def spread_from_last_stage(values: Tensor, mesh: ParallelMesh) -> None:
    """In place, the last stage's values on every rank; there, those of its first tp rank.

    The tp ranks have computed the same, but what they decide must not hang on that.

    Collectives: broadcast (tp) on the last stage, broadcast (pp).
    """
    if mesh.tp_size > 1 and mesh.pp_rank == mesh.pp_size - 1:
        group = mesh.tp.get_group()
        dist.broadcast(values, src=dist.get_process_group_ranks(group)[0], group=group)
    if mesh.pp_size > 1:
        group = mesh.pp.get_group()
        dist.broadcast(values, src=dist.get_process_group_ranks(group)[-1], group=group)
