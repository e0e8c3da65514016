"""One conversion in a process of its own, since its peak memory is measured.

    python -m megatron_sdar.benchmark.convert_job SOURCE DESTINATION FORMAT

prints one JSON line: seconds, without the start of Python, and the peak resident memory in MiB.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from megatron_sdar.checkpoint.conversion import ConversionRequest, convert
from megatron_sdar.training.resident_memory import resident_mb


def main(source: str, destination: str, format: str) -> None:
    """Convert and report."""
    started = time.monotonic()
    convert(ConversionRequest(Path(source), Path(destination), format), say=lambda _: None)
    seconds = time.monotonic() - started
    print(json.dumps({"seconds": seconds, "peak_mb": resident_mb("VmHWM")}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
