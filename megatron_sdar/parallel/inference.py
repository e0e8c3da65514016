"""One forward at a time over all of a model's stages, for decoding.

Unlike in training nothing overlaps: what a forward computes decides what the next one reads. So
hidden states travel stage by stage, and the last stage's word goes back to all ranks of the
pipeline. Every function is called by all ranks of one tensor- and pipeline-parallel replica.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdar.parallel.collectives import all_gather_tokens
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.parallel.pipeline import ActivationFormat, Channel, SizedBatch, connect


class StageChain:
    """This rank's part of a forward through all stages.

    Args:
        chunks: this rank's stages in order, each (hidden or None, batch) -> hidden, or what the
            last stage gives.
        mesh: the rank grid.
        activation: format of what passes between stages.

    Collectives: opens the pipeline's channels (see `pipeline.connect`).
    """

    def __init__(
        self,
        chunks: Sequence[Callable[..., Tensor]],
        mesh: ParallelMesh,
        activation: ActivationFormat,
    ) -> None:
        self._chunks = chunks
        self._mesh = mesh
        self._activation = activation
        self._channels = [Channel(mesh, chunk, len(chunks)) for chunk in range(len(chunks))]
        if mesh.pipeline_groups is not None:
            connect(mesh, mesh.pipeline_groups)

    def run(self, batch: SizedBatch) -> Tensor | None:
        """One forward; what the last stage gives, on the rank that holds it.

        Collectives: point-to-point messages between pipeline neighbours, and those of the chunks.
        """
        output = None
        for chunk, channel in zip(self._chunks, self._channels, strict=True):
            hidden = None
            if channel.has_previous:
                hidden = self._buffer(batch)
                dist.recv(hidden, src=channel.previous_rank, group=channel.receive_activation)
            output = chunk(hidden, batch)
            if channel.has_next:
                sent = output.contiguous()
                dist.send(sent, dst=channel.next_rank, group=channel.send_activation)
                output = None
        return output

    def _buffer(self, batch: SizedBatch) -> Tensor:
        shape = (batch.num_tokens // self._activation.token_split, self._activation.hidden_size)
        return torch.empty(shape, dtype=self._activation.dtype, device=self._mesh.device)


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
