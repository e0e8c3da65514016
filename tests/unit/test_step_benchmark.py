"""The step benchmark at toy size: what it reports, and that all forms do the same work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from distributed.command import run_python
from sdar_kernels.reference import dense_mask

from megatron_sdar.benchmark import step, step_parallel
from megatron_sdar.benchmark.step_clock import ProductRate, StepTime
from megatron_sdar.benchmark.step_data import Corpus, Document, load_documents, save_documents
from megatron_sdar.benchmark.step_forms import (
    EXACT,
    EXACT_BF16,
    EXACT_VIEWS,
    PAPER,
    PEER,
    measured_forms,
)
from megatron_sdar.benchmark.step_memory import smallest_rows
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.step_own import ONE_PROCESS, Layout
from megatron_sdar.benchmark.step_peer import dense_row_mask, peer_rows
from megatron_sdar.benchmark.step_rows import RowShape, choose_documents
from megatron_sdar.diffusion.noise import NoiseDraw

ROOT = Path(__file__).resolve().parents[2]
SHAPE = RowShape(length=32, block_length=4, mask_token_id=99, kept_row_length=64)
RATIOS = (
    "speedup_vs_peer_256", "speedup_vs_paper_semantics", "floor_share_fp32", "floor_share_bf16",
    "memory_vs_peer_256", "speedup_vs_peer_256_two_views", "floor_share_fp32_of_best",
    "floor_share_bf16_of_best",
)  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Figures, what was printed, and the plot of `tools/benchmark.py step --quick`.

    Without layouts, whose processes would take as long again: the README's command has them.
    """
    folder = tmp_path_factory.mktemp("step")
    command = [
        sys.executable, "tools/benchmark.py", "step", "--quick", "--peer-rounds", "1",
        "--parallel-rounds", "0",
        "--json", str(folder / "step.json"), "--plot", str(folder / "step.png"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    return figures, done.stdout, folder / "step.png"


def test_every_figure_is_there_and_positive(quick: tuple[dict[str, Any], str, Path]) -> None:
    figures, _, plot = quick
    assert tuple(figures)[: len(RATIOS)] == RATIOS
    assert all(figures[name] > 0 for name in RATIOS)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_all_forms_trained_on_the_same_loss(quick: tuple[dict[str, Any], str, Path]) -> None:
    forms = {form["form"]: form for form in quick[0]["forms"]}
    assert list(forms) == [PEER, PAPER, EXACT, EXACT_VIEWS, EXACT_BF16]
    loss, two_views = forms[PEER]["loss"], forms[EXACT_VIEWS]["loss"]
    assert loss > 1
    assert two_views > 1
    assert two_views != pytest.approx(loss, rel=1e-3)
    for name, form in forms.items():
        if name != EXACT_VIEWS:
            assert form["loss"] == pytest.approx(loss, rel=2e-2 if name == EXACT_BF16 else 1e-4)
        answers = (2 if name == EXACT_VIEWS else 1) * forms[PEER]["answer_tokens"]
        assert form["answer_tokens"] == answers
        assert form["row_tokens"] == form["rows"] * 512
        assert form["rounds"] == 1
    assert forms[EXACT]["flops"] < forms[PAPER]["flops"] < forms[PEER]["flops"]
    assert forms[EXACT]["flops"] < forms[EXACT_VIEWS]["flops"] < 2 * forms[PAPER]["flops"]


def test_the_denominators_are_printed(quick: tuple[dict[str, Any], str, Path]) -> None:
    _, printed, _ = quick
    for words in (*RATIOS, "answer tokens/s:", "floor:", "memory:", "M parameters"):
        assert words in printed


def test_bf16_is_measured_where_a_cpu_has_units_or_if_asked() -> None:
    everything = [PEER, PAPER, EXACT, EXACT_VIEWS, EXACT_BF16]
    assert measured_forms(0.6, slow_bf16=False) == everything
    assert measured_forms(60.0, slow_bf16=True) == everything
    assert measured_forms(60.0, slow_bf16=False) == everything[:-1]


_WITHOUT_UNITS = """
import sys
sys.path[:0] = [".", "kernels"]
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock
from rich.console import Console
from megatron_sdar.benchmark import step
from megatron_sdar.benchmark.step_data import Corpus, load_documents
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.step_report import show_step

options = replace(StepOptions().quick(), peer_rounds=1, parallel_rounds=0, slow_bf16=False)
figures = []
with (
    mock.patch.object(step, "bf16_slowdown", return_value=60.0),
    mock.patch.object(step, "measure_memory", return_value=None),
):
    corpus = Corpus(tuple(load_documents(Path(sys.argv[1]))), 0)
    step.measure_step(options, corpus, lambda text: None, figures.append)
assert figures[-1].to_json()["floor_share_bf16"] is None
show_step(figures[-1], Console(width=200))
"""


def test_a_form_that_was_left_out_is_named(tmp_path: Path) -> None:
    """In a process of its own: it takes threads, which no fork of this one could."""
    save_documents(_documents(200), tmp_path / "documents.npz")
    command = [sys.executable, "-c", _WITHOUT_UNITS, str(tmp_path / "documents.npz")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exact bf16 is left out: this CPU has no bf16 units" in done.stdout
    assert "takes 60 times as long" in done.stdout
    assert re.search(r"floor_share_bf16 +. not measured", done.stdout)


def test_input_without_a_tokenizer_is_refused() -> None:
    done = run_python(["tools/benchmark.py", "step", "--input", "some.jsonl"])
    assert done.returncode == 1
    assert done.stderr == "error: --input needs --tokenizer: a model directory\n"


def _documents(count: int, *, silent: bool = False) -> list[Document]:
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(count):
        ids = rng.integers(1, 90, size=4 * int(rng.integers(2, 5))).astype(np.int32)
        labels = ids.copy()
        labels[:3] = -100
        prob = float(rng.uniform(0.2, 0.9))
        masked = (labels != -100) & (rng.random(ids.size) < prob) & (not silent)
        documents.append(Document(ids, labels, NoiseDraw(prob, masked)))
    return documents


@pytest.mark.parametrize("view", [0, 1])
def test_the_peer_has_the_mask_and_tokens_of_our_rows(view: int) -> None:
    documents = _documents(5)
    theirs = peer_rows(documents, SHAPE, view)
    ours = SHAPE.whole_rows([replace(each, noise=each.views(2)[view]) for each in documents])
    assert len(theirs) == len(ours) > 1
    for peer, row in zip(theirs, ours, strict=True):
        documents_end = row.num_tokens - row.num_padding
        half = documents_end // 2
        # Ours has the clean copy first, and all padding at the end.
        noisy, clean = np.arange(half), SHAPE.length + np.arange(half)
        order = np.concatenate((clean, noisy))
        mask = dense_mask(torch.from_numpy(row.key_intervals))
        assert torch.equal(
            dense_row_mask(peer)[np.ix_(order, order)], mask[:documents_end, :documents_end]
        )
        assert np.array_equal(peer.input_ids[order], row.input_ids[:documents_end])
        assert np.array_equal(peer.position_ids[order], row.position_ids[:documents_end])
        assert np.array_equal(peer.targets, row.target_ids)
        assert np.allclose(peer.weights, row.loss_weights)
        assert peer.num_labels == row.num_label_tokens


def test_all_packings_hold_every_document_once() -> None:
    documents = [*_documents(6), *_documents(1, silent=True)]
    labels = sum(document.num_labels for document in documents)
    for packing in (
        SHAPE.pack_whole(documents), SHAPE.pack_kept(documents), SHAPE.pack_kept(documents, 2),
    ):  # fmt: skip
        assert sorted(number for row in packing.rows for number in row) == list(range(7))
        assert 0 < packing.fill <= 1
    for rows in (SHAPE.whole_rows(documents), SHAPE.kept_rows(documents)):
        assert sum(row.num_label_tokens for row in rows) == labels
    both = SHAPE.kept_rows(documents, 2)
    assert sum(row.num_label_tokens for row in both) == 2 * labels
    # A complementary pair masks every label token once.
    assert sum(row.loss_positions.size for row in both) == labels
    assert [SHAPE.longest(views) for views in (1, 2)] == [32, 21]


def test_chosen_documents_fill_their_rows() -> None:
    corpus = _documents(60)
    chosen = choose_documents(corpus, [SHAPE.whole_sizes, SHAPE.kept_sizes], 3, 32)
    assert len(SHAPE.pack_whole(chosen).rows) == 3
    assert _least_fill(chosen) > 0.9
    runs = [corpus[start:end] for start in range(60) for end in range(start + 1, 61)]
    packed = [_least_fill(run) for run in runs if len(SHAPE.pack_whole(run).rows) == 3]
    assert _least_fill(chosen) == max(packed)


def _least_fill(documents: Sequence[Document]) -> float:
    return min(SHAPE.pack_whole(documents).fill, SHAPE.pack_kept(documents).fill)


def test_documents_are_found_where_the_fullest_runs_need_another_row() -> None:
    # Four documents of five blocks would fill 20 of 24, but no row of 8 takes two of them.
    ids = np.arange(1, 21, dtype=np.int32)
    document = Document(ids, ids, NoiseDraw(1.0, np.ones(20, dtype=bool)))
    chosen = choose_documents([document] * 8, [SHAPE.whole_sizes], 3, 32)
    assert len(chosen) == len(SHAPE.pack_whole(chosen).rows) == 3


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="too few documents of at most 32 tokens to fill 3 rows"):
        choose_documents(_documents(2), [SHAPE.whole_sizes], 3, 32)


@pytest.mark.parametrize("block_length", [1, 4, 16])
def test_the_smallest_rows_hold_every_form(block_length: int) -> None:
    documents, shape = smallest_rows(StepOptions(block_length=block_length))
    rows = shape.whole_rows(documents), shape.kept_rows(documents), shape.kept_rows(documents, 2)
    assert [len(each) for each in rows] == [1, 1, 1]
    assert all(row.loss_positions.size for each in rows for row in each)


def test_documents_survive_a_file(tmp_path: Path) -> None:
    documents = _documents(3)
    save_documents(documents, tmp_path / "documents.npz")
    for before, after in zip(documents, load_documents(tmp_path / "documents.npz"), strict=True):
        assert np.array_equal(before.ids, after.ids)
        assert np.array_equal(before.labels, after.labels)
        assert np.array_equal(before.noise.masked, after.noise.masked)
        assert before.noise.mask_prob == after.noise.mask_prob


def test_options_survive_json() -> None:
    options = StepOptions(rows=7).quick()
    assert StepOptions.from_json(json.loads(json.dumps(options.to_json()))) == options


def test_forms_that_disagree_stop_the_run() -> None:
    step._check_loss(EXACT, 2.0001, 2.0)
    with pytest.raises(ValueError, match=r"exact has loss 2\.1, the peer 2\.0"):
        step._check_loss(EXACT, 2.1, 2.0)
    with (
        mock.patch.dict(step._LOSS_TOLERANCE, {EXACT: 1e-9}),
        pytest.raises(ValueError, match="nothing was timed"),
    ):
        step._check_loss(EXACT, 2.0001, 2.0)


def test_what_is_known_is_kept_when_a_later_part_fails() -> None:
    first, second = (step.StepFigures((), (), {}, {"speedup": x}, {}, ()) for x in (1.0, 2.0))
    kept: list[step.StepFigures] = []
    calls: list[str] = []

    def fail(*arguments: object) -> None:
        calls.append("layouts")
        raise ValueError("a rank ended")

    options = StepOptions(
        threads=torch.get_num_threads(), fused_kernels="torch", attention_backend="tiled"
    )
    corpus = Corpus((), 0)
    with (
        mock.patch.object(step, "start_process_group"),
        mock.patch.object(step, "stop_process_group"),
        mock.patch.object(step, "_measure_forms", return_value=iter((first, second))),
        mock.patch.object(step, "measure_layouts", fail),
        mock.patch.object(step, "return_freed_memory", partial(calls.append, "memory")),
        pytest.raises(ValueError, match="a rank ended"),
    ):
        step.measure_step(options, corpus, print, kept.append)
    assert [each.ratios for each in kept] == [first.ratios, second.ratios]
    assert calls == ["memory", "layouts"], "the ranks need what the forms had"


@pytest.mark.parametrize(
    ("losses", "apart", "sound"),
    [
        ([2.0, 2.0], 1, True),
        ([2.0, 2.1], 1, False),
        ([2.1, 2.1], 1, False),
        ([1.9, 2.2], 2, True),
        ([2.1, 2.1], 2, False),  # both took the same half
        ([2.1, 2.2], 2, False),
        ([1.8, 1.9], 2, False),
    ],
)
def test_layouts_of_another_loss_are_not_measured(
    losses: list[float], apart: int, sound: bool
) -> None:
    known: dict[str, float] = {}
    step_parallel._check_loss([StepTime(1.0, 1.0, 2.0)], known, ONE_PROCESS)
    ranks = [StepTime(1.0, 1.0, loss) for loss in losses]
    refused = pytest.raises(ValueError, match=r"dp2 has loss \[.*one process 2\.0: not the same")
    with nullcontext() if sound else refused:
        step_parallel._check_loss(ranks, known, Layout("dp2", apart=apart))


def test_layouts_take_turns_in_another_order_each_round() -> None:
    order: list[int] = []

    def step_of(place: int, ranks: int) -> list[StepTime]:
        order.append(place)
        # What a step takes doubles with each: only the order tells.
        return [StepTime(1.0, 2.0 ** len(order), 0.0)] * ranks

    steps = [partial(step_of, place, ranks) for place, ranks in enumerate((1, 1, 2))]
    rounds = [step_parallel._round(steps, first) for first in range(3)]
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    figures = step_parallel._figures(Layout("tp2", tp=2), rounds, 2)
    # 2 * 2**3 over 2**1, 2 * 2**5 over 2**6, 2 * 2**7 over 2**8.
    assert figures.cpu_ratio == 1.0
    assert figures.over_apart == 2 * 2**3 / 2**2


@pytest.mark.parametrize(("seconds", "products"), [(0.01, 15), (0.25, 8), (10.0, 5)])
def test_a_products_rate_is_that_of_about_two_seconds(seconds: float, products: int) -> None:
    rate = ProductRate(8, torch.float32)
    # One clock before each product and one after it.
    with mock.patch("time.perf_counter", side_effect=np.arange(100) * seconds) as clock:
        assert rate.measure() == pytest.approx(2 * 8**3 / seconds)
    assert clock.call_count == 2 * products


def test_layouts_can_be_left_out() -> None:
    known = step.StepFigures((), (), {}, {"speedup": 1.0}, {}, ())
    with (
        mock.patch.object(step, "start_process_group"),
        mock.patch.object(step, "stop_process_group"),
        mock.patch.object(step, "_measure_forms", return_value=iter((known,))),
        mock.patch.object(step, "measure_layouts", side_effect=AssertionError),
    ):
        options = StepOptions(
            threads=torch.get_num_threads(),
            fused_kernels="torch",
            attention_backend="tiled",
            parallel_rounds=0,
        )
        figures = step.measure_step(options, Corpus((), 0), print, lambda _: None)
    assert figures.ratios == known.ratios
    assert figures.notes == (
        "Kernels of our forms: attention tiled (as configured; its self-check passed); elementwise "
        "torch (as configured).",
    )


def test_a_model_of_42_million_parameters() -> None:
    arch = StepOptions().arch
    projections = arch.hidden_size * arch.head_dim * 2 * (8 + 4)
    layer = projections + 3 * arch.hidden_size * arch.intermediate_size
    vocabulary = 2 * arch.vocab_size * arch.hidden_size
    assert 41.9e6 < 8 * layer + vocabulary < 42.0e6


def test_rows_of_exact_grow_with_the_published_ones() -> None:
    options = StepOptions()
    lengths = [options.shape(length).kept_row_length for length in options.lengths]
    assert lengths == [1536, 2728]
    assert StepOptions(block_length=3).shape(2000).kept_row_length == 1500
    assert StepOptions().shape(256).longest(2) == 256
    assert StepOptions(row_length=64).shape(2048).kept_row_length == 64
