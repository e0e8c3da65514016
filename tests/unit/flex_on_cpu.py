"""torch's uncompiled FlexAttention can train on CPU once its guard is out of the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from sdar_kernels import flex_attention as ours
from torch.nn.attention import flex_attention as torchs


@contextmanager
def flex_trains_on_cpu() -> Iterator[None]:
    """Lift the refusals of torch and of our own; only the uncompiled form is right then."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torchs, "_validate_device"))
        stack.enter_context(mock.patch.object(ours, "refuse_gradients_on_cpu"))
        yield
