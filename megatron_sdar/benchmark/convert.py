"""Conversion of models of real size: speed beside `cp -r` of the same bytes, and memory.

Copy and conversion take turns and start from the same state: nothing of what they read is in the
system's file cache, nothing waits to be written. `cp` leaves its last data in the cache while a
conversion has everything on disk and checksums taken; both times are reported, with and without
the `sync` that `cp` would need for that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.filesize import decimal

from megatron_sdar.benchmark.model_shapes import MODEL_CONFIGS, write_random_model
from megatron_sdar.benchmark.save_times import SaveTimes, measure_saves
from megatron_sdar.checkpoint.hf_export import HfTarget
from megatron_sdar.checkpoint.page_cache import forget_pages
from megatron_sdar.checkpoint.source_detection import open_hf_model
from megatron_sdar.checkpoint.weight_files import THREADS, compare_weight_files

_FILE_BYTES = 5 * 10**9
Say = Callable[[str], None]


@dataclass(frozen=True)
class ConvertOptions:
    """What is measured.

    Attributes:
        shape: of model_shapes.MODEL_CONFIGS.
        rounds: copies and conversions in each direction.
        ranks: processes that load the model, tensor parallel; 0 leaves loading out.
        saves: synchronous and asynchronous saves; 0 leaves saving out.
    """

    shape: str
    rounds: int
    ranks: int
    saves: int


@dataclass(frozen=True)
class Direction:
    """Both ways of moving the same bytes, seconds of each round."""

    copy: tuple[float, ...]
    copy_and_sync: tuple[float, ...]
    conversion: tuple[float, ...]
    peak_mb: float

    def speed_vs_copy(self, synced: bool) -> float:
        """Speed of the conversion over that of the copy beside it, median of the rounds."""
        copies = self.copy_and_sync if synced else self.copy
        return median(a / b for a, b in zip(copies, self.conversion, strict=True))


@dataclass(frozen=True)
class ConvertFigures:
    """What was measured; None for what was left out.

    Attributes:
        model_bytes: of all tensors.
        load_peaks_mb: peak resident memory of each loading rank.
        saves: see save_times.
    """

    shape: str
    model_bytes: int
    to_native: Direction
    to_hf: Direction
    load_peaks_mb: tuple[float, ...] | None
    saves: SaveTimes | None

    @property
    def load_rss_vs_model(self) -> float | None:
        """Peak resident memory of all loading ranks over the model's bytes."""
        if self.load_peaks_mb is None:
            return None
        return sum(self.load_peaks_mb) * 2**20 / self.model_bytes

    def to_json(self) -> dict[str, object]:
        """The figures by their published names."""
        return {
            "shape": self.shape,
            "model_bytes": self.model_bytes,
            "speed_vs_cp_to_native": self.to_native.speed_vs_copy(synced=False),
            "speed_vs_cp_to_hf": self.to_hf.speed_vs_copy(synced=False),
            "speed_vs_synced_cp_to_native": self.to_native.speed_vs_copy(synced=True),
            "speed_vs_synced_cp_to_hf": self.to_hf.speed_vs_copy(synced=True),
            "gb_per_s_to_native": self.model_bytes / 1e9 / median(self.to_native.conversion),
            "gb_per_s_to_hf": self.model_bytes / 1e9 / median(self.to_hf.conversion),
            "peak_rss_mb": max(self.to_native.peak_mb, self.to_hf.peak_mb),
            "load_rss_vs_model": self.load_rss_vs_model,
            "async_block_share": None if self.saves is None else self.saves.block_share,
            "async_step_delay_share": None if self.saves is None else self.saves.delay_share,
        }


def measure_convert(options: ConvertOptions, folder: Path, say: Say) -> ConvertFigures:
    """Measure in `folder`, which needs three times the model's size, four times at the end.

    Raises:
        ValueError: the disk has too little room, a conversion fails, or what comes back is not
            bitwise what went in.
    """
    model, native, back, copy = (folder / name for name in ("model", "native", "back", "copy"))
    model_bytes = write_random_model(model, MODEL_CONFIGS[options.shape], file_bytes=_FILE_BYTES)
    say(f"model: {options.shape}, {decimal(model_bytes)} of bfloat16 in {model}")
    if shutil.disk_usage(folder).free < 2.1 * model_bytes:
        raise ValueError(f"{folder}: needs {decimal(int(2.1 * model_bytes))} more; choose --folder")
    rounds: dict[str, list[tuple[float, float, float, float]]] = {"native": [], "hf": []}
    for number in range(options.rounds):
        for format, source, target in (("native", model, native), ("hf", native, back)):
            seconds, synced = _copy(source, copy, folder)
            converted, peak = _convert(source, target, format, folder)
            rounds[format].append((seconds, synced, converted, peak))
            say(
                f"round {number + 1}, to {format}: cp {seconds:.1f} s ({synced:.1f} with sync), "
                f"conversion {converted:.1f} s, peak {peak:.0f} MiB"
            )
    _check_equal(model, back)
    say("HF -> native -> HF: every tensor bitwise as before")
    shutil.rmtree(native)
    shutil.rmtree(back)
    peaks = _load(model, options.ranks, say) if options.ranks else None
    shutil.rmtree(model)
    saves = measure_saves(folder / "saves", options.saves, say) if options.saves else None
    return ConvertFigures(
        options.shape,
        model_bytes,
        _direction(rounds["native"]),
        _direction(rounds["hf"]),
        peaks,
        saves,
    )


def _direction(rounds: Sequence[tuple[float, float, float, float]]) -> Direction:
    copy, synced, conversion, peaks = zip(*rounds, strict=True)
    return Direction(copy, synced, conversion, max(peaks))


def _settle(folder: Path) -> None:
    """Nothing waits to be written, and nothing below the folder is in the file cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                forget_pages(file.fileno())


def _copy(source: Path, target: Path, folder: Path) -> tuple[float, float]:
    """Seconds of cp -r, and of cp -r and sync."""
    _settle(folder)
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied = time.monotonic() - started
    os.sync()
    synced = time.monotonic() - started
    shutil.rmtree(target)
    return copied, synced


def _convert(source: Path, target: Path, format: str, folder: Path) -> tuple[float, float]:
    """Seconds and peak MiB of one conversion; an older target is removed first."""
    if target.exists():
        shutil.rmtree(target)
    _settle(folder)
    command = [sys.executable, "-m", "megatron_sdar.benchmark.convert_job"]
    answer = _answer([*command, str(source), str(target), format])
    return answer["seconds"], answer["peak_mb"]


def _answer(command: Sequence[str]) -> dict[str, Any]:
    """The JSON line that the command prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or len(lines) != 1:
        raise ValueError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(lines[0])
    return answer


def _check_equal(model: Path, back: Path) -> None:
    target = HfTarget(open_hf_model(model), None, _FILE_BYTES)
    compare_weight_files(back, target.files, target.read, THREADS, lambda _: None)


def _load(model: Path, ranks: int, say: Say) -> tuple[float, ...]:
    """Peak MiB of every rank."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "megatron_sdar.benchmark.load_rank", str(model)),
    ]
    answer = _answer(command)
    peaks, own = tuple(answer["peak_mb"]), sum(answer["own_mb"])
    say(f"loading into tp {ranks}: peaks {[round(p) for p in peaks]} MiB, parameters {own:.0f} MiB")
    return peaks
