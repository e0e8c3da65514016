"""The published data path (LLaMA-Factory 0.9.4 as forked for SDAR): samples and packed rows.

For parity only: its truncation cuts to a length that block padding then overshoots, so that long
samples are lost, and it packs 1000 samples of one worker at a time. Same rows, in the same
order, with the same contents; nothing here is repaired. `packing.py` is what trains by default.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sdar.data.loading.truncation import infer_seqlen
from megatron_sdar.diffusion.rows import IGNORED_LABEL

_IntArray = NDArray[np.int32]
_Pair = tuple[Sequence[int], Sequence[int]]


class PackedRow(NamedTuple):
    """One packed row, all int32 [cutoff_len]; at least the last position is padding."""

    input_ids: _IntArray
    labels: _IntArray
    position_ids: _IntArray
    attention_mask: _IntArray


def greedy_knapsack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """LENGTHS divided into sacks of at most CAPACITY: always the largest that still fits.

    Raises ValueError for a length that no sack can hold.
    """
    return [[lengths[index] for index in sack] for sack in knapsack_indices(lengths, capacity)]


def knapsack_indices(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """`greedy_knapsack` as positions in LENGTHS; of equal lengths the last one goes first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = [lengths[index] for index in order]
    if sizes and not 0 < sizes[0] <= sizes[-1] <= capacity:
        raise ValueError(
            f"lengths must be in 1..{capacity} (the capacity of a row), got {sizes[0]} to "
            f"{sizes[-1]}; leave longer samples out first"
        )
    sacks: list[list[int]] = []
    while sizes:
        sack: list[int] = []
        remaining = capacity
        while index := bisect_right(sizes, remaining):
            remaining -= sizes.pop(index - 1)
            sack.append(order.pop(index - 1))
        sacks.append(sack)
    return sacks


def supervised_sample(
    pairs: Sequence[_Pair],
    *,
    cutoff_len: int,
    truncate_mode: str,
    packing: bool,
    block_length: int,
    pad_token_id: int,
    mask_history: bool = False,
    train_on_prompt: bool = False,
) -> tuple[_IntArray, _IntArray] | None:
    """(ids, labels) int32 of the (prompt ids, answer ids) PAIRS, or None where they are dropped.

    With PACKING the room is CUTOFF_LEN - 1. "cut" shortens turn by turn, "drop" takes turns
    whole; both stop when the room is used up exactly, which loses later turns without a word.
    The block padding, trained, comes last and is what drops a sample that was cut to the room.
    """
    if truncate_mode not in ("cut", "drop"):
        raise ValueError(f"truncate_mode must be 'cut' or 'drop', got {truncate_mode!r}")
    room = cutoff_len - 1 if packing else cutoff_len
    total = 0
    ids: list[_IntArray] = []
    labels: list[_IntArray] = []
    for turn, (source, target) in enumerate(pairs[::-1] if mask_history else pairs):
        if total >= room:
            break
        source_len, target_len = len(source), len(target)
        if truncate_mode == "cut":
            source_len, target_len = infer_seqlen(source_len, target_len, room - total)
        total += source_len + target_len
        source_ids = np.asarray(source[:source_len], dtype=np.int32)
        target_ids = np.asarray(target[:target_len], dtype=np.int32)
        ids.append(np.concatenate([source_ids, target_ids]))
        source_labels = source_ids if train_on_prompt else _ignored(source_len)
        target_labels = _ignored(target_len) if mask_history and turn else target_ids
        labels.append(np.concatenate([source_labels, target_labels]))
    padding = np.full(-total % block_length, pad_token_id, dtype=np.int32)
    if total + len(padding) > room:
        return None
    direction = -1 if mask_history else 1
    return (
        np.concatenate([*ids[::direction], padding]),
        np.concatenate([*labels[::direction], padding]),
    )


def packed_rows(
    samples: Sequence[tuple[_IntArray, _IntArray] | None],
    cutoff_len: int,
    *,
    pad_token_id: int,
    neat_packing: bool = True,
    batch_size: int = 1000,
    num_workers: int = 1,
) -> list[PackedRow]:
    """The rows of CUTOFF_LEN tokens that SAMPLES (None: dropped) are packed into.

    Without NEAT_PACKING the attention mask does not tell the samples of a row apart.
    """
    lengths = [0 if sample is None else len(sample[0]) for sample in samples]
    row_offsets, doc_ids = pack_like_llamafactory(
        lengths, cutoff_len, num_workers=num_workers, batch_size=batch_size
    )
    rows = []
    for start, stop in pairwise(row_offsets.tolist()):
        row = PackedRow(
            input_ids=np.full(cutoff_len, pad_token_id, dtype=np.int32),
            labels=_ignored(cutoff_len),
            position_ids=np.zeros(cutoff_len, dtype=np.int32),
            attention_mask=np.full(cutoff_len, 0 if neat_packing else 1, dtype=np.int32),
        )
        begin = 0
        for number, index in enumerate(doc_ids[start:stop].tolist(), start=1):
            sample = samples[index]
            assert sample is not None
            place = slice(begin, begin + lengths[index])
            row.input_ids[place], row.labels[place] = sample
            row.position_ids[place] = np.arange(lengths[index])
            if neat_packing:
                row.attention_mask[place] = number
            begin = place.stop
        rows.append(row)
    return rows


def pack_like_llamafactory(
    sample_lengths: ArrayLike, cutoff_len: int, *, num_workers: int = 1, batch_size: int = 1000
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row offsets int64 [R+1], sample numbers int64): the published rows, in published order.

    SAMPLE_LENGTHS [N] count the block padding; 0 is a dropped sample, which still takes its place
    in a batch. Each of NUM_WORKERS takes a contiguous share, and each BATCH_SIZE samples of a
    share are packed on their own into CUTOFF_LEN - 1 positions, one padding position being kept.
    """
    lengths = np.asarray(sample_lengths, dtype=np.int64)
    doc_ids: list[int] = []
    row_lengths: list[int] = []
    for start, stop in _batches(len(lengths), num_workers, batch_size):
        kept = start + np.flatnonzero(lengths[start:stop])
        numbers = kept.tolist()
        for sack in knapsack_indices(lengths[kept].tolist(), cutoff_len - 1):
            doc_ids += [numbers[index] for index in sack]
            row_lengths.append(len(sack))
    row_offsets = np.zeros(len(row_lengths) + 1, dtype=np.int64)
    np.cumsum(row_lengths, out=row_offsets[1:])
    return row_offsets, np.asarray(doc_ids, dtype=np.int64)


def _batches(num_samples: int, num_workers: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each batch, as datasets.map divides rows over its processes."""
    if num_workers < 1 or batch_size < 1:
        raise ValueError(
            "preprocessing_num_workers and preprocessing_batch_size must be at least 1, got "
            f"{num_workers} and {batch_size}"
        )
    num_shares = max(min(num_workers, num_samples), 1)
    size, rest = divmod(num_samples, num_shares)
    start = 0
    for share in range(num_shares):
        end = start + size + (share < rest)
        for begin in range(start, end, batch_size):
            yield begin, min(begin + batch_size, end)
        start = end


def _ignored(length: int) -> _IntArray:
    return np.full(length, IGNORED_LABEL, dtype=np.int32)
