"""A model that was trained a little and then stands still, so that its gradients can be compared.

Documents that are measured come first in the corpus, those it was trained on behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_sdar.benchmark.step_data import Corpus
from megatron_sdar.benchmark.step_own import make_own_step
from megatron_sdar.benchmark.view_forms import (
    FORMS,
    Noises,
    ViewsOptions,
    draw_form,
    rows_without_padding,
)
from megatron_sdar.config import OptimConfig
from megatron_sdar.diffusion.rows import Row
from megatron_sdar.parallel.gradients import local_gradients
from megatron_sdar.training.flops import RowWork, step_flops
from megatron_sdar.training.step import TrainingStep

Say = Callable[[str], None]


class StillModel:
    """Gradients of rows of the corpus. Needs a process group.

    Args:
        options: model, warm-up and rows.
        corpus: documents; their own noise is not used.
        say: called with what is being done.
    """

    def __init__(self, options: ViewsOptions, corpus: Corpus, say: Say) -> None:
        self._options, self._corpus, self._say = options, corpus, say
        self._step: TrainingStep = make_own_step(
            options.arch,
            OptimConfig(learning_rate=options.learning_rate),
            options.seed,
            trimmed=True,
        )

    @property
    def num_parameters(self) -> int:
        """P, elements of a gradient."""
        return sum(shard.numel() for shard in self._step.optimizer.shards.values())

    def warm_up(self) -> float | None:
        """Train on the documents behind those that are measured; the loss at the end."""
        options = self._options
        if not options.warmup_steps:
            return None
        self._say(f"warm-up: {options.warmup_steps} steps of {options.documents} documents")
        measured = options.draws * options.documents
        steps_per_pass = (len(self._corpus.documents) - measured) // options.documents
        losses = []
        for number in range(options.warmup_steps):
            first = measured + number % steps_per_pass * options.documents
            numbers = range(first, first + options.documents)
            documents = [self._corpus.documents[each] for each in numbers]
            # Every pass has noise of its own.
            noises = draw_form(documents, numbers, FORMS[0], options, number // steps_per_pass)
            losses.append(self._step.run(self.rows(numbers, noises), options.learning_rate).loss)
        loss = float(np.mean(losses[-20:]))
        self._say(f"  loss {losses[0]:.3f} -> {loss:.3f}")
        return loss

    def rows(self, numbers: Sequence[int], noises: Noises) -> list[Row]:
        """The rows that training makes of these documents, without padding."""
        documents = [self._corpus.documents[number] for number in numbers]
        return rows_without_padding(documents, noises, self._options)

    def write_gradient(self, rows: Sequence[Row], out: Tensor) -> None:
        """The whole gradient of the step's loss over these rows, flat, to fp32 [P]."""
        self._step.optimizer.zero_grad()
        self._step.backward(rows)
        shards = local_gradients(self._step.parameters).values()
        torch.cat([shard.reshape(-1) for shard in shards], out=out)
        self._step.optimizer.zero_grad()

    def flops(self, rows: Sequence[Row]) -> int:
        """FLOPs of a step over these rows."""
        works = [RowWork.of(row) for row in rows]
        return step_flops(self._options.arch, works, trimmed=True).total


def check_corpus(options: ViewsOptions, corpus: Corpus) -> None:
    """Refuse bad options and too few documents (ValueError)."""
    options.check()
    needed = options.draws * options.documents
    needed += options.documents if options.warmup_steps else 0
    if len(corpus.documents) < needed:
        raise ValueError(
            f"the input has {len(corpus.documents)} documents, but {options.draws} draws of "
            f"{options.documents} and warm-up need {needed}; give a larger --input, or fewer "
            "--draws or --documents"
        )
