"""Whether a stack or an error comes from torch.distributed, told by the files of its frames."""

from __future__ import annotations

from types import FrameType

import torch.distributed as dist

_COLLECTIVES_FILES = ("distributed_c10d.py", "_functional_collectives.py")


def waiting_in(frame: FrameType | None) -> str | None:
    """The function of torch.distributed that a stack is in, None if it is in none."""
    found = None
    while frame is not None:
        if frame.f_code.co_filename.endswith(_COLLECTIVES_FILES):
            found = frame.f_code.co_name
        frame = frame.f_back
    return found


def is_from_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised it: a peer is gone, or did not come in time."""
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(_COLLECTIVES_FILES):
            return True
        trace = trace.tb_next
    return "gloo" in str(error).lower() or "nccl" in str(error).lower()
