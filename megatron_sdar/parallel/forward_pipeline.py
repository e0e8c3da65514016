"""Forwards of micro-batches through all stages, without backwards: evaluation and decoding.

Every rank runs its (chunk, micro-batch) pairs in one order, which is the same on all of them, and
sends without waiting. What a pair needs comes earlier in that order, so ranks cannot wait in a
circle, and neighbours work on different micro-batches at the same time. Micro-batches are taken
when their turn comes: only those in flight hold memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.parallel.pipeline import (
    ActivationFormat,
    Channel,
    SizedBatch,
    activation_buffer,
    connect,
    start_send,
)


class ForwardPipeline:
    """Runs micro-batches forward over this rank's chunks.

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
        self._sends: list[tuple[dist.Work, Tensor]] = []
        if mesh.pipeline_groups is not None:
            connect(mesh, mesh.pipeline_groups)

    def run(self, batches: Iterable[SizedBatch]) -> Iterator[Tensor | None]:
        """What the last stage gives for each micro-batch, in order; None on other ranks.

        Args:
            batches: the micro-batches, as many and as large on every pipeline rank.

        Collectives: point-to-point messages between pipeline neighbours, and those of the chunks,
        while the iterator is drained; every rank must drain it.
        """
        batches = iter(batches)
        # As in interleaved training: as many micro-batches as there are ranks go through a chunk
        # before the next one's turn, so that the first rank finds its input ready.
        while group := list(islice(batches, self._mesh.pp_size)):
            outputs: list[Tensor | None] = []
            for chunk, channel in enumerate(self._channels):
                outputs = [self._forward(chunk, channel, batch) for batch in group]
            yield from outputs
        for work, _ in self._sends:
            work.wait()
        self._sends = []

    @torch.no_grad()
    def _forward(self, chunk: int, channel: Channel, batch: SizedBatch) -> Tensor | None:
        hidden = None
        if channel.has_previous:
            hidden = activation_buffer(batch, self._activation, self._mesh)
            dist.recv(hidden, src=channel.previous_rank, group=channel.receive_activation)
        output = self._chunks[chunk](hidden, batch)
        if not channel.has_next:
            return output
        # A rank that ran far ahead would hold all it has sent.
        while len(self._sends) > self._mesh.pp_size:
            self._sends.pop(0)[0].wait()
        sent = output.contiguous()
        self._sends.append(start_send(sent, channel.next_rank, channel.send_activation))
        return None
