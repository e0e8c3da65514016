"""The pipeline executor: runs one rank's action list and moves activations and gradients.

Sends are asynchronous and kept until done; receives are posted when their action is next, into
a buffer sized from that micro-batch's own metadata, so micro-batches may differ in length and
only those in flight hold memory. Messages of one kind between two ranks keep the order in which
both run them, which is all NCCL needs once `connect` has opened every channel. Gradients leave
the loss already scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sdar.parallel.mesh import ParallelMesh, PipelineGroups
from megatron_sdar.parallel.schedule import BACKWARD, Action, make_schedule


class SizedBatch(Protocol):
    """What the executor must know of a micro-batch."""

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True)
class ActivationFormat:
    """Shape and dtype of what passes between stages: [num_tokens / split, hidden_size]."""

    hidden_size: int
    token_split: int
    dtype: torch.dtype


class Channel:
    """Where one local chunk's inputs come from and its outputs go to."""

    def __init__(self, mesh: ParallelMesh, chunk: int, num_chunks: int) -> None:
        ranks = dist.get_process_group_ranks(mesh.pp.get_group())
        last = mesh.pp_size - 1
        self.has_previous = not (mesh.pp_rank == 0 and chunk == 0)
        self.has_next = not (mesh.pp_rank == last and chunk == num_chunks - 1)
        self.previous_rank = ranks[mesh.pp_rank - 1]
        self.next_rank = ranks[(mesh.pp_rank + 1) % mesh.pp_size]
        groups = mesh.pipeline_groups
        if groups is not None:
            wraps_in, wraps_out = mesh.pp_rank == 0, mesh.pp_rank == last
            self.receive_activation = groups.forward_wrap if wraps_in else groups.forward
            self.send_activation = groups.forward_wrap if wraps_out else groups.forward
            self.send_gradient = groups.backward_wrap if wraps_in else groups.backward
            self.receive_gradient = groups.backward_wrap if wraps_out else groups.backward


