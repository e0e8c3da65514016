"""The entry script with evaluations that take their time over every few micro-batches."""

from __future__ import annotations

import sys
import time

import pretrain_sdar
from megatron_sdar.training import evaluation_loss

losses = evaluation_loss.LossEvaluation._losses


def slow(*arguments: object) -> object:
    print("evaluating", flush=True)
    time.sleep(3)
    return losses(*arguments)  # type: ignore[arg-type]


evaluation_loss.LossEvaluation._losses = slow  # type: ignore[method-assign,assignment]
evaluation_loss._MICRO_BATCHES_AT_ONCE = 1
pretrain_sdar.main(sys.argv[1:])
