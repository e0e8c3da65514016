"""The views benchmark: its estimator against plain sums, its rows, and a run at toy size."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from distributed.command import run_python

from megatron_sdar.benchmark import view_forms, view_moments
from megatron_sdar.benchmark import views as views_module
from megatron_sdar.benchmark.step_data import Corpus, Document
from megatron_sdar.benchmark.view_forms import (
    FORMS,
    ViewsOptions,
    draw_form,
    rows_without_padding,
)
from megatron_sdar.benchmark.view_moments import PairMoments, with_errors
from megatron_sdar.benchmark.views import measure_views
from megatron_sdar.diffusion.noise import NoiseDraw

ROOT = Path(__file__).resolve().parents[2]
TOY = ViewsOptions().quick()
COMPLEMENTARY = [form for form in FORMS if form.complementary]


def _documents(count: int) -> list[Document]:
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(count):
        ids = rng.integers(1, 90, size=4 * int(rng.integers(2, 9))).astype(np.int32)
        labels = np.where(np.arange(ids.size) < 3, np.int32(-100), ids)
        documents.append(Document(ids, labels, NoiseDraw(1.0, labels != -100)))
    return documents


# The estimator.


def test_moments_equal_plain_sums() -> None:
    gradients = np.random.default_rng(0).normal(1.0, 1.0, size=(5, 4, 23)).astype(np.float32)
    moments = PairMoments(23)
    with mock.patch.object(view_moments, "_CHUNK", 7):
        for draw in gradients:
            moments.add(torch.from_numpy(draw))
    exact = gradients.astype(np.float64)
    for (noise, mates, _), draw in zip(moments.table(), exact, strict=True):
        strangers = np.mean([draw[i] @ draw[j] for i in (0, 1) for j in (2, 3)])
        assert noise == pytest.approx(np.mean([each @ each for each in draw]) - strangers)
        assert mates == pytest.approx((draw[0] @ draw[1] + draw[2] @ draw[3]) / 2 - strangers)
    means = exact.mean(axis=1)
    variance = means.var(axis=0, ddof=1).sum()
    assert np.isnan(moments.table()[0, 2])
    assert np.nanmean(moments.table()[:, 2]) == pytest.approx(variance)
    assert moments.mean_squared() == pytest.approx((means.mean(axis=0) ** 2).sum() - variance / 5)
    apart = (exact[:, 0] - exact[:, 1] + exact[:, 2] - exact[:, 3]) / 2
    error = np.sqrt(apart.var(axis=0, ddof=1).sum() / 5)
    assert moments.mean_difference() == pytest.approx(np.linalg.norm(apart.mean(axis=0)) / error)


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_known_variances_are_found(bias: float) -> None:
    """Gradients made of a mean, a part per draw, and noise that mates share with a minus sign."""
    rng = np.random.default_rng(1)
    size, draws = 6, 2000
    mean, signs = np.full(size, 3.0), np.array([1.0, -1.0])
    moments = PairMoments(size)
    for _ in range(draws):
        common = rng.normal(0, 2.0, size=size)
        pairs = [
            mean
            + common
            + signs[:, None] * rng.normal(0, 1.0, size=size)
            + rng.normal(0, 1.5, size=(2, size))
            for _ in range(2)
        ]
        gradients = np.concatenate(pairs)
        gradients[1::2] += bias
        moments.add(torch.from_numpy(gradients.astype(np.float32)))
    values, errors = with_errors(moments.table(), lambda means: means)
    # The bias of complements looks like less likeness of mates than of strangers.
    noise, mates = size * (1.0 + 1.5**2), -size * 1.0
    assert values[0] == pytest.approx(noise, abs=4 * errors[0] + size * bias**2)
    assert values[1] == pytest.approx(mates, abs=4 * errors[1] + size * bias**2)
    assert values[2] == pytest.approx(size * 4.0 + (noise + mates) / 4, abs=4 * errors[2])
    assert np.all(errors < 0.1 * np.abs(values))
    apart = moments.mean_difference()
    assert (apart < 2) if bias == 0 else (apart > 5), "only a bias is told from noise"


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    table = np.random.default_rng(0).normal(size=(9, 2))
    table[0, 1] = np.nan
    values, errors = with_errors(table, lambda means: means)
    assert values == pytest.approx([table[:, 0].mean(), table[1:, 1].mean()])
    assert errors[0] == pytest.approx(table[:, 0].std(ddof=1) / 3)


# Forms and rows.


def test_what_each_form_makes_of_the_noise() -> None:
    variances = [form.noise_variance(8.0, -2.0) for form in FORMS]
    assert variances == [8.0, 4.0, 3.0, 2.0, 1.5]


@pytest.mark.parametrize("form", COMPLEMENTARY, ids=lambda form: form.name)
def test_complements_mask_every_label_token_once(form: view_forms.ViewForm) -> None:
    documents = _documents(7)
    drawn = draw_form(documents, range(7), form, TOY)
    for document, views in zip(documents, drawn, strict=True):
        for first, second in zip(views[::2], views[1::2], strict=True):
            times = first.masked.astype(int) + second.masked.astype(int)
            assert np.array_equal(times, document.labels != -100)
            assert first.mask_prob + second.mask_prob == pytest.approx(1.0)
    if form.num_views == 4:
        assert any(not np.array_equal(views[0].masked, views[2].masked) for views in drawn)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_rows_hold_everything_and_no_padding(form: view_forms.ViewForm) -> None:
    documents = _documents(11)
    drawn = draw_form(documents, range(11), form, TOY)
    rows = rows_without_padding(documents, drawn, TOY)
    assert len(rows) == 2
    assert sum(row.num_padding for row in rows) == 0
    labels = sum(document.num_labels for document in documents)
    assert sum(row.num_label_tokens for row in rows) == form.num_views * labels
    masked = sum(int(each.masked.sum()) for views in drawn for each in views)
    assert sum(row.loss_positions.size for row in rows) == masked
    if form.complementary:
        assert masked == labels * form.num_views // 2


def test_a_row_without_a_masked_token_is_one_block() -> None:
    document = _documents(1)[0]
    silent = NoiseDraw(0.5, np.zeros(document.ids.size, dtype=np.bool_))
    (row,) = rows_without_padding([document], [(silent,)], TOY)
    assert (row.num_tokens, row.num_label_tokens) == (TOY.block_length, document.num_labels)


# The whole.


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Figures, what was printed, and the plot of `tools/benchmark.py views --quick`."""
    folder = tmp_path_factory.mktemp("views")
    done = _tool(
        "--quick", "--json", str(folder / "views.json"), "--plot", str(folder / "views.png")
    )
    assert done.returncode == 0, done.stderr
    assert "draw 6 of 6" in done.stderr
    figures = json.loads((folder / "views.json").read_text(encoding="utf-8"))
    return figures, done.stdout, folder / "views.png"


