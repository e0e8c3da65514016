"""Summaries of tokenized datasets.

Owns the figures that a build reports and their text. A reused dataset gives the same summary as
the build that made it, but for the time it took and what it went on from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.loading.packing import pack_documents
from megatron_sdar.data.storage.tokens import TokenizedDataset

_PERCENTILES = (50, 90, 99)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class BuildSummary:
    """What a build made, or what a reused dataset holds (then `seconds` is 0).

    num_mask_documents counts documents whose own text holds <|MASK|>. document_lengths maps
    "mean", "p50", ..., "max" to tokens. skipped_locations gives the first places of each reason.
    tokenizer_note says which tokenizer did the work; num_resumed_parts of num_parts were there
    from an interrupted build.
    """

    prefix: str
    num_documents: int
    num_tokens: int
    num_label_tokens: int
    left_out: dict[str, int]
    skipped: dict[str, int]
    document_lengths: dict[str, int]
    seconds: float
    num_mask_documents: int = 0
    skipped_locations: dict[str, list[str]] = field(default_factory=dict)
    tokenizer_note: str = ""
    num_parts: int = 0
    num_resumed_parts: int = 0
    num_resumed_tokens: int = 0
    unseen_columns: dict[str, list[str]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of what was tokenised now; 0 for a reused dataset."""
        made = self.num_tokens - self.num_resumed_tokens
        return made / self.seconds if self.seconds else 0.0

    def format(self) -> str:
        """A readable table, one fact a line."""
        share = 100 * self.num_label_tokens / max(1, self.num_tokens)
        lines = [
            f"{'token files':<16}{self.prefix}.bin .idx .labels.* .turns.* .json",
            f"{'documents':<16}{self.num_documents:,}",
            f"{'tokens':<16}{self.num_tokens:,}",
            f"{'label tokens':<16}{self.num_label_tokens:,} ({share:.1f}%)",
            f"{'document length':<16}"
            + ", ".join(f"{name} {value:,}" for name, value in self.document_lengths.items()),
        ]
        if self.seconds:
            lines.append(
                f"{'time':<16}{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s"
            )
        if self.tokenizer_note:
            lines.append(self.tokenizer_note.replace("tokenizer: ", f"{'tokenizer':<16}", 1))
        if self.num_resumed_parts:
            lines.append(
                f"{'resumed':<16}{self.num_resumed_parts} of {self.num_parts} parts were there"
            )
        if self.num_mask_documents:
            lines.append(
                f"{'warning':<16}{self.num_mask_documents:,} documents hold the text <|MASK|>, "
                "which becomes the mask token itself"
            )
        for number, columns in self.unseen_columns.items():
            if columns:
                lines.append(
                    f"{'warning':<16}none of the records read of dataset {number} has the column "
                    f"{', '.join(columns)}"
                )
        for what, count in sorted(self.left_out.items()):
            lines.append(f"{'left out':<16}{what}, in {count:,} records")
        total = sum(self.skipped.values())
        lines.append(f"{'skipped':<16}{f'{total:,} records' if total else 'none'}")
        for reason, count in sorted(self.skipped.items()):
            places = self.skipped_locations.get(reason, [])
            first = f", first at {', '.join(places)}" if places else ""
            lines.append(f"{'':<16}{count:,} {reason}{first}")
        return "\n".join(lines)


def summarize_dataset(prefix: str | Path) -> BuildSummary:
    """The summary of a tokenized dataset that exists. Raises ValueError when it is damaged."""
    dataset = TokenizedDataset(prefix)
    metadata = dataset.metadata
    return BuildSummary(
        prefix=str(prefix),
        num_documents=metadata.num_documents,
        num_tokens=metadata.num_tokens,
        num_label_tokens=metadata.num_label_tokens,
        num_mask_documents=metadata.num_mask_documents,
        left_out=metadata.left_out,
        unseen_columns=metadata.unseen_columns,
        skipped=metadata.skipped,
        skipped_locations=metadata.skipped_locations,
        document_lengths=_length_figures(dataset.lengths) if len(dataset) else {},
        seconds=0.0,
    )


def _length_figures(lengths: NDArray[np.int32]) -> dict[str, int]:
    """Mean, percentiles and maximum of LENGTHS [N], a piece at a time; exact."""
    counts = np.zeros(1, dtype=np.int64)
    for first in range(0, len(lengths), _CHUNK):
        found = np.bincount(lengths[first : first + _CHUNK])
        counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
        counts[: len(found)] += found
    number = int(counts.sum())
    shown = {"mean": round(int(counts @ np.arange(len(counts))) / number)}
    reached = np.cumsum(counts)
    for percent in _PERCENTILES:
        shown[f"p{percent}"] = int(np.searchsorted(reached, percent / 100 * number))
    shown["max"] = len(counts) - 1
    return shown


def format_fill(
    lengths: NDArray[np.int32], capacities: Sequence[int], block_length: int, truncate_mode: str
) -> str:
    """How documents of LENGTHS pack into rows of each of CAPACITIES, one line per capacity."""
    lines = []
    for capacity in capacities:
        try:
            packed = pack_documents(lengths, capacity, block_length, truncate_mode=truncate_mode)
        except ValueError as error:
            lines.append(f"{f'rows of {capacity}':<16}none: {error}")
            continue
        lines.append(
            f"{f'rows of {capacity}':<16}{len(packed):,} rows, {100 * packed.fill:.2f}% full at "
            f"block_length {block_length}; {packed.num_cut:,} documents cut, "
            f"{packed.num_split:,} split, {packed.num_dropped:,} dropped "
            f"({packed.num_lost_tokens:,} tokens lost)"
        )
    return "\n".join(lines)
