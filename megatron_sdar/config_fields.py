"""The whole configuration: its sections, which together are the keys of the flat YAML file.

One frozen dataclass per concern in config_sections; the field name is the key. Names and defaults
are LLaMA-Factory's where the key is theirs and Megatron's for parallel sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_sdar.config_sections.data import DataConfig
from megatron_sdar.config_sections.diffusion import DiffusionConfig
from megatron_sdar.config_sections.evaluation import EvaluationConfig
from megatron_sdar.config_sections.finetuning import FinetuningConfig
from megatron_sdar.config_sections.guards import GuardConfig
from megatron_sdar.config_sections.model import ModelConfig
from megatron_sdar.config_sections.optim import OptimConfig
from megatron_sdar.config_sections.parallel import ParallelConfig
from megatron_sdar.config_sections.reporting import ReportingConfig
from megatron_sdar.config_sections.training import TrainingConfig


@dataclass(frozen=True)
class SdarConfig:
    """The whole configuration. Functions receive the section they need, not this.

    `warnings` are the lines that loading wants the user to see; they are not part of the
    configuration's identity.
    """

    model: ModelConfig
    data: DataConfig
    diffusion: DiffusionConfig
    parallel: ParallelConfig
    optim: OptimConfig
    training: TrainingConfig
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reporting: ReportingConfig = field(default_factory=ReportingConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def row_length(self) -> int:
        """Tokens of a row, copies and padding included."""
        copies = 1 + self.diffusion.noisy_views
        return self.diffusion.row_length or copies * self.data.cutoff_len


SECTION_TYPES: Mapping[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "diffusion": DiffusionConfig,
    "parallel": ParallelConfig,
    "optim": OptimConfig,
    "training": TrainingConfig,
    "finetuning": FinetuningConfig,
    "evaluation": EvaluationConfig,
    "reporting": ReportingConfig,
    "guards": GuardConfig,
}
