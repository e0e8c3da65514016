"""Everything that a run needs before its first step, made in the order that errors want."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import SdarConfig, to_flat_dict
from megatron_sdar.config_presets import describe_preset
from megatron_sdar.config_rules_evaluation import best_metric, evaluates
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.best_model import check_metric
from megatron_sdar.training.data import (
    TrainingDocuments,
    describe_pack,
    make_loader,
    pack,
    prepare_documents,
)
from megatron_sdar.training.evaluation import Evaluator
from megatron_sdar.training.evaluation_data import prepare_evaluation_sets
from megatron_sdar.training.finetuning import describe_finetuning
from megatron_sdar.training.initial_weights import fill_weights
from megatron_sdar.training.kernels import choose_kernels
from megatron_sdar.training.setup import make_stages, make_step
from megatron_sdar.training.step import TrainingStep

Say = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """The parts of a run: documents, rows, and the model with its optimizer."""

    documents: TrainingDocuments
    loader: RowLoader
    stages: Sequence[SdarStage]
    step: TrainingStep


def prepare(
    config: SdarConfig, arch: Architecture, mesh: ParallelMesh, resumes: bool, say: Say
) -> Parts:
    """Make the parts, telling the user of each.

    Args:
        resumes: the weights will come from a checkpoint.

    Raises:
        ValueError, OSError: a user's error.

    Collectives: those of its parts.
    """
    preset = describe_preset(to_flat_dict(config))
    if preset is not None:
        say(preset)
    documents = prepare_documents(config, mesh, say)
    indexes = pack(config, arch, documents)
    say(describe_pack(documents, indexes, config))
    loader = make_loader(config, arch, mesh, documents, indexes)
    kernels = choose_kernels(config, arch, mesh)
    say(kernels.description)
    if kernels.warning:
        say(kernels.warning)
    stages = make_stages(config, arch, mesh, kernels)
    fill_weights(stages, config, arch, resumes, say)
    if config.finetuning.finetuning_type != "full":
        say(describe_finetuning(stages[0].options.finetuning, arch))
    return Parts(documents, loader, stages, make_step(config, arch, mesh, stages))


def prepare_evaluator(
    config: SdarConfig, arch: Architecture, mesh: ParallelMesh, parts: Parts, say: Say
) -> Evaluator | None:
    """What evaluates the run, if anything does.

    Raises:
        ValueError: a user's error, metric_for_best_model among them.

    Collectives: those of prepare_evaluation_sets and of Evaluator.
    """
    if not evaluates(config):
        return None
    sets = prepare_evaluation_sets(config, arch, mesh, parts.documents, say)
    row_length = parts.loader.row_length
    evaluator = Evaluator(config, arch, mesh, parts.stages, sets, row_length, say)
    check_metric(best_metric(config), evaluator.metric_names)
    say(f"an evaluation runs over {evaluator.num_rows} rows of {row_length} tokens")
    return evaluator
