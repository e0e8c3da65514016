"""What several noisy views of a document buy: gradient variance against FLOPs, on real data.

A model is trained a little, then stands still. Every draw takes other documents and gives them two
complementary pairs of views. One gradient per view is enough for all forms: the gradient of a
step with several views is the mean of its views' gradients, which is checked on the first draw
against the rows that training makes. FLOPs are counted on the rows of each form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sdar.benchmark.step_data import Corpus
from megatron_sdar.benchmark.still_model import Say, StillModel, check_corpus
from megatron_sdar.benchmark.view_forms import (
    DRAWN,
    FORMS,
    Noises,
    ViewForm,
    ViewsOptions,
    draw_form,
)
from megatron_sdar.benchmark.view_moments import NUM_GRADIENTS, PairMoments, with_errors
from megatron_sdar.parallel.mesh import LaunchInfo, start_process_group, stop_process_group

_TIMEOUT_SECONDS = 3600
_SAME_GRADIENT = 1e-4


@dataclass(frozen=True)
class FormFigures:
    """One form against one view of the same documents.

    Attributes:
        variance: trace of the gradient's covariance over noise, for given documents.
        relative_variance, relative_flops: over those of one view.
        flops: of a step, mean over draws.
        efficiency: variance times FLOPs of one view over this form's: above 1, the noise left
            by the same compute is less.
        total_efficiency: the same with the variance over the choice of documents, which more
            views of the same documents leave as it is.
        *_error: standard errors, jackknife over draws.
    """

    form: str
    num_views: int
    variance: float
    relative_variance: float
    relative_variance_error: float
    flops: float
    relative_flops: float
    efficiency: float
    efficiency_error: float
    total_efficiency: float
    total_efficiency_error: float


@dataclass(frozen=True)
class ViewsFigures:
    """What `measure_views` finds.

    Attributes:
        forms: in the order of FORMS.
        mate_correlation: of the gradients of a view and its complement, for given documents.
        document_variance: trace of the covariance of the noise-free gradient over documents.
        mean_squared: squared norm of the mean gradient, the signal.
        same_gradient: largest difference of a shared row's gradient and the mean of its views',
            over the norm of the latter.
        mean_difference: see `PairMoments.mean_difference`; about 1.
        warmup_loss: of the last warm-up steps (up to 20), nan without any.
        label_tokens: of a step with one view, mean over draws.
    """

    forms: tuple[FormFigures, ...]
    draws: int
    documents: int
    num_parameters: int
    noise_eps: float
    num_folded: int
    mate_correlation: float
    mate_correlation_error: float
    document_variance: float
    document_variance_error: float
    mean_squared: float
    same_gradient: float
    mean_difference: float
    warmup_loss: float | None
    label_tokens: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_views(options: ViewsOptions, corpus: Corpus, say: Say) -> ViewsFigures:
    """Train, draw, measure.

    Args:
        options: what is measured.
        corpus: documents; their own noise is not used.
        say: called with what is being done.

    Raises:
        ValueError: bad options, too few documents, or a row of several views whose gradient is
            not that of its views.
    """
    check_corpus(options, corpus)
    start_process_group(LaunchInfo(0, 0, 1), "cpu", "gloo", _TIMEOUT_SECONDS)
    try:
        return _Measurement(options, corpus, say).run()
    finally:
        stop_process_group()


class _Measurement:
    """One run: the model and where it draws documents and noise from."""

    def __init__(self, options: ViewsOptions, corpus: Corpus, say: Say) -> None:
        self._options, self._corpus, self._say = options, corpus, say
        self._model = StillModel(options, corpus, say)

    def run(self) -> ViewsFigures:
        options = self._options
        warmup_loss = self._model.warm_up()
        size = self._model.num_parameters
        moments = PairMoments(size)
        flops, labels = [], []
        same_gradient = 0.0
        for draw in range(options.draws):
            first = draw * options.documents
            numbers = range(first, first + options.documents)
            gradients, noises = self._view_gradients(numbers, size)
            if draw == 0:
                same_gradient = self._check_shared_rows(numbers, gradients, noises)
            moments.add(gradients)
            flops.append([self._flops(numbers, form) for form in FORMS])
            labels.append(sum(self._corpus.documents[number].num_labels for number in numbers))
            if (draw + 1) % max(1, options.draws // 8) == 0 or draw + 1 == options.draws:
                self._say(f"  draw {draw + 1} of {options.draws}")
        return self._figures(moments, np.array(flops), labels, same_gradient, warmup_loss)

    def _view_gradients(self, numbers: Sequence[int], size: int) -> tuple[Tensor, Noises]:
        """fp32 [4, P] of two complementary pairs, and their noise."""
        noises = self._draw(numbers, DRAWN)
        gradients = torch.empty(NUM_GRADIENTS, size)
        for view in range(NUM_GRADIENTS):
            rows = self._model.rows(numbers, [(each[view],) for each in noises])
            self._model.write_gradient(rows, gradients[view])
        return gradients, noises

    def _check_shared_rows(
        self, numbers: Sequence[int], gradients: Tensor, noises: Noises
    ) -> float:
        """Rows with one clean copy for several views have the mean of their views' gradients."""
        worst = 0.0
        for views in ((0, 2), (0, 1), (0, 1, 2, 3)):
            rows = self._model.rows(
                numbers, [tuple(each[view] for view in views) for each in noises]
            )
            shared = torch.empty_like(gradients[0])
            self._model.write_gradient(rows, shared)
            expected = gradients[list(views)].mean(dim=0)
            difference = float((shared - expected).norm() / expected.norm())
            if not difference <= _SAME_GRADIENT:
                raise ValueError(
                    f"the gradient of {len(views)} views on one clean copy differs from the mean "
                    f"of the views' gradients by {difference:.1e} of its norm, so nothing was "
                    "measured; this is a defect: please report it"
                )
            worst = max(worst, difference)
        return worst

    def _flops(self, numbers: Sequence[int], form: ViewForm) -> int:
        return self._model.flops(self._model.rows(numbers, self._draw(numbers, form)))

    def _draw(self, numbers: Sequence[int], form: ViewForm) -> Noises:
        documents = [self._corpus.documents[number] for number in numbers]
        return draw_form(documents, numbers, form, self._options)

    def _figures(
        self,
        moments: PairMoments,
        flops: NDArray[np.int64],
        labels: Sequence[int],
        same_gradient: float,
        warmup_loss: float | None,
    ) -> ViewsFigures:
        options = self._options
        table = np.concatenate([moments.table(), flops], axis=1)
        values, errors = with_errors(table, _statistics)
        scalars, forms = values[:2], values[2:].reshape(len(FORMS), -1)
        scalar_errors, form_errors = errors[:2], errors[2:].reshape(len(FORMS), -1)
        return ViewsFigures(
            forms=tuple(
                FormFigures(
                    form=form.name,
                    num_views=form.num_views,
                    variance=each[0],
                    relative_variance=each[1],
                    relative_variance_error=error[1],
                    flops=each[2],
                    relative_flops=each[3],
                    efficiency=each[4],
                    efficiency_error=error[4],
                    total_efficiency=each[5],
                    total_efficiency_error=error[5],
                )
                for form, each, error in zip(
                    FORMS, forms.tolist(), form_errors.tolist(), strict=True
                )
            ),
            draws=options.draws,
            documents=options.documents,
            num_parameters=self._model.num_parameters,
            noise_eps=options.noise_eps,
            num_folded=self._corpus.num_folded,
            mate_correlation=float(scalars[0]),
            mate_correlation_error=float(scalar_errors[0]),
            document_variance=float(scalars[1]),
            document_variance_error=float(scalar_errors[1]),
            mean_squared=moments.mean_squared(),
            same_gradient=same_gradient,
            mean_difference=moments.mean_difference(),
            warmup_loss=warmup_loss,
            label_tokens=float(np.mean(labels)),
        )


def _statistics(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """From means of noise, mates, spread and each form's FLOPs to all figures, flat.

    First the correlation of mates and the variance over documents, then per form: variance,
    relative variance, FLOPs, relative FLOPs, efficiency, total efficiency.
    """
    noise, mates, spread = means[:3].tolist()
    flops = means[3:].tolist()
    # A draw's mean over its four gradients still has the noise of two pairs.
    between = spread - DRAWN.noise_variance(noise, mates)
    figures = [mates / noise, between]
    for form, cost in zip(FORMS, flops, strict=True):
        variance = form.noise_variance(noise, mates)
        relative_cost = cost / flops[0]
        figures += [
            variance,
            variance / noise,
            cost,
            relative_cost,
            noise / variance / relative_cost,
            (between + noise) / (between + variance) / relative_cost,
        ]
    return np.array(figures)