def test_figures_fit_together(quick: tuple[dict[str, Any], str, Path]) -> None:
    figures, printed, plot = quick
    forms = figures["forms"]
    assert [form["form"] for form in forms] == [form.name for form in FORMS]
    one = forms[0]
    for form in forms[1:]:
        views = form["num_views"]
        # One clean copy serves all views.
        assert 1 < form["relative_flops"] < views
        assert form["relative_flops"] == pytest.approx(form["flops"] / one["flops"])
        assert form["relative_variance"] == pytest.approx(form["variance"] / one["variance"])
        product = form["relative_variance"] * form["relative_flops"]
        assert form["efficiency"] == pytest.approx(1 / product)
        assert form["efficiency_error"] > 0
        assert form["total_efficiency_error"] > 0
    for form in forms[1], forms[3]:
        assert form["relative_variance"] == pytest.approx(1 / form["num_views"])
    correlation = figures["mate_correlation"]
    assert -1 <= correlation < 1
    assert forms[2]["relative_variance"] == pytest.approx((1 + correlation) / 2)
    assert figures["same_gradient"] < 1e-4
    assert figures["draws"] == 6
    assert figures["warmup_loss"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    for words in ("efficiency", "correlation", "jackknife", *(form.name for form in FORMS)):
        assert words in printed


@pytest.mark.usefixtures("single_process")
def test_shared_rows_with_another_gradient_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect: the second view of a document gets the weights of the first."""
    right = view_forms.kept_copies

    def wrong(*arguments: Any) -> Any:
        copies = right(*arguments)
        first = copies.views[0].noise.mask_prob
        same = tuple(
            replace(view, noise=replace(view.noise, mask_prob=first)) for view in copies.views
        )
        return replace(copies, views=same)

    # The test run's own process group stays alive for other tests.
    monkeypatch.setattr(views_module, "start_process_group", lambda *arguments: None)
    monkeypatch.setattr(views_module, "stop_process_group", lambda: None)
    corpus = Corpus(tuple(_documents(10)), 0)
    options = replace(TOY, draws=3, warmup_steps=0)
    with (
        mock.patch.object(view_forms, "kept_copies", wrong),
        pytest.raises(ValueError, match="so nothing was measured; this is a defect"),
    ):
        measure_views(options, corpus, lambda line: None)
    assert measure_views(options, corpus, lambda line: None).warmup_loss is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 2}, "--draws 2: a variance and its error need at least 3"),
        ({"documents": 0}, "--documents 0: a step needs at least 1"),
        ({"warmup_steps": -1}, "--warmup-steps -1: must be at least 0"),
        ({"block_length": 0}, "--block-length 0: must be at least 1"),
        ({"noise_eps": 0.5}, "--noise-eps 0.5: must be between 0 and 0.5"),
        ({"draws": 5}, "has 11 documents, but 5 draws of 2 and warm-up need 12; give a larger"),
    ],
)
def test_bad_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        measure_views(replace(TOY, **change), Corpus(tuple(_documents(11)), 0), print)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "some.jsonl"), "--input needs --tokenizer: a model directory"),
        (("--quick", "--draws", "1"), "--draws 1: a variance and its error need at least 3"),
    ],
)
def test_errors_end_the_tool_with_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = _tool(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {message}\n"


def _tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(["tools/benchmark.py", "views", *arguments])
