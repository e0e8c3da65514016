"""Which evaluation was the best so far, and whether to go on without a better one.

Every rank is told the same metrics and so decides the same. The state is part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sdar.config import SdarConfig
from megatron_sdar.config_rules_evaluation import best_metric, greater_is_better


@dataclass
class BestModel:
    """The best value of one metric.

    Attributes:
        metric: its name.
        greater: whether more is better.
        patience: evaluations in a row without a better one after which training stops; None: it
            does not stop.
        value, step: of the best evaluation; None before the first.
        saved_value, saved_step: of the best one that has a checkpoint.
        without_better: evaluations since the best one.
        saves_best: every evaluation that is better than all before it gets a checkpoint.
    """

    metric: str
    greater: bool
    patience: int | None
    value: float | None = None
    step: int | None = None
    saved_value: float | None = None
    saved_step: int | None = None
    without_better: int = 0
    saves_best: bool = False

    def update(self, step: int, metrics: Mapping[str, float], is_saved: bool) -> bool:
        """Take in an evaluation; returns whether a checkpoint of this step is written.

        Args:
            is_saved: whether one is written however good it is.

        Raises:
            ValueError: there is no such metric, or it is not finite.
        """
        check_metric(self.metric, metrics)
        value = metrics[self.metric]
        if not math.isfinite(value):
            raise ValueError(
                f"{self.metric} is {value} at step {step}: the model is broken; resume from an "
                "earlier checkpoint with a lower learning_rate"
            )
        if self._is_better(value, self.value):
            self.value, self.step, self.without_better = value, step, 0
            is_saved = is_saved or self.saves_best
        else:
            self.without_better += 1
        if is_saved and self._is_better(value, self.saved_value):
            self.saved_value, self.saved_step = value, step
        return is_saved

    @property
    def stops(self) -> bool:
        """Whether patience is used up."""
        return self.patience is not None and self.without_better >= self.patience

    def forget_saved(self) -> None:
        """The checkpoint of the best evaluation is lost: the next one saved takes its place."""
        self.saved_value = self.saved_step = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        names = ("value", "step", "saved_value", "saved_step", "without_better")
        return {"metric": self.metric} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one that watched another metric has nothing to say."""
        if state["metric"] != self.metric:
            return
        for name, value in state.items():
            setattr(self, name, value)

    def _is_better(self, value: float, than: float | None) -> bool:
        if than is None:
            return True
        return value > than if self.greater else value < than


def check_metric(metric: str, names: Collection[str]) -> None:
    """Refuse a metric that evaluations do not measure (ValueError)."""
    if metric not in names:
        raise ValueError(
            f"metric_for_best_model: {metric} is not measured; there are {', '.join(sorted(names))}"
        )


def make_best_model(config: SdarConfig) -> BestModel:
    """What the configuration watches."""
    return BestModel(
        best_metric(config),
        greater_is_better(config),
        config.evaluation.early_stopping_steps,
        saves_best=config.training.save_strategy == "best",
    )
