"""What a CPU rank frees is there for its next micro-batch, without page faults."""

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
