"""The entry script with steps that take 0.15 s longer, so that a kill can hit one."""

from __future__ import annotations

import sys
import time

import pretrain_sdar
from megatron_sdar.data.loading.loader import RowLoader

next_step = RowLoader.next_step


def slow(loader: RowLoader) -> object:
    time.sleep(0.15)
    return next_step(loader)


RowLoader.next_step = slow  # type: ignore[method-assign,assignment]
pretrain_sdar.main(sys.argv[1:])
