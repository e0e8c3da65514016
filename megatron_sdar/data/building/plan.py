"""A build as parts: which spans of which files one worker reads, and which of their records.

The parts depend on the sources and options only, never on the number of workers, so a build that
was killed finds its finished parts again and several machines can share one build.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.readers.spans import Span, count_records, split_file
from megatron_sdar.data.sources.datasets import DatasetSpec
from megatron_sdar.data.sources.sampling import sample_counts

_MIN_PART_BYTES = 1 << 20
_MAX_PART_BYTES = 1 << 28
_PARTS = 1024


@dataclass(frozen=True)
class Part:
    """Work of one worker: SPANS of dataset number `dataset`, in order.

    takes[i], when not None, says how often each record of spans[i] is taken, int32 [records].
    """

    dataset: int
    spans: tuple[Span, ...]
    takes: tuple[NDArray[np.int32] | None, ...]

    @property
    def num_bytes(self) -> int:
        """Source bytes of the part, for progress."""
        return sum(span.num_bytes for span in self.spans)


def choose_part_bytes(specs: Sequence[DatasetSpec]) -> int:
    """Source bytes of one part: about a thousand parts, each of 1 MiB to 256 MiB."""
    total = sum(file.stat().st_size for spec in specs for file in spec.files)
    return min(max(total // _PARTS, _MIN_PART_BYTES), _MAX_PART_BYTES)


def plan_parts(
    specs: Sequence[DatasetSpec], part_bytes: int, max_samples: int | None, seed: int
) -> list[Part]:
    """The parts of all SPECS in order, each of about PART_BYTES of one dataset.

    With num_samples of a dataset that many of its records are drawn (SEED); MAX_SAMPLES then
    keeps the first so many of what each dataset gives, in file order.
    """
    parts = []
    for number, spec in enumerate(specs):
        pending: list[tuple[Span, NDArray[np.int32] | None]] = []
        size = 0
        for span, take in _iter_spans(spec, part_bytes, max_samples, seed):
            pending.append((span, take))
            size += span.num_bytes
            if size >= part_bytes:
                parts.append(_part(number, pending))
                pending, size = [], 0
        if pending:
            parts.append(_part(number, pending))
    return parts


def _part(dataset: int, pending: list[tuple[Span, NDArray[np.int32] | None]]) -> Part:
    spans, takes = zip(*pending, strict=True)
    return Part(dataset, spans, takes)


def _iter_spans(
    spec: DatasetSpec, part_bytes: int, max_samples: int | None, seed: int
) -> Iterator[tuple[Span, NDArray[np.int32] | None]]:
    spans = (span for file in spec.files for span in split_file(file, part_bytes))
    if spec.num_samples is not None:
        known = list(spans)
        sizes = [count_records(span) for span in known]
        counts = sample_counts(sum(sizes), spec.num_samples, seed, spec.name)
        if max_samples is not None:
            before = np.cumsum(counts) - counts
            counts = np.clip(max_samples - before, 0, counts).astype(np.int32)
        starts = np.cumsum(sizes) - sizes
        for span, start, size in zip(known, starts, sizes, strict=True):
            take = counts[start : start + size]
            if take.any():
                yield span, take
        return
    left = max_samples
    for span in spans:
        if left is None:
            yield span, None
            continue
        size = count_records(span)
        yield span, np.ones(min(size, left), dtype=np.int32)
        left -= min(size, left)
        if not left:
            return
