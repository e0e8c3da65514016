"""Work that every rank does and any rank may fail at, such as reading its own shard.

A rank that fails alone would leave the others waiting in the next collective until it times
out. Here they learn of it at once and all leave with a readable ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sdar.parallel.mesh import sum_over_world

Result = TypeVar("Result")


def on_every_rank(function: Callable[[], Result], what: str, stages: Sequence[nn.Module]) -> Result:
    """Run `function` on every rank; its result, when it succeeded on all of them.

    Args:
        what: completes "another process could not ...".
        stages: this rank's, for the device to communicate on.

    Raises:
        ValueError: on every rank, when any rank raised ValueError or OSError; the failing
            rank's says why.

    Collective: all_reduce (world).
    """
    result: Result | None = None
    cause: Exception | None = None
    try:
        result = function()
    except (ValueError, OSError) as error:
        cause = error
    device = next(parameter.device for stage in stages for parameter in stage.parameters())
    failed = int(sum_over_world(torch.tensor(float(cause is not None), device=device)))
    if cause is not None:
        raise ValueError(str(cause)) from cause
    if failed:
        raise ValueError(f"another process could not {what} ({failed} of them); it says why")
    assert result is not None, "the function returns something on every rank"
    return result


@contextmanager
def dcp_errors_as_value_errors() -> Iterator[None]:
    """Around a `dcp.save` or `dcp.load`, which tell every rank of the failure of any.

    Raises:
        ValueError: with the message of the lowest rank that failed, when all that failed did
            so by ValueError or OSError.
        CheckpointException: otherwise, with the tracebacks of all ranks: that is a bug.
    """
    try:
        yield
    except CheckpointException as error:
        causes = [cause for _, (cause, _) in sorted(error.failures.items())]
        if not all(isinstance(cause, ValueError | OSError) for cause in causes):
            raise
        others = f" ({len(causes)} processes failed, the first says)" if len(causes) > 1 else ""
        raise ValueError(f"{causes[0]}{others}") from error
