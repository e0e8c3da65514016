"""The figures that the step benchmark finds, and the ratios that have goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_sdar.benchmark.step_forms import EXACT, EXACT_BF16, EXACT_VIEWS, PAPER, PEER
from megatron_sdar.benchmark.step_memory import StepMemory
from megatron_sdar.benchmark.step_parallel import LayoutFigures


@dataclass(frozen=True)
class FormFigures:
    """One form at one row length.

    Attributes:
        length: document tokens of a published row, which has twice as many.
        rows, fill: of the step, and the occupied share of their tokens.
        row_tokens, answer_tokens: of the step: all tokens of its rows; label tokens, once per
            noisy copy.
        seconds, cpu_seconds: of a step, medians; rounds: how many.
        answer_tokens_per_s, row_tokens_per_s: by the clock.
        flops: of the form's own products.
        mfu: them over a step's seconds at the product's rate beside it; median over the steps.
        mfu_of_best: them over the median seconds at the best rate of the run.
        loss: of the first step.
        memory: peak of a step over the first two rows; None for a form that is not measured.
    """

    length: int
    form: str
    rows: int
    fill: float
    row_tokens: int
    answer_tokens: int
    seconds: float
    cpu_seconds: float
    rounds: int
    answer_tokens_per_s: float
    row_tokens_per_s: float
    flops: int
    mfu: float
    mfu_of_best: float
    loss: float
    memory: StepMemory | None


@dataclass(frozen=True)
class StepFigures:
    """What `measure_step` finds.

    Attributes:
        forms: every form at every length.
        layouts: parallel overhead; empty if it is not measured.
        product_gflops: best rate of the matrix product by dtype.
        ratios: the figures with goals, see `find_ratios`; then each layout's. None: not measured.
        cpu_speedups: answer tokens per CPU second of exact over those of the peer, by length.
            Far from the speedup by the clock: other programs took cores from one of the two.
        notes: what the figures are divided by, and other things a reader must know.
    """

    forms: tuple[FormFigures, ...]
    layouts: tuple[LayoutFigures, ...]
    product_gflops: dict[str, float]
    ratios: dict[str, float | None]
    cpu_speedups: dict[int, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The ratios first, on top level."""
        details = asdict(self)
        return {**details.pop("ratios"), **details}

    def form(self, length: int, name: str) -> FormFigures:
        return next(each for each in self.forms if (each.length, each.form) == (length, name))


def find_ratios(forms: Sequence[FormFigures]) -> dict[str, float | None]:
    """The figures that have goals. Of one row length where none is named: the first."""
    by_name = {(each.length, each.form): each for each in forms}
    lengths = list(dict.fromkeys(each.length for each in forms))
    speedups: dict[str, float | None] = {}
    two_views: dict[str, float | None] = {}
    memory: dict[str, float | None] = {}
    for length in lengths:
        peer, exact = by_name[length, PEER], by_name[length, EXACT]
        speedups[f"speedup_vs_peer_{length}"] = exact.answer_tokens_per_s / peer.answer_tokens_per_s
        views = by_name[length, EXACT_VIEWS].answer_tokens_per_s / peer.answer_tokens_per_s
        two_views[f"speedup_vs_peer_{length}_two_views"] = views
        if peer.memory is not None and exact.memory is not None:
            ratio = exact.memory.total_mb / peer.memory.total_mb
            memory[f"memory_vs_peer_{length}"] = ratio
    paper, exact = by_name[lengths[0], PAPER], by_name[lengths[0], EXACT]
    bf16 = by_name.get((lengths[0], EXACT_BF16))
    return {
        **speedups,
        "speedup_vs_paper_semantics": exact.answer_tokens_per_s / paper.answer_tokens_per_s,
        "floor_share_fp32": exact.mfu,
        "floor_share_bf16": None if bf16 is None else bf16.mfu,
        **memory,
        **two_views,
        "floor_share_fp32_of_best": exact.mfu_of_best,
        "floor_share_bf16_of_best": None if bf16 is None else bf16.mfu_of_best,
    }


def find_cpu_speedups(forms: Sequence[FormFigures]) -> dict[int, float]:
    cpu = {(each.length, each.form): each.cpu_seconds for each in forms}
    lengths = dict.fromkeys(each.length for each in forms)
    return {length: cpu[length, PEER] / cpu[length, EXACT] for length in lengths}
