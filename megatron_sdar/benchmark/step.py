"""One optimizer step measured: published code, ours without and with savings, and the floor.

All forms train on the same documents, from the same weights, with the same noise, and take their
steps in turn in one process; their losses are compared before anything is timed. The floor is the
time that the products of our step would take at the rate of a large matrix product.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch
from sdar_kernels.bf16_products import bf16_slowdown

from megatron_sdar.benchmark.step_clock import ProductRate, StepTime, time_step
from megatron_sdar.benchmark.step_data import Corpus, Document
from megatron_sdar.benchmark.step_figures import (
    FormFigures,
    StepFigures,
    find_cpu_speedups,
    find_ratios,
)
from megatron_sdar.benchmark.step_forms import (
    EXACT,
    EXACT_BF16,
    EXACT_VIEWS,
    NUM_VIEWS,
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
from megatron_sdar.benchmark.step_parallel import measure_layouts
from megatron_sdar.benchmark.step_rows import Measure, Packing, RowShape, choose_documents
from megatron_sdar.parallel.host_memory import keep_freed_memory, return_freed_memory
from megatron_sdar.parallel.mesh import LaunchInfo, start_process_group, stop_process_group

_LOSS_TOLERANCE = {PAPER: 1e-4, EXACT: 1e-4, EXACT_VIEWS: 1e-4, EXACT_BF16: 2e-2}
_TIMEOUT_SECONDS = 3600

Say = Callable[[str], None]


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
        # Ten processes come to life, and this one kept what the peer's longest rows took: 10 GB.
        gc.collect()
        return_freed_memory()
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
                tuple(known), (), gflops, find_ratios(known), find_cpu_speedups(known), tuple(notes)
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
    measures: list[Measure] = [
        shape.whole_sizes,
        shape.kept_sizes,
        partial(shape.kept_sizes, num_views=2),
    ]
    documents = choose_documents(corpus, measures, options.rows, shape.longest(2))
    say(f"rows of 2 x {length} tokens, {len(documents)} documents: first steps, losses")
    expected = _peer_losses(forms[PEER], documents, shape)
    timed = []
    for name, form in forms.items():
        form.bind(documents, shape)
        packing = form.packing(documents, shape)
        whole = name in (PEER, PAPER)
        row_tokens = (2 * length if whole else shape.kept_row_length) * len(packing.rows)
        answers = NUM_VIEWS[name] * sum(document.num_labels for document in documents)
        loss = expected[1] if name == PEER else time_step(form.step).loss
        timed.append(
            _Timed(length, name, packing, row_tokens, answers, form.flops().total, loss, [])
        )
        _check_loss(name, loss, expected[NUM_VIEWS[name]])
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


def _peer_losses(peer: Form, documents: Sequence[Document], shape: RowShape) -> dict[int, float]:
    """The loss that one and two views of the documents have; a view's rows are a step each."""
    assert isinstance(peer, PeerForm)
    losses = []
    for view in (1, 0):
        peer.bind(documents, shape, view)
        losses.append(time_step(peer.step).loss)
    return {1: losses[-1], 2: sum(losses) / 2}


def _check_loss(name: str, loss: float, expected: float) -> None:
    if name != PEER and abs(loss - expected) > _LOSS_TOLERANCE[name] * abs(expected):
        raise ValueError(
            f"{name} has loss {loss}, the peer {expected}: they do not compute the same, so "
            "nothing was timed; this is a defect: please report it"
        )
