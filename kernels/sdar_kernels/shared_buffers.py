"""Scratch memory for what computes again and again in buffers of nearly the same size.

Micro-batches in flight, and the masks of one micro-batch, need the same buffers but never at the
same time: what is in one does not outlive a call. They share them, and memory goes with the last.
"""

from __future__ import annotations

from threading import get_ident
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_Key = tuple[int, str, torch.dtype, torch.device]

_in_use: WeakValueDictionary[_Key, Tensor] = WeakValueDictionary()


def shared_buffer(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """At least `size` elements, flat: what this thread has under this name, or new ones.

    Keep the tensor, not only views of it, as long as it is to be shared.
    """
    key = (get_ident(), name, dtype, device)
    buffer = _in_use.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = _in_use[key] = torch.empty(size, dtype=dtype, device=device)
    return buffer
