"""Work that every rank does and any rank may fail at, such as reading its own shard.

A rank that fails alone would leave the others waiting in the next collective until it times
out. Here they learn of it at once and all leave with a readable ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from megatron_sdar.parallel.launch import gather_from_world

Result = TypeVar("Result")


def together(function: Callable[[], Result]) -> Result:
    """Run `function` on every rank; its result, when it succeeded on all of them.

    Raises:
        ValueError: on every rank the same, that of the lowest rank that raised ValueError or
            OSError. Its class is kept, so that all ranks react alike.

    Collective: all_gather_object (world).
    """
    result: Result | None = None
    cause: ValueError | None = None
    try:
        result = function()
    except ValueError as error:
        cause = error
    except OSError as error:
        cause = ValueError(str(error))
    failures = [error for error in gather_from_world(cause) if error is not None]
    if failures:
        raise failures[0] from cause
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
