"""Writers of small data files in every format, for the tests of their readers."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sdar.data.readers.records import Record
from megatron_sdar.data.readers.spans import read_span, split_file

WHOLE = 10**12


def read(file: Path, target_bytes: int = WHOLE) -> list[Record]:
    """All records of FILE by way of its spans."""
    return [record for span in split_file(file, target_bytes) for record in read_span(span)]


def values(file: Path, target_bytes: int = WHOLE) -> list[Any]:
    """The values of all records of FILE."""
    return [record.value for record in read(file, target_bytes)]


def places(file: Path, target_bytes: int = WHOLE) -> list[int]:
    """The line or row of all records of FILE; every one names FILE."""
    found = [record.location.rpartition(":") for record in read(file, target_bytes)]
    assert all(name == str(file) for name, _, _ in found)
    return [int(line) for _, _, line in found]


def zstd(data: bytes) -> bytes:
    """DATA as one Zstandard frame."""
    return pa.compress(data, codec="zstd", asbytes=True)


def write(file: Path, records: list[dict[str, Any]], per_part: int = 3) -> Path:
    """Write RECORDS in the format that FILE's suffix says; tables in parts of PER_PART rows."""
    suffixes = file.name.split(".", 1)[1]
    if suffixes.endswith((".gz", ".zst")):
        inner = write(file.with_suffix(""), records)
        data = inner.read_bytes()
        inner.unlink()
        file.write_bytes(gzip.compress(data) if suffixes.endswith(".gz") else zstd(data))
    elif suffixes == "jsonl":
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.write_text("".join(lines), encoding="utf-8")
    elif suffixes == "json":
        file.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    elif suffixes == "txt":
        file.write_text("".join(f"{record['text']}\n" for record in records), encoding="utf-8")
    elif suffixes == "csv":
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(records[0])
            writer.writerows(record.values() for record in records)
    elif suffixes == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file, row_group_size=per_part)
    else:
        table = pa.Table.from_pylist(records)
        # As saved by a person (.file.arrow), or as Hugging Face datasets streams it.
        make = pa.ipc.new_file if suffixes == "file.arrow" else pa.ipc.new_stream
        with make(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=per_part)
    return file
