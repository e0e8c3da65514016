"""What a CPU rank frees is there for its next micro-batch, or given back when asked."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from megatron_sdar.parallel.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def micro_batch():
    return sum(float(torch.ones(size * 2**18)[-1]) for size in (4, 48, 12, 100))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    micro_batch()
before = faults()
for _ in range(4):
    micro_batch()
print(faults() - before)
"""


def _faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_used_again() -> None:
    # 148 MiB of the 164 are in tensors that glibc would map anew each time. Where the heap's holes
    # lie differs from run to run, so now and then a large tensor finds none at first.
    pages = 4 * 148 * 256
    assert _faults("default") > pages * 3 // 4
    assert _faults("kept") < pages // 2


RETURNED = """
import torch
from megatron_sdar.parallel.host_memory import keep_freed_memory, return_freed_memory
from megatron_sdar.training.resident_memory import resident_mb

keep_freed_memory()
before = resident_mb("VmRSS")
tensors = [torch.ones(4 * 2**18) for _ in range(50)]
held = torch.ones(8)  # behind them, so that the end of the heap is in use
del tensors
freed = resident_mb("VmRSS") - before
assert return_freed_memory()
print(freed, resident_mb("VmRSS") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_freed_memory_is_given_back_when_asked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True
    )
    freed, returned = map(float, done.stdout.split())
    assert freed > 190
    assert returned < 20
