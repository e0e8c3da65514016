"""Memory of this process, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def resident_mb(field: str) -> float:
    """MiB. VmRSS: resident now; VmHWM: the most so far. Unlike ru_maxrss, not the parent's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"the kernel reports {field}")
