"""One optimizer step measured: published code, ours without and with savings, and the floor.

All forms train on the same documents, from the same weights, with the same noise, and take their
steps in turn in one process; their losses are compared before anything is timed. The floor is the
time that the products of our step would take at the rate of a large matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from sdar_kernels.bf16_products import bf16_slowdown

from megatron_sdar.benchmark.step_clock import ProductRate, StepTime, time_step
from megatron_sdar.benchmark.step_data import Corpus, Document
from megatron_sdar.benchmark.step_forms import (
    EXACT,
    EXACT_BF16,
    PAPER,
    PEER,
    Form,
    OwnForm,
    PeerForm,
    make_form,
    measured_forms,
)
from megatron_sdar.benchmark.step_kernels import with_kernels
from megatron_sdar.benchmark.step_memory import StepMemory, measure_memory
from megatron_sdar.benchmark.step_notes import step_notes
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.step_own import plain_weights
from megatron_sdar.benchmark.step_parallel import LayoutFigures, measure_layouts
from megatron_sdar.benchmark.step_rows import Packing, choose_documents
from megatron_sdar.parallel.host_memory import keep_freed_memory
from megatron_sdar.parallel.mesh import LaunchInfo, start_process_group, stop_process_group

_LOSS_TOLERANCE = {PAPER: 1e-4, EXACT: 1e-4, EXACT_BF16: 2e-2}
_TIMEOUT_SECONDS = 3600

Say = Callable[[str], None]


@dataclass(frozen=True)
class FormFigures:
    """One form at one row length.

    Attributes:
        length: document tokens of a published row, which has twice as many.
        rows, fill: of the step, and the occupied share of their tokens.
        row_tokens, answer_tokens: of the step: all tokens of its rows; label tokens.
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
        ratios: the figures with goals, see `_ratios`; then each layout's. None: not measured.
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


Keep = Callable[[StepFigures], None]


def measure_step(options: StepOptions, corpus: Corpus, say: Say, keep: Keep) -> StepFigures:
    """Measure everything.

    Args:
        options: what is measured.
        corpus: documents to choose from.
        say: called with what is being measured.
        keep: called with all that is known whenever more is known: a run takes long.

    Raises:
        ValueError: too few documents, or forms whose losses differ.
    """
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    start_process_group(LaunchInfo(0, 0, 1), "cpu", "gloo", _TIMEOUT_SECONDS)
    try:
        options, kernels = with_kernels(options)
        say(kernels)
        for known in _measure_forms(options, corpus, say):
            figures = replace(known, notes=(*known.notes, kernels))
            keep(figures)
    finally:
        stop_process_group()
        torch.set_num_threads(threads)
    if options.parallel_rounds:
        layouts = tuple(measure_layouts(options, corpus.documents, say))
        ratios = {f"{each.layout}_cpu_ratio": each.cpu_ratio for each in layouts}
        figures = replace(figures, layouts=layouts, ratios={**figures.ratios, **ratios})
        keep(figures)
    return figures


def _measure_forms(options: StepOptions, corpus: Corpus, say: Say) -> Iterator[StepFigures]:
    """What is known of the forms, again and again; layouts are not measured here.

    The options name the kernels that are used.
    """
    say("building the models")
    slowdown = bf16_slowdown()
    names = measured_forms(slowdown, slow_bf16=options.slow_bf16)
    own = {name: make_form(name, options, None) for name in names if name != PEER}
    first = own[PAPER]
    assert isinstance(first, OwnForm)
    peer = make_form(PEER, options, plain_weights(first.training))
    assert isinstance(peer, PeerForm)
    forms: dict[str, Form] = {PEER: peer, **own}
    products = {"float32": ProductRate(options.gemm_size, torch.float32)}
    notes = step_notes(options, corpus, peer.num_parameters)
    if EXACT_BF16 in names:
        products["bfloat16"] = ProductRate(options.gemm_size, torch.bfloat16)
    else:
        notes.append(
            f"exact bf16 is left out: this CPU has no bf16 units, a product in bf16 takes "
            f"{slowdown:.0f} times as long as one in fp32."
        )
    done: list[_Timed] = []
    for length in options.lengths:
        for timed in _time_length(options, corpus.documents, length, forms, products, say):
            rates = {name: product.best for name, product in products.items()}
            known = [each.figures(rates) for each in [*done, *timed]]
            gflops = {name: rate / 1e9 for name, rate in rates.items()}
            yield StepFigures(
                tuple(known), (), gflops, _ratios(known), _cpu_speedups(known), tuple(notes)
            )
        done += timed


