"""The forms of noisy views that are compared, and the rows that training makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_sdar.architecture import Architecture
from megatron_sdar.benchmark.step_data import NOISE_EPS, Document
from megatron_sdar.benchmark.step_options import benchmark_model
from megatron_sdar.diffusion.noise import NoiseDraw, NoiseKey
from megatron_sdar.diffusion.noise_schedule import NoiseSchedule, NoisyDocuments, draw_views
from megatron_sdar.diffusion.rows import IGNORED_LABEL, Row, build_row
from megatron_sdar.diffusion.savings import kept_copies, num_row_blocks

_PAD_ID = 0
_ROW_DOCUMENTS = 8
_LEAST_DRAWS = 3

Noises = Sequence[tuple[NoiseDraw, ...]]


def _small_model() -> Architecture:
    """11 million parameters, so that some hundred gradients take minutes on a CPU."""
    return replace(
        benchmark_model(),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


@dataclass(frozen=True)
class ViewsOptions:
    """Attributes:
    arch: the model; its last token id is the mask token.
    documents: D, of a step.
    draws: R, steps whose gradients are measured, each on documents of its own.
    warmup_steps: of AdamW at learning_rate before, on other documents.
    noise_eps, block_length, seed: as in training.
    max_documents: of the input that are read.
    """

    arch: Architecture = field(default_factory=_small_model)
    documents: int = 8
    draws: int = 96
    warmup_steps: int = 200
    learning_rate: float = 1e-3
    noise_eps: float = NOISE_EPS
    block_length: int = 4
    seed: int = 0
    max_documents: int = 8000

    @property
    def mask_token_id(self) -> int:
        return self.arch.vocab_size - 1

    def check(self) -> None:
        """Raises ValueError for a value that nothing can be measured with."""
        if self.documents < 1:
            raise ValueError(f"--documents {self.documents}: a step needs at least 1")
        if self.draws < _LEAST_DRAWS:
            raise ValueError(
                f"--draws {self.draws}: a variance and its error need at least {_LEAST_DRAWS}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"--warmup-steps {self.warmup_steps}: must be at least 0")
        if self.block_length < 1:
            raise ValueError(f"--block-length {self.block_length}: must be at least 1")
        if not 0 < self.noise_eps < 0.5:
            raise ValueError(f"--noise-eps {self.noise_eps}: must be between 0 and 0.5")

    def quick(self) -> ViewsOptions:
        """The same at toy size: everything runs, no figure means anything."""
        arch = replace(
            self.arch,
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            head_dim=16,
        )
        return replace(self, arch=arch, documents=2, draws=6, warmup_steps=4, max_documents=40)


@dataclass(frozen=True)
class ViewForm:
    """How many noisy copies share a clean one, and whether every second is a complement."""

    name: str
    num_views: int
    complementary: bool

    def noise_variance(self, noise: float, mates: float) -> float:
        """Of this form's gradient, from `DrawMoments`: views are independent but for mates."""
        return (noise + mates * self.complementary) / self.num_views


FORMS = (
    ViewForm("one view", 1, False),
    ViewForm("2 independent", 2, False),
    ViewForm("2 complementary", 2, True),
    ViewForm("4 independent", 4, False),
    ViewForm("4 = two complementary pairs", 4, True),
)
# What is drawn to measure all of them.
DRAWN = FORMS[-1]


def draw_form(
    documents: Sequence[Document],
    numbers: Sequence[int],
    form: ViewForm,
    options: ViewsOptions,
    epoch: int = 0,
) -> Noises:
    """Per document its views, as training draws them; numbers are the documents' ids."""
    schedule = NoiseSchedule(
        low=options.noise_eps, num_views=form.num_views, complementary=form.complementary
    )
    return draw_schedule(documents, numbers, schedule, options, epoch)


def draw_schedule(
    documents: Sequence[Document],
    numbers: Sequence[int],
    schedule: NoiseSchedule,
    options: ViewsOptions,
    epoch: int = 0,
) -> Noises:
    """The same for any schedule; the documents follow each other in the order of their epoch."""
    nothing = [0] * len(numbers)
    noisy = NoisyDocuments(
        numbers,
        nothing,
        nothing,
        range(len(numbers)),
        [document.ids.size for document in documents],
        np.concatenate([document.labels for document in documents]) != IGNORED_LABEL,
    )
    return draw_views(schedule, NoiseKey(options.seed, epoch), noisy, options.block_length)


def rows_without_padding(
    documents: Sequence[Document], noises: Noises, options: ViewsOptions
) -> list[Row]:
    """Exact rows of a few documents each: in a long run next to nothing of a row is padding."""
    copies = [
        kept_copies(document.ids, document.labels, options.block_length, views)
        for document, views in zip(documents, noises, strict=True)
    ]
    rows = []
    for start in range(0, len(copies), _ROW_DOCUMENTS):
        chosen = copies[start : start + _ROW_DOCUMENTS]
        # Documents without a masked token take no room, but a row has at least one block.
        num_blocks = max(1, sum(map(num_row_blocks, chosen)))
        rows.append(
            build_row(
                chosen,
                num_blocks * options.block_length,
                options.block_length,
                options.mask_token_id,
                _PAD_ID,
            )
        )
    return rows
