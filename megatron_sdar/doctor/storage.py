"""The directory a run writes to: whether it can, how much room there is, how fast it is."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from megatron_sdar.doctor.findings import Finding, missing, ok, slow
from megatron_sdar.training.memory_estimate import GIB

_SAMPLE = 64 * 2**20
_SLOW_BYTES_PER_SECOND = 100 * 2**20


def storage(output_dir: Path, needed: int) -> Finding:
    """Write, sync and remove a sample beside or in `output_dir`.

    Args:
        needed: bytes that checkpoints and the exported model will take; 0: unknown.
    """
    place = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not place.is_dir():
        return missing("output_dir", f"{place} is a file", "choose another output_dir")
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.0f} GiB free in {place}"
    try:
        speed = _write_speed(place)
    except OSError as error:
        return missing(
            "output_dir",
            f"cannot write in {place}: {error.strerror or error}",
            "choose another output_dir, or make it writable",
        )
    text += f", {speed / 2**20:.0f} MiB/s"
    if needed > free:
        return missing(
            "output_dir",
            f"{text}; the run needs about {needed / GIB:.0f} GiB",
            "free some, set save_total_limit, or choose another output_dir",
        )
    if needed:
        text += f"; the run needs about {needed / GIB:.1f} GiB"
    if speed < _SLOW_BYTES_PER_SECOND:
        return slow("output_dir", text, "choose a faster disk, or keep async_save: true")
    return ok("output_dir", text)


def _write_speed(directory: Path) -> float:
    """Bytes per second of a sample that is really on disk."""
    sample = os.urandom(2**20) * (_SAMPLE // 2**20)
    with tempfile.TemporaryFile(dir=directory) as file:
        started = time.monotonic()
        file.write(sample)
        file.flush()
        os.fsync(file.fileno())
        return len(sample) / (time.monotonic() - started)
