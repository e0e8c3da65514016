"""check_weight_hash_interval: every so many steps all copies of a weight must have equal bits."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import SdarConfig
from megatron_sdar.model.sdar import EMBEDDING, HEAD
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.parallel.weight_hash import WeightCopies
from megatron_sdar.training.step import TrainingStep, named_parameters

_SHOWN = 8


class WeightCheck:
    """Compares copies when a step is due; does nothing when the key is 0.

    Args:
        step: whose weights are compared; told when that begins.
        done: steps done before the first call.

    Collective: all_gather_object (world), unless the key is 0.
    """

    def __init__(
        self,
        config: SdarConfig,
        arch: Architecture,
        mesh: ParallelMesh,
        step: TrainingStep,
        done: int,
        say: Callable[[str], None],
    ) -> None:
        self._every = config.guards.check_weight_hash_interval
        self._agreed = done
        self._step = step
        self._copies: WeightCopies | None = None
        if not self._every:
            return
        same = {HEAD: EMBEDDING} if arch.tie_word_embeddings else {}
        self._copies = WeightCopies(named_parameters(step.stages), mesh, same)
        say(
            f"check_weight_hash_interval: {self._copies.num_shared:,} weights lie on several "
            f"processes; their bits are compared every {self._every} steps"
        )

    def after_step(self, done: int) -> None:
        """Compare if step `done` is due.

        Raises:
            ValueError: on every rank, when copies differ.

        Collectives: those of `WeightCopies.differences`.
        """
        if self._copies is None or done % self._every:
            return
        self._step.progress("comparing copies of weights")
        found = self._copies.differences()
        if found:
            lines = [copies.describe() for copies in found[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"and {len(found) - _SHOWN} more")
            raise ValueError(
                f"step {done}: copies of weights that must be equal are not; they were after step "
                f"{self._agreed}:\n  "
                + "\n  ".join(lines)
                + f"\nnothing was saved since; start again from a checkpoint of step {self._agreed}"
                " or before (resume_from_checkpoint), and test the device of the rank that differs"
            )
        self._agreed = done
