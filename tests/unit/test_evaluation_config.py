"""Keys of evaluation: each rule alone, defaults that LLaMA-Factory's users rely on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.test_diffusion_config import MODEL

from megatron_sdar.config import SdarConfig, load_config, validate
from megatron_sdar.config_rules_evaluation import best_metric, evaluates, greater_is_better
from megatron_sdar.training.plan import make_plan

Load = Callable[[str], SdarConfig]
STEPS = "val_size: 0.1\neval_strategy: steps\n"


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str) -> SdarConfig:
        path = tmp_path / "run.yaml"
        path.write_text(f"model_name_or_path: model\noutput_dir: out\ndataset: a\n{text}\n")
        return load_config([str(path)])

    return load


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STEPS, None),
        ("eval_strategy: steps", "there is nothing to evaluate on: give val_size, eval_dataset"),
        ("do_eval: true", "there is nothing to evaluate on"),
        ("eval_on_start: true", "there is nothing to evaluate on"),
        ("val_size: 0.1", None),
        ("val_size: 0.1\neval_dataset: b", "val_size=0.1 and eval_dataset or eval_data_path"),
        ("val_size: 0.1\neval_data_path: b", "exclude each other"),
        (STEPS + "eval_steps: 2.5", "eval_steps=2.5 must be a whole number"),
        (STEPS + "eval_steps: 0.5", None),
        (STEPS + "eval_block_lengths: [4, 24]", "is not a multiple of 24 (eval_block_lengths)"),
        (STEPS + "eval_block_lengths: [4, 4]", "eval_block_lengths=[4, 4] names a length twice"),
        (STEPS + "eval_generate_samples: 2\nstage: pt", "stage: pt has none; set it to 0"),
        (STEPS + "eval_generate_samples: 2\neval_denoising_steps: 17", "exceeds the block length"),
        (STEPS + "eval_denoising_steps: 17", None),
        (STEPS + "eval_generate_samples: 2\neval_generate_max_new_tokens: 4096", "leaves no room"),
        ("early_stopping_steps: 2", "early_stopping_steps needs evaluations; set eval_strategy"),
        ("load_best_model_at_end: true", "load_best_model_at_end needs evaluations"),
        (STEPS + "early_stopping_steps: 2\nmetric_for_best_model: exact_match",
         "metric_for_best_model=eval_exact_match needs eval_generate_samples above 0"),
        (STEPS + "load_best_model_at_end: true\nsave_strategy: 'no'", "needs checkpoints where it"),
        (STEPS + "save_strategy: best\neval_steps: 7\nload_best_model_at_end: true", None),
        ("save_strategy: best", "save_strategy: best needs evaluations; set eval_strategy: steps"),
        (STEPS + "load_best_model_at_end: true\nsave_steps: 30\neval_steps: 15", None),
        (STEPS + "load_best_model_at_end: true\nsave_steps: 30\neval_steps: 20",
         "save_steps=30 is not a multiple of eval_steps=20"),
        (STEPS + "load_best_model_at_end: true\nsave_steps: 30\neval_steps: 60",
         "save_steps=30 is not a multiple of eval_steps=60"),
        (STEPS + "load_best_model_at_end: true\nsave_steps: 30\neval_steps: 0.1",
         "save_steps=30 is not a multiple of eval_steps=0.1"),
        (STEPS + "load_best_model_at_end: true\nsave_steps: 0.2\neval_steps: 0.1", None),
    ],
)  # fmt: skip
def test_each_rule_alone(load: Load, text: str, message: str | None) -> None:
    config = load(text)
    if message is None:
        validate(config, MODEL, 1)
        return
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        validate(config, MODEL, 1)
    assert len([line for line in str(raised.value).splitlines() if line.startswith("  ")]) <= 1


def test_what_asks_for_evaluation_and_for_which_direction(load: Load) -> None:
    assert not evaluates(load("val_size: 0.1"))
    for text in ("do_eval: true", "eval_strategy: epoch", "eval_on_start: true"):
        assert evaluates(load(f"val_size: 0.1\n{text}"))
    assert best_metric(load("metric_for_best_model: loss")) == "eval_loss"
    assert not greater_is_better(load(""))
    assert greater_is_better(load("metric_for_best_model: exact_match"))
    assert greater_is_better(load("metric_for_best_model: eval_accuracy"))
    for name in ("accuracy_t0.5", "eval_a_accuracy", "glossary_exact_match"):
        assert greater_is_better(load(f"metric_for_best_model: {name}"))
    for name in ("loss_t0.125", "loss_b8", "eval_a_loss"):
        assert not greater_is_better(load(f"metric_for_best_model: {name}"))
    assert not greater_is_better(load("metric_for_best_model: accuracy\ngreater_is_better: false"))
    assert greater_is_better(load("greater_is_better: true"))
    folded = load("val_size: 0.1\neval_strategy: epoch\nnum_train_epochs: 4")
    assert (folded.evaluation.eval_strategy, folded.evaluation.eval_steps) == ("steps", 0.25)


@pytest.mark.parametrize(
    ("keys", "saves", "evaluates"),
    [
        ("save_steps: 0.2\neval_steps: 0.1", [3, 6, 9, 12, 14], [2, 4, 6, 8, 10, 12, 14]),
        ("save_steps: 0.2\neval_steps: 0.1\nload_best_model_at_end: true",
         [4, 8, 12, 14], [2, 4, 6, 8, 10, 12, 14]),
        ("save_steps: 6\neval_steps: 3\nload_best_model_at_end: true",
         [6, 12, 14], [3, 6, 9, 12, 14]),
        ("save_steps: 5\nlogging_steps: 5\nload_best_model_at_end: true",
         [5, 10, 14], [5, 10, 14]),
    ],
)  # fmt: skip
def test_checkpoints_among_which_the_best_is_sought_are_all_evaluated(
    load: Load, keys: str, saves: list[int], evaluates: list[int]
) -> None:
    config = load(f"{STEPS}max_steps: 14\n{keys}")
    plan = make_plan(config, None, None)  # type: ignore[arg-type]  # max_steps needs neither
    steps = range(1, 15)
    assert [step for step in steps if plan.saves(step)] == saves
    assert [step for step in steps if plan.evaluates(step)] == evaluates


def test_the_best_is_saved_whenever_it_is_found(load: Load) -> None:
    text = f"{STEPS}max_steps: 14\neval_steps: 5\nsave_strategy: best"
    plan = make_plan(load(text), None, None)  # type: ignore[arg-type]  # max_steps needs neither
    assert [step for step in range(1, 15) if plan.saves(step)] == [14], "what is due in any case"
    assert [plan.saves_before_end(done) for done in (0, 4, 9, 10)] == [True, True, True, False]
