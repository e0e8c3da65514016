"""Forwards of a model over a cache of keys and values, on this rank's stages.

Owns the way from token ids to logits: the micro-batch, the stages in order, the whole vocabulary.
While a runner is entered the model is in eval mode without gradients; afterwards it is as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from megatron_sdar.model.batch import DeviceBatch
from megatron_sdar.model.cache import CachedTokens, KeyValueCache
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel.data_parallel import free_gathered
from megatron_sdar.parallel.forward_pipeline import ForwardPipeline
from megatron_sdar.parallel.inference import gather_vocabulary
from megatron_sdar.parallel.mesh import ParallelMesh, sum_over_data_parallel
from megatron_sdar.parallel.pipeline import ActivationFormat


@dataclass(frozen=True)
class TokenRuns:
    """The tokens of one forward: of each of N sequences, successive ones.

    Attributes:
        first_row: the sequences lie in successive slots of the cache from here on.
        starts: of each sequence, the position of the first token.
        parts: of each, its tokens' ids, at least one.
        block_length: tokens that see each other.
    """

    first_row: int
    starts: Sequence[int]
    parts: Sequence[Sequence[int]]
    block_length: int


class ModelRunner:
    """Runs the model that all ranks of a replica hold together; a context manager.

    Data-parallel ranks may share the weights out (FSDP), so a forward of one is a forward of
    all: each forward is announced, and whoever has none left joins in with an idle one.

    Args:
        stages: this rank's stages in order.
        mesh: the grid they were built on.

    Collectives: opens the pipeline's channels.
    """

    def __init__(self, stages: Sequence[SdarStage], mesh: ParallelMesh) -> None:
        self.arch = stages[0].arch
        self._stages, self._mesh = stages, mesh
        options = stages[0].options
        split = mesh.tp_size if stages[0].sequence_parallel else 1
        dtype = options.compute_dtype or options.dtype
        self._token_split = split
        self._shard_size = options.padded_vocab_size // mesh.tp_size
        self._pipeline = ForwardPipeline(
            [_logits_stage(stage) for stage in stages],
            mesh,
            ActivationFormat(self.arch.hidden_size, split, dtype),
        )

    def __enter__(self) -> ModelRunner:
        self._was_training = [stage.training for stage in self._stages]
        for stage in self._stages:
            stage.eval()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stage, training in zip(self._stages, self._was_training, strict=True):
            stage.train(training)
            free_gathered(stage)

    def read(self, cache: KeyValueCache, runs: TokenRuns) -> None:
        """Compute whole blocks, to store their keys and values."""
        self._forward(cache, runs, [0])

    def logits(self, cache: KeyValueCache, runs: TokenRuns, wanted_NB: Tensor) -> Tensor | None:
        """Compute runs that end with a block each, and store keys and values.

        Args:
            wanted_NB: bool [N, B], positions of those N blocks.

        Returns:
            Logits [M, V] of the wanted positions, row after row, on the ranks of the last stage.

        Collectives: those of the forward; all_gather (tp) on the last stage.
        """
        ends = torch.tensor([len(part) for part in runs.parts]).cumsum(0)
        rows, places = wanted_NB.cpu().nonzero(as_tuple=True)
        indices = (ends[rows] - runs.block_length + places).tolist()
        logits = self._forward(cache, runs, indices)
        if logits is None:
            return None
        logits = gather_vocabulary(logits, self._shard_size, self.arch.vocab_size, self._mesh)
        return logits[: len(indices)]

    def keep_company(self) -> None:
        """Join in the forwards of data-parallel ranks that are not done yet, until all are.

        Collectives: an all_reduce (dp) and a forward of all stages, each time.
        """
        idle = TokenRuns(0, [0], [[0]], 1)
        while self._mesh.dp_size > 1 and sum_over_data_parallel(0.0, self._mesh) > 0:
            self._run(KeyValueCache(1, 1), idle, [0])

    def _forward(
        self, cache: KeyValueCache, runs: TokenRuns, indices: Sequence[int]
    ) -> Tensor | None:
        if self._mesh.dp_size > 1:
            sum_over_data_parallel(1.0, self._mesh)
        return self._run(cache, runs, indices)

    @torch.no_grad()
    def _run(self, cache: KeyValueCache, runs: TokenRuns, indices: Sequence[int]) -> Tensor | None:
        """This rank's logits of the tokens at `indices` [M], on the last stage."""
        device = self._mesh.device
        lengths = [len(part) for part in runs.parts]
        tokens = CachedTokens.at(
            cache, runs.first_row, runs.starts, lengths, runs.block_length, device
        )
        ids = torch.tensor([token for part in runs.parts for token in part], device=device)
        # Sequence parallelism divides both counts by tp. A token that occurs twice is computed
        # and stored twice alike.
        repeated = _padded(torch.arange(len(ids), device=device), self._token_split)
        wanted = _padded(torch.tensor(indices, device=device), self._token_split)
        tokens = tokens.select(repeated)
        nothing = ids.new_zeros(0)
        batch = DeviceBatch(
            input_ids=ids[repeated],
            position_ids=tokens.positions,
            mask=tokens,
            loss_positions=wanted,
            target_ids=nothing,
            loss_weights=nothing.double(),
            loss_scale=0.0,
            selected_mask=tokens.select(wanted),
        )
        # One at a time: what a forward computes decides what the next one reads.
        (output,) = self._pipeline.run([batch])
        return output


def _padded(indices: Tensor, multiple: int) -> Tensor:
    """The last one is repeated until the length is a multiple."""
    missing = -len(indices) % multiple
    return torch.cat((indices, indices[-1:].expand(missing)))


def _logits_stage(stage: SdarStage) -> Callable[[Tensor | None, DeviceBatch], Tensor]:
    def run(hidden: Tensor | None, batch: DeviceBatch) -> Tensor:
        # Through the module, so that FSDP's hooks run.
        output: Tensor = stage(hidden, batch, return_logits=True)
        return output

    return run