class PipelineExecutor:
    """Runs forward and backward of all micro-batches of a step over this rank's chunks.

    Args:
        chunks: callables (hidden or None, batch) -> hidden, or a scalar loss on the last stage.
        mesh: the rank grid.
        activation: format of what passes between stages.
        before_backward: called with (chunk, is_last_of_step) before each backward.
        passes_gradients: by chunk, whether the stage before it wants a gradient; default: all.
            A stage whose output has none runs no backward: nothing up to it is trained.

    Attributes:
        progress: told in words what begins; called for every action.
        micro_batch_outputs: on the last stage each micro-batch's output of the last run, by its
            number (scalars, detached).
    """

    def __init__(
        self,
        chunks: Sequence[Callable[..., Tensor]],
        mesh: ParallelMesh,
        activation: ActivationFormat,
        before_backward: Callable[[int, bool], None],
        passes_gradients: Sequence[bool] | None = None,
    ) -> None:
        self.chunks = chunks
        self.mesh = mesh
        self.activation = activation
        self.before_backward = before_backward
        self.passes_gradients = passes_gradients or [True] * len(chunks)
        self.progress: Callable[[str], None] = ignore
        self.micro_batch_outputs: dict[int, Tensor] = {}
        self.channels = [Channel(mesh, chunk, len(chunks)) for chunk in range(len(chunks))]
        if mesh.pipeline_groups is not None:
            connect(mesh, mesh.pipeline_groups)

    def run(self, batches: Sequence[SizedBatch]) -> Tensor:
        """Run one step's micro-batches.

        Args:
            batches: the micro-batches, the same on every pipeline rank.

        Returns:
            The sum of the last stage's outputs (a scalar), detached; 0 on other stages.

        Collectives: point-to-point sends and receives between pipeline neighbours, plus
        whatever the chunks run.
        """
        schedule = make_schedule(self.mesh.pp_size, len(self.chunks), len(batches))
        actions = schedule[self.mesh.pp_rank]
        remaining = [len(batches)] * len(self.chunks)
        inputs: dict[tuple[int, int], Tensor | None] = {}
        outputs: dict[tuple[int, int], Tensor] = {}
        sends: list[tuple[dist.Work, Tensor]] = []
        total = torch.zeros((), device=self.mesh.device)
        self.micro_batch_outputs = {}
        for action in actions:
            key = (action.chunk, action.micro_batch)
            batch = batches[action.micro_batch]
            direction = "backward" if action.kind == BACKWARD else "forward"
            self.progress(f"{direction} of micro-batch {action.micro_batch}")
            sends = [(work, tensor) for work, tensor in sends if not work.is_completed()]
            if action.kind == BACKWARD:
                remaining[action.chunk] -= 1
                self.before_backward(action.chunk, remaining[action.chunk] == 0)
                self._backward(action, batch, inputs.pop(key), outputs.pop(key), sends)
                continue
            hidden = self._receive_input(action, batch)
            output = self.chunks[action.chunk](hidden, batch)
            if self.channels[action.chunk].has_next:
                channel = self.channels[action.chunk]
                sent = output.detach().contiguous()
                sends.append(start_send(sent, channel.next_rank, channel.send_activation))
            else:
                summed = output.detach().sum()
                self.micro_batch_outputs[action.micro_batch] = summed
                total = total + summed
            inputs[key], outputs[key] = hidden, output
        self.progress("waiting for its sends")
        for work, _ in sends:
            work.wait()
        return total

    def _receive_input(self, action: Action, batch: SizedBatch) -> Tensor | None:
        channel = self.channels[action.chunk]
        if not channel.has_previous:
            return None
        hidden = activation_buffer(batch, self.activation, self.mesh)
        dist.recv(hidden, src=channel.previous_rank, group=channel.receive_activation)
        return hidden.requires_grad_(self.passes_gradients[action.chunk])

    def _backward(
        self,
        action: Action,
        batch: SizedBatch,
        hidden: Tensor | None,
        output: Tensor,
        sends: list[tuple[dist.Work, Tensor]],
    ) -> None:
        if not output.requires_grad:
            return
        channel = self.channels[action.chunk]
        upstream = None
        if channel.has_next:
            upstream = activation_buffer(batch, self.activation, self.mesh)
            dist.recv(upstream, src=channel.next_rank, group=channel.receive_gradient)
        torch.autograd.backward(output, upstream)
        if hidden is not None and hidden.requires_grad:
            assert hidden.grad is not None, "the stage did not use its input"
            grad = hidden.grad.contiguous()
            sends.append(start_send(grad, channel.previous_rank, channel.send_gradient))


def ignore(phase: str) -> None:
    """Nobody wants to know what begins."""
    del phase


def activation_buffer(
    batch: SizedBatch, activation: ActivationFormat, mesh: ParallelMesh
) -> Tensor:
    """Uninitialised room for one micro-batch's hidden states between two stages."""
    split = activation.token_split
    assert batch.num_tokens % split == 0, "row length is a multiple of tp (validated)"
    return torch.empty(
        (batch.num_tokens // split, activation.hidden_size),
        dtype=activation.dtype,
        device=mesh.device,
    )


def connect(mesh: ParallelMesh, groups: PipelineGroups) -> None:
    """Send one number through every channel, in an order that cannot wait in a circle.

    NCCL makes a two-rank communicator on a channel's first message and blocks until the peer
    does the same; in the middle of a schedule that could deadlock.

    Collectives: point-to-point messages along the whole pipeline.
    """
    ranks = dist.get_process_group_ranks(mesh.pp.get_group())
    me, last = mesh.pp_rank, mesh.pp_size - 1
    token = torch.zeros(1, device=mesh.device)
    up = [(groups.forward, stage, stage + 1) for stage in range(last)]
    down = [(groups.backward, stage + 1, stage) for stage in range(last)]
    around = [(groups.forward_wrap, last, 0), (groups.backward_wrap, 0, last)]
    for group, source, target in [*up, *down, *around]:
        if me == source:
            dist.send(token, dst=ranks[target], group=group)
        elif me == target:
            dist.recv(token, src=ranks[source], group=group)


def start_send(tensor: Tensor, rank: int, group: dist.ProcessGroup) -> tuple[dist.Work, Tensor]:
    """Start a send; the tensor is returned with it to stay alive until it is done."""
    work = dist.isend(tensor, dst=rank, group=group)
    assert work is not None, "this rank is in the group it sends in"
    return work, tensor
