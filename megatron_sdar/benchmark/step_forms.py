"""The forms of one optimizer step that are compared, all on the same documents and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from sdar_kernels.bf16_products import bf16_is_slow
from torch import Tensor

from megatron_sdar.benchmark.step_data import Document
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.step_own import make_own_step
from megatron_sdar.benchmark.step_peer import PeerRow, PeerStep, peer_rows
from megatron_sdar.benchmark.step_rows import Packing, RowShape
from megatron_sdar.diffusion.rows import Row
from megatron_sdar.training.flops import RowWork, StepFlops, step_flops

PEER, PAPER, EXACT, EXACT_BF16 = "peer", "paper", "exact", "exact bf16"
# Two complementary noisy copies behind one clean copy.
EXACT_VIEWS = "exact, two views"
FORMS = (PEER, PAPER, EXACT, EXACT_VIEWS, EXACT_BF16)
NUM_VIEWS = {PEER: 1, PAPER: 1, EXACT: 1, EXACT_VIEWS: 2, EXACT_BF16: 1}


def measured_forms(slowdown: float, *, slow_bf16: bool) -> list[str]:
    """All forms; that in bf16 not where its products are slow (`bf16_slowdown`), unless asked."""
    left_out = bf16_is_slow(slowdown) and not slow_bf16
    return [name for name in FORMS if not (name == EXACT_BF16 and left_out)]


class Form(Protocol):
    """One way to train on the bound documents."""

    def bind(self, documents: Sequence[Document], shape: RowShape) -> None:
        """Make the rows of the coming steps."""

    def step(self, num_rows: int | None = None) -> float:
        """One optimizer step over the rows (or the first few); returns the loss."""

    def packing(self, documents: Sequence[Document], shape: RowShape) -> Packing:
        """Which documents share a row."""

    def flops(self) -> StepFlops:
        """What the products of this form's step cost, forward and backward."""


class PeerForm:
    """Published code, see step_peer."""

    def __init__(self, options: StepOptions, weights: Mapping[str, Tensor] | None) -> None:
        self._arch = options.arch
        self._step = PeerStep(options.arch, weights, options.optim)
        self._rows: list[PeerRow] = []

    @property
    def num_parameters(self) -> int:
        return self._step.num_parameters

    def bind(self, documents: Sequence[Document], shape: RowShape, view: int = 0) -> None:
        """The same with the noise of one view."""
        self._rows = peer_rows(documents, shape, view)

    def step(self, num_rows: int | None = None) -> float:
        return self._step.run(self._rows[:num_rows])

    def packing(self, documents: Sequence[Document], shape: RowShape) -> Packing:
        return shape.pack_whole(documents)

    def flops(self) -> StepFlops:
        """All pairs of the dense mask, and the head for the whole noisy half: it computes them."""
        works = []
        for row in self._rows:
            tokens, noisy = row.input_ids.numel(), row.masked.numel()
            works.append(RowWork(tokens, tokens**2, noisy, noisy * tokens))
        return step_flops(self._arch, works, trimmed=False)


class OwnForm:
    """The trainer's step; exact leaves out what the loss does not depend on."""

    def __init__(
        self, options: StepOptions, *, exact: bool, num_views: int, compute: torch.dtype
    ) -> None:
        self._arch, self._exact, self._num_views = options.arch, exact, num_views
        self._learning_rate = options.optim.learning_rate
        self.training = make_own_step(
            options.arch,
            options.optim,
            options.seed,
            trimmed=exact,
            compute=compute,
            fused_kernels=options.fused_kernels,
            attention_backend=options.attention_backend,
        )
        self._rows: list[Row] = []

    def bind(self, documents: Sequence[Document], shape: RowShape) -> None:
        self._rows = (
            shape.kept_rows(documents, self._num_views)
            if self._exact
            else shape.whole_rows(documents)
        )

    def step(self, num_rows: int | None = None) -> float:
        return self.training.run(self._rows[:num_rows], self._learning_rate).loss

    def packing(self, documents: Sequence[Document], shape: RowShape) -> Packing:
        if self._exact:
            return shape.pack_kept(documents, self._num_views)
        return shape.pack_whole(documents)

    def flops(self) -> StepFlops:
        works = [RowWork.of(row) for row in self._rows]
        return step_flops(self._arch, works, trimmed=self._exact)


def make_form(
    name: str, options: StepOptions, weights: Mapping[str, Tensor] | None
) -> PeerForm | OwnForm:
    """A form by name. Ours need the process group; weights are for the peer."""
    if name == PEER:
        return PeerForm(options, weights)
    compute = torch.bfloat16 if name == EXACT_BF16 else torch.float32
    return OwnForm(options, exact=name != PAPER, num_views=NUM_VIEWS[name], compute=compute)
