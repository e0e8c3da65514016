"""The entry script with a rank that goes to sleep: SLEEPY_RANK, in SLEEPY_STEP, for ever."""

from __future__ import annotations

import os
import sys
import time

import pretrain_sdar
from megatron_sdar.data.loading.loader import RowLoader

next_step = RowLoader.next_step
steps = 0


def sleepy(loader: RowLoader) -> object:
    global steps
    steps += 1
    if os.environ["RANK"] == os.environ["SLEEPY_RANK"] and steps == int(os.environ["SLEEPY_STEP"]):
        print("asleep", flush=True)
        time.sleep(3600)
    return next_step(loader)


RowLoader.next_step = sleepy  # type: ignore[method-assign,assignment]
pretrain_sdar.main(sys.argv[1:])
