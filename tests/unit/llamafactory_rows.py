"""Folders as LLaMA-Factory's tokenized_path: rows packed its way, saved as `datasets` saves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

Document = tuple[list[int], list[int]]
COLUMNS = ("input_ids", "attention_mask", "position_ids", "labels")


def packed_row(
    documents: Sequence[Document], length: int, block: int, pad: int, *, neat: bool = True
) -> dict[str, list[int]]:
    """One row: documents padded to whole blocks (trained), then the tail (not trained)."""
    row: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for number, (ids, labels) in enumerate(documents, start=1):
        fill = -len(ids) % block
        size = len(ids) + fill
        row["input_ids"] += [*ids, *[pad] * fill]
        row["labels"] += [*labels, *[pad] * fill]
        row["position_ids"] += range(size)
        row["attention_mask"] += [number if neat else 1] * size
    tail = length - len(row["input_ids"])
    assert tail >= 0
    row["input_ids"] += [pad] * tail
    row["labels"] += [-100] * tail
    row["position_ids"] += [0] * tail
    row["attention_mask"] += [0 if neat else 1] * tail
    return row


def write_cache(
    folder: Path, rows: Sequence[Mapping[str, Any]], *, files: int = 1, validation: bool = False
) -> Path:
    """A cache of ROWS, dealt to FILES Arrow streams in order."""
    train = folder / "train"
    train.mkdir(parents=True)
    splits = ["train", *(["validation"] if validation else [])]
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    if validation:
        (folder / "validation").mkdir()
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "validation/state.json").write_text(json.dumps(state))
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    (train / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_format_type": None})
    )
    size = -(-len(rows) // files)
    for number, name in enumerate(names):
        write_stream(train / name, rows[number * size : (number + 1) * size])
    return folder


def write_stream(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """An Arrow stream of ROWS, two to a record batch, with the empty media columns."""
    table = pa.table({name: [row[name] for row in rows] for name in (rows[0] if rows else ())})
    for name in ("images", "videos", "audios"):
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(rows)))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
