"""LLaMA-Factory's tokenized_path: a folder of packed rows, taken apart into documents again.

Owns the layout that `datasets` saves (dataset_dict.json, train/state.json, Arrow streams of int64
lists) and what a packed row means: attention_mask counts its documents 1, 2, 3 ..., position_ids
restart in each, what pads a document to a whole block is trained, the row's tail is not. Documents
come out without either padding, as any other source gives them. Nothing is executed or unpickled.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_sdar.data.readers.tables import checked_batches
from megatron_sdar.diffusion.rows import IGNORED_LABEL
from megatron_sdar.regular_files import read_json

SPLITS_FILE = "dataset_dict.json"
_MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class CachedDocuments:
    """Documents end to end.

    Attributes:
        ids, labels: int32 [N]; labels are the id, or -100.
        lengths: int64 [D], tokens per document.
        turns: int64, lengths of prompts and answers in turn; turn_counts: int64 [D].
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: NDArray[np.int64]
    turns: NDArray[np.int64]
    turn_counts: NDArray[np.int64]


def is_llamafactory_cache(path: str | Path) -> bool:
    """Whether PATH is a folder that LLaMA-Factory wrote as its tokenized_path."""
    return (Path(path) / SPLITS_FILE).is_file()


def cache_files(path: str | Path, split: str = "train") -> list[Path]:
    """The Arrow files of a split, in the order of their rows; [] where there is no such split.

    Raises ValueError, naming the file, when the folder is not what `datasets` saves.
    """
    folder = Path(path)
    splits = _read_json(folder / SPLITS_FILE).get("splits")
    if not isinstance(splits, list) or split not in splits:
        return []
    state_file = folder / split / "state.json"
    listed = _read_json(state_file).get("_data_files")
    names = [entry.get("filename") for entry in listed] if isinstance(listed, list) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{state_file}: _data_files does not list the Arrow files beside it")
    return [folder / split / name for name in names]


def read_cached_documents(
    files: list[Path], pad_token_id: int, vocab_size: int
) -> Iterator[CachedDocuments]:
    """The documents of FILES, some rows at a time.

    Raises ValueError, naming file and row, for rows that are no packed text: lists of unequal
    lengths, ids outside the vocabulary, labels that are neither the id nor -100, media.
    """
    for file in files:
        first_row = 0
        for batch in checked_batches(file):
            if batch.num_rows:
                yield _take_apart(batch, f"{file}: row", first_row, pad_token_id, vocab_size)
            first_row += batch.num_rows


def _take_apart(
    batch: pa.RecordBatch, place: str, first_row: int, pad_token_id: int, vocab_size: int
) -> CachedDocuments:
    columns = {name: batch.column(name) for name in batch.schema.names}
    for name in _MEDIA:
        if name in columns and columns[name].null_count != batch.num_rows:
            raise ValueError(f"{place} {first_row}: it has {name}; only text can be trained")
    ids, starts = _flat("input_ids", columns, place, first_row)
    labels = _flat("labels", columns, place, first_row, starts)[0]
    mask = np.ones_like(ids)
    if "attention_mask" in columns:
        mask = _flat("attention_mask", columns, place, first_row, starts)[0]
    positions = None
    if "position_ids" in columns:
        positions = _flat("position_ids", columns, place, first_row, starts)[0]

    def refuse(wrong: NDArray[np.bool_], what: str) -> None:
        if wrong.any():
            row = int(np.searchsorted(starts, np.argmax(wrong), side="right")) - 1
            raise ValueError(f"{place} {first_row + row}: {what}")

    refuse(
        (ids < 0) | (ids >= vocab_size),
        f"an id is outside the vocabulary of {vocab_size}; the cache was made with another "
        "tokenizer",
    )
    refuse((labels != ids) & (labels != IGNORED_LABEL), "a label is neither its token nor -100")

    begins = np.zeros(len(ids), dtype=np.bool_)
    begins[starts[:-1][starts[:-1] < len(ids)]] = True
    begins[1:] |= mask[1:] != mask[:-1]
    if positions is not None:
        begins |= positions == 0
    firsts = np.flatnonzero(begins)
    ends = np.append(firsts[1:], len(ids))
    # Block padding carries its own id as label; the last token before it ends the document.
    padding = (ids == pad_token_id) & (labels == pad_token_id)
    last = np.maximum.accumulate(np.where(padding, -1, np.arange(len(ids))))
    ends = last[ends - 1] + 1
    # A row's tail: mask 0 with neat_packing; without, single pads that are not trained.
    tail = mask[firsts] == 0
    tail |= (ends - firsts == 1) & (ids[firsts] == pad_token_id) & (labels[firsts] == IGNORED_LABEL)
    kept = (ends > firsts) & ~tail
    firsts, lengths = firsts[kept], (ends - firsts)[kept]
    places = _places(firsts, lengths)
    kept_labels = labels[places].astype(np.int32)
    turns, turn_counts = _turns(kept_labels != IGNORED_LABEL, lengths)
    return CachedDocuments(ids[places].astype(np.int32), kept_labels, lengths, turns, turn_counts)


def _flat(
    name: str,
    columns: dict[str, pa.Array],
    place: str,
    first_row: int,
    expected: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(values of all rows, where each row starts, the end included) of a column of lists."""
    column = columns.get(name)
    if column is None:
        raise ValueError(f"{place} {first_row}: there is no column {name}; is this a cache of SFT?")
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not (is_list and pa.types.is_integer(column.type.value_type)) or column.null_count:
        raise ValueError(f"{place} {first_row}: {name} is {column.type}, not lists of integers")
    offsets = np.asarray(column.offsets, dtype=np.int64)
    flat = column.flatten()
    if flat.null_count:
        raise ValueError(f"{place} {first_row}: {name} has empty values")
    starts = offsets - offsets[0]
    if expected is not None and not np.array_equal(starts, expected):
        raise ValueError(f"{place} {first_row}: {name} is not as long as input_ids")
    return flat.to_numpy(zero_copy_only=False).astype(np.int64, copy=False), starts


def _places(firsts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of all tokens of the documents [first, first + length), in order."""
    shift = np.repeat(firsts - (np.cumsum(lengths) - lengths), lengths)
    return np.arange(int(lengths.sum())) + shift


def _turns(
    trained: NDArray[np.bool_], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(lengths of prompts and answers in turn, how many per document): runs of labels."""
    starts = np.cumsum(lengths) - lengths
    begins = np.zeros(len(trained), dtype=np.bool_)
    begins[1:] = trained[1:] != trained[:-1]
    begins[starts] = True
    groups = np.flatnonzero(begins)
    runs = np.diff(groups, append=len(trained))
    firsts = np.searchsorted(groups, starts)
    counts = np.diff(firsts, append=len(groups))
    # An empty prompt before a document that opens with an answer, an empty answer behind one
    # that closes with a prompt.
    opens = trained[starts].astype(np.int64)
    closes = (counts + opens) % 2
    at = np.concatenate([firsts[opens == 1], (firsts + counts)[closes == 1]])
    return np.insert(runs, at, 0), counts + opens + closes


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content
