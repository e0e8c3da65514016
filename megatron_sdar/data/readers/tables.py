"""Tables: .parquet files, and .arrow files as Hugging Face datasets writes them.

Owns where a table may be cut and how a row becomes a record. Values become what the same record
would hold in JSON; a row that has none is a RecordError. What Arrow says of a damaged file
becomes one ValueError that names it. Pages of a row group, or one record batch, are held.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sdar.data.readers.records import Record, RecordError

_ROWS_AT_ONCE = 256
_BUFFER_BYTES = 2**20
_ARROW_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"

# What a value without a Python form raises: text that is not UTF-8, a date out of range.
_VALUE_ERRORS = (pa.ArrowException, ValueError, OverflowError)


def arrow_kind(file: Path) -> str:
    """arrow_file (with an index of its record batches at the end) or arrow_stream."""
    with file.open("rb") as stream:
        is_file = stream.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    return "arrow_file" if is_file else "arrow_stream"


def iter_sizes(kind: str, file: Path) -> Iterator[int]:
    """Rows of each part that can be read on its own: row group, record batch, or whole stream."""
    with _naming_damage(file):
        if kind == "parquet":
            with _open_parquet(file) as table:
                groups = range(table.num_row_groups)
                sizes = [table.metadata.row_group(group).num_rows for group in groups]
                if sum(sizes) != table.metadata.num_rows or min(sizes, default=0) < 0:
                    raise pa.ArrowInvalid("its row counts contradict each other")
                yield from sizes
        elif kind == "arrow_file":
            with pa.OSFile(str(file)) as source:
                reader = pa.ipc.open_file(source)
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index).num_rows
        else:
            yield sum(batch.num_rows for batch in _stream_batches(file))


def read_table(
    kind: str, file: Path, parts: range, first_row: int, num_rows: int, num_bytes: int
) -> Iterator[Record]:
    """The records of PARTS of FILE: NUM_ROWS from row FIRST_ROW on, NUM_BYTES of the file."""
    row = first_row
    for batch in _batches(kind, file, parts):
        for value in _values(batch):
            done = row - first_row
            if done == num_rows:
                raise _damage(file, f"it has more than the {num_rows} rows that its index says")
            length = num_bytes * (done + 1) // num_rows - num_bytes * done // num_rows
            location = f"{file}:{row}"
            if isinstance(value, Exception):
                value = RecordError(location, "invalid value", str(value))
            yield Record(location, length, value)
            row += 1
    if row - first_row != num_rows:
        raise _damage(file, f"it has {row - first_row} rows where its index says {num_rows}")


def _batches(kind: str, file: Path, parts: range) -> Iterator[pa.RecordBatch]:
    for batch in _raw_batches(kind, file, parts):
        with _naming_damage(file):
            names = batch.schema.names
        if len(set(names)) != len(names):
            raise _damage(file, f"two columns have one name: {', '.join(names)}")
        yield batch


def _raw_batches(kind: str, file: Path, parts: range) -> Iterator[pa.RecordBatch]:
    with _naming_damage(file):
        if kind == "parquet":
            with _open_parquet(file) as table:
                yield from table.iter_batches(_ROWS_AT_ONCE, list(parts), use_threads=False)
        elif kind == "arrow_file":
            with pa.OSFile(str(file)) as source:
                reader = pa.ipc.open_file(source)
                for index in parts:
                    yield reader.get_batch(index)
        else:
            yield from _stream_batches(file)


def _open_parquet(file: Path) -> pq.ParquetFile:
    # Without pre-buffering a column is read page by page and not as a whole.
    return pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def checked_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Every record batch of an Arrow stream; ValueError names a file that is damaged."""
    with _naming_damage(file):
        for batch in _stream_batches(file):
            batch.validate(full=True)
            yield batch


def _stream_batches(file: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(file)) as source:
        size = source.size()
        source.seek(max(0, size - len(_END_OF_STREAM)))
        # A stream that is cut off between two batches reads like a whole one.
        if source.read() != _END_OF_STREAM:
            raise pa.ArrowInvalid("it does not end as an Arrow stream does")
        source.seek(0)
        yield from pa.ipc.open_stream(source)


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    """The rows of BATCH as objects; of one that cannot be converted, why."""
    try:
        # Arrow itself trusts offsets within a batch; Python conversion would follow them.
        batch.validate(full=True)
    except pa.ArrowInvalid:
        yield from (_value(batch.slice(row, 1)) for row in range(batch.num_rows))
        return
    for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
        rows = batch.slice(start, _ROWS_AT_ONCE)
        try:
            values = rows.to_pylist()
        except _VALUE_ERRORS:
            yield from (_value(rows.slice(row, 1)) for row in range(rows.num_rows))
        else:
            yield from values


def _value(row: pa.RecordBatch) -> dict[str, Any] | Exception:
    try:
        row.validate(full=True)
        return row.to_pylist()[0]
    except _VALUE_ERRORS as error:
        return error


@contextmanager
def _naming_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _damage(file, str(error)) from error
    except OSError as error:
        # Arrow reports damaged data as an OSError too, but without an error number.
        if error.errno is not None:
            raise
        raise _damage(file, str(error)) from error


def _damage(file: Path, what: str) -> ValueError:
    what = " ".join(what.split())
    return ValueError(
        f"{file}: not a readable {file.suffix} file: {what}; download it or write it again"
    )
