"""What of a run survives a restart beside tensors: a few hundred bytes of a checkpoint's JSON.

Everything else follows from the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_sdar.config import SdarConfig
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.best_model import make_best_model
from megatron_sdar.training.nonfinite import SkippedSteps
from megatron_sdar.training.plan import StepPlan
from megatron_sdar.training.step_log import StepLog
from megatron_sdar.training.trainer_state import own_state_of, trainer_state


class RunState:
    """How far a run has come; alike on every rank.

    Attributes:
        done: optimizer steps.
        first_loss, last_loss: of the run's first step and of the latest one; nan before.
        best: what evaluated best.
        skipped: steps that were not finite.
        evaluation_is_due: the run was asked to stop before it had evaluated step `done`.
    """

    def __init__(
        self, config: SdarConfig, mesh: ParallelMesh, loader: RowLoader, log: StepLog
    ) -> None:
        self._config, self._mesh, self._loader, self._log = config, mesh, loader, log
        self.done = 0
        self.first_loss = self.last_loss = math.nan
        self.best = make_best_model(config)
        self.skipped = SkippedSteps(config, mesh)
        self.evaluation_is_due = False

    def load(
        self, saved: Mapping[str, Any], optimizer: ShardedAdamW, say: Callable[[str], None]
    ) -> None:
        """Go on from a checkpoint's state; one converted from a model directory has weights only.

        Raises:
            ValueError: the data is not the checkpoint's.
        """
        own = own_state_of(saved)
        self.done = int(saved["step"])
        if "loader" in own:
            self._loader.load_state_dict(own["loader"])
            self._log.load_state_dict(own["interval"])
            self.first_loss = math.nan if own["first_loss"] is None else own["first_loss"]
        if "skipped" in own:
            self.skipped.load_state_dict(own["skipped"])
            optimizer.set_step_count(self.done - len(self.skipped.steps))
        if "best" in own:
            self.best.load_state_dict(own["best"])
        self.evaluation_is_due = own.get("evaluation_is_due", False)
        rows, before = self._loader.rows_per_step, own.get("rows_per_step")
        if before not in (None, rows):
            say(
                f"a step took {before} rows when this checkpoint was saved and takes {rows} now "
                f"(global_batch_size: {before} keeps it, whatever the number of processes)"
            )

    def to_save(self, plan: StepPlan) -> dict[str, Any]:
        """What a checkpoint holds; empty but on rank 0, which writes it.

        Collectives: all_reduce (dp), broadcast_object_list (world).
        """
        own = {
            "loader": self._loader.state_dict(),
            "interval": self._log.state_dict(),
            "first_loss": None if math.isnan(self.first_loss) else self.first_loss,
            "best": self.best.state_dict(),
            "skipped": self.skipped.state_dict(),
            "evaluation_is_due": self.evaluation_is_due,
            "rows_per_step": self._loader.rows_per_step,
        }
        state: dict[str, Any] = {}
        run_on_main(lambda: state.update(self.trainer_state(plan, own)), self._mesh)
        return state

    def trainer_state(self, plan: StepPlan, own: Mapping[str, Any] | None) -> dict[str, Any]:
        """What `trainer_state.trainer_state` makes of the run as it is now (rank 0)."""
        flops = self._log.total_flops
        return trainer_state(self._config, plan, self._loader, self.best, self.done, flops, own)