@dataclass
class _Timed:
    """What is known of one form at one length before the rates are."""

    length: int
    form: str
    packing: Packing
    row_tokens: int
    answer_tokens: int
    flops: int
    loss: float
    times: list[StepTime]
    rates: list[float] = field(default_factory=list)
    memory: StepMemory | None = None

    def figures(self, rates: Mapping[str, float]) -> FormFigures:
        seconds = median(each.seconds for each in self.times)
        return FormFigures(
            length=self.length,
            form=self.form,
            rows=len(self.packing.rows),
            fill=self.packing.fill,
            row_tokens=self.row_tokens,
            answer_tokens=self.answer_tokens,
            seconds=seconds,
            cpu_seconds=median(each.cpu_seconds for each in self.times),
            rounds=len(self.times),
            answer_tokens_per_s=self.answer_tokens / seconds,
            row_tokens_per_s=self.row_tokens / seconds,
            flops=self.flops,
            mfu=median(
                self.flops / taken.seconds / rate
                for taken, rate in zip(self.times, self.rates, strict=True)
            ),
            mfu_of_best=self.flops / seconds / rates[_product(self.form)],
            loss=self.loss,
            memory=self.memory,
        )


def _product(form: str) -> str:
    """The dtype whose product sets a form's limit."""
    return "bfloat16" if form == EXACT_BF16 else "float32"


def _time_length(
    options: StepOptions,
    corpus: Sequence[Document],
    length: int,
    forms: Mapping[str, Form],
    products: Mapping[str, ProductRate],
    say: Say,
) -> Iterator[list[_Timed]]:
    """All forms in turn on one set of documents; the first steps are for the losses only.

    Yields the forms when they have been timed, and again with the memory of all of them.
    """
    shape = options.shape(length)
    longest = min(length, shape.kept_row_length // 2)
    documents = choose_documents(corpus, [shape.pack_whole, shape.pack_kept], options.rows, longest)
    say(f"rows of 2 x {length} tokens, {len(documents)} documents: first steps, losses")
    timed = []
    for name, form in forms.items():
        form.bind(documents, shape)
        packing = form.packing(documents, shape)
        kept = name in (EXACT, EXACT_BF16)
        row_tokens = (shape.kept_row_length if kept else 2 * length) * len(packing.rows)
        answers = sum(document.num_labels for document in documents)
        loss = time_step(form.step).loss
        timed.append(
            _Timed(length, name, packing, row_tokens, answers, form.flops().total, loss, [])
        )
        _check_loss(name, loss, timed[0].loss)
        say(f"  {name}: loss {loss:.6f}")
    for number in range(max(options.rounds, options.peer_rounds)):
        say(f"  round {number + 1}")
        for each in timed:
            if number < (options.peer_rounds if each.form == PEER else options.rounds):
                step = partial(time_step, forms[each.form].step)
                taken, rate = products[_product(each.form)].around(step)
                each.times.append(taken)
                each.rates.append(rate)
    yield timed
    for each in timed:
        if each.form != EXACT_BF16:
            say(f"  memory of {each.form}")
            each.memory = measure_memory(each.form, options, length, documents)
    yield timed


def _check_loss(name: str, loss: float, expected: float) -> None:
    if name != PEER and abs(loss - expected) > _LOSS_TOLERANCE[name] * abs(expected):
        raise ValueError(
            f"{name} has loss {loss}, the peer {expected}: they do not compute the same, so "
            "nothing was timed; this is a defect: please report it"
        )


def _ratios(forms: Sequence[FormFigures]) -> dict[str, float | None]:
    """The figures that have goals. Of one row length where none is named: the first."""
    by_name = {(each.length, each.form): each for each in forms}
    lengths = list(dict.fromkeys(each.length for each in forms))
    speedups: dict[str, float | None] = {}
    memory: dict[str, float | None] = {}
    for length in lengths:
        peer, exact = by_name[length, PEER], by_name[length, EXACT]
        speedups[f"speedup_vs_peer_{length}"] = exact.answer_tokens_per_s / peer.answer_tokens_per_s
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
        "floor_share_fp32_of_best": exact.mfu_of_best,
        "floor_share_bf16_of_best": None if bf16 is None else bf16.mfu_of_best,
    }


def _cpu_speedups(forms: Sequence[FormFigures]) -> dict[int, float]:
    cpu = {(each.length, each.form): each.cpu_seconds for each in forms}
    lengths = dict.fromkeys(each.length for each in forms)
    return {length: cpu[length, PEER] / cpu[length, EXACT] for length in lengths}
