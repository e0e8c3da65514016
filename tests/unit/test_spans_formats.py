"""Tables, .csv and compressed files: their records, places, cuts, and how damage is told."""

import csv
import datetime
import gzip
import json
import pickle
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import WHOLE, places, read, values, write, zstd

from megatron_sdar.data.readers import tables
from megatron_sdar.data.readers.records import RecordError, SkipReport
from megatron_sdar.data.readers.spans import count_records, read_file, read_span, split_file
from megatron_sdar.data.readers.streams import ByteStream

RECORDS = [
    {
        "messages": [{"role": "user", "content": "\u00e9" * i}, {"role": "tool", "content": None}],
        "history": [["a", "b"]] * (i % 2),
        "text": f"line {i}",
    }
    for i in range(10)
]
FLAT = [{"a": f"x\n{i}", "b": 'say "hi", \u00e9'} for i in range(4)]
TABLES = ("d.parquet", "d.file.arrow", "d.arrow")


# Tables


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("target", [1, 200, WHOLE])
def test_table_rows_are_what_json_would_hold(tmp_path, name, target):
    file = write(tmp_path / name, RECORDS)
    assert values(file, target) == RECORDS
    assert places(file, target) == list(range(1, 11))
    assert [r.value for r in read_file(file)] == RECORDS
    spans = split_file(file, target)
    assert sum(map(count_records, spans)) == 10
    assert sum(span.num_bytes for span in spans) == file.stat().st_size
    assert sum(record.length for record in read(file, target)) == file.stat().st_size


@pytest.mark.parametrize(("name", "count"), [("d.parquet", 4), ("d.file.arrow", 4), ("d.arrow", 1)])
def test_tables_are_cut_between_their_parts(tmp_path, name, count):
    spans = split_file(write(tmp_path / name, RECORDS, per_part=3), 1)
    assert len(spans) == count
    if count == 4:
        assert [span.first_line for span in spans] == [1, 4, 7, 10]
        assert [count_records(span) for span in spans] == [3, 3, 3, 1]
        assert [r.value for r in read_span(spans[2])] == RECORDS[6:9]
    assert pickle.loads(pickle.dumps(spans)) == spans  # noqa: S301


@pytest.mark.parametrize("name", TABLES)
def test_empty_table(tmp_path, name):
    table = pa.table({"a": pa.array([], pa.string())})
    if name == "d.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        make = pa.ipc.new_file if "file" in name else pa.ipc.new_stream
        with make(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    assert split_file(tmp_path / name, 1) == []
    assert list(read_file(tmp_path / name)) == []


def test_dictionaries_and_long_batches(tmp_path):
    words = [f"w{i % 3}" for i in range(1000)]
    table = pa.table({"a": pa.array(words).dictionary_encode()})
    pq.write_table(table, tmp_path / "d.parquet")
    with pa.ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("d.parquet", "d.arrow"):
        assert [value["a"] for value in values(tmp_path / name)] == words


def test_value_without_a_python_form_is_a_bad_record(tmp_path):
    offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 3)))
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    dates = pa.array([1, 2, 2**62], pa.timestamp("s"))
    for number, column in enumerate((text, dates)):
        file = tmp_path / f"{number}.arrow"
        batch = pa.record_batch([column], names=["a"])
        with pa.ipc.new_stream(str(file), batch.schema) as writer:
            writer.write_batch(batch)
        bad = 1 if column is text else 2
        found = values(file)
        error = found.pop(bad)
        assert isinstance(error, RecordError)
        assert error.location == f"{file}:{bad + 1}"
        assert error.reason == "invalid value"
        assert len(found) == 2
        assert all(isinstance(value, dict) for value in found)
    assert found[0] == {"a": datetime.datetime(1970, 1, 1, 0, 0, 1)}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("keep", [0, 4, 0.5, -1])
def test_truncated_table(tmp_path, name, keep):
    file = write(tmp_path / name, RECORDS)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)] if keep == 0.5 else data[:keep])
    message = rf"{name}: not a readable \.\w+ file: .*; download it or write it again"
    with pytest.raises(ValueError, match=message) as caught:
        read(file)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


def test_stream_cut_between_batches_is_noticed(tmp_path):
    file = write(tmp_path / "d.arrow", RECORDS)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="it does not end as an Arrow stream does"):
        split_file(file, 1)


@pytest.mark.parametrize("name", TABLES)
def test_wrong_magic(tmp_path, name):
    (tmp_path / name).write_text('{"a": "this is a .jsonl file"}\n' * 10)
    with pytest.raises(ValueError, match=f"{name}: not a readable"):
        read(tmp_path / name)


def test_two_columns_of_one_name(tmp_path):
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    with pa.ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r"d\.arrow: not .*: two columns have one name: a, a;"):
        read(tmp_path / "d.arrow")


def test_rows_that_contradict_the_index(tmp_path):
    file = write(tmp_path / "d.parquet", RECORDS, per_part=5)
    spans = split_file(file, 1)
    write(file, RECORDS, per_part=4)
    with pytest.raises(ValueError, match="it has 4 rows where its index says 5"):
        list(read_span(spans[0]))
    write(file, RECORDS, per_part=6)
    with pytest.raises(ValueError, match="it has more than the 5 rows that its index says"):
        list(read_span(spans[0]))


def test_row_counts_in_a_parquet_index_must_agree(tmp_path, monkeypatch):
    file = write(tmp_path / "d.parquet", RECORDS)
    count = pq.ParquetFile(file).metadata.num_rows
    data = file.read_bytes()
    # Thrift writes the number of rows of the file as a zigzag varint behind the schema.
    damaged = None
    for place in range(data.rfind(b"PAR1", 0, 4) + 4, len(data)):
        if data[place] == 2 * count:
            candidate = data[:place] + bytes([2 * count + 2]) + data[place + 1 :]
            file.write_bytes(candidate)
            try:
                if pq.ParquetFile(file).metadata.num_rows == count + 1:
                    damaged = place
                    break
            except (pa.ArrowException, OSError):
                continue
    assert damaged is not None
    with pytest.raises(ValueError, match="its row counts contradict each other"):
        split_file(file, 1)


# CSV


@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.csv.zst"])
def test_csv_rows(tmp_path, name):
    file = write(tmp_path / name, FLAT)
    assert values(file, 1) == FLAT
    assert places(file, 1) == [2, 4, 6, 8]
    (span,) = split_file(file, 1)
    assert count_records(span) == 4
    assert sum(record.length for record in read_span(span)) == span.num_bytes


def test_csv_values_are_text_and_blank_rows_are_no_records(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbf,a\r\n0,1\r\n\r\n1,\r\n")
    assert values(tmp_path / "d.csv") == [{"": "0", "a": "1"}, {"": "1", "a": ""}]
    assert places(tmp_path / "d.csv") == [2, 4]


def test_csv_fields_may_be_longer_than_the_default_of_the_csv_module(tmp_path):
    csv.field_size_limit(131_072)
    records = [{"a": "x" * 200_000}]
    assert values(write(tmp_path / "d.csv", records)) == records


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (b"1", "wrong number of fields", "the row has 1 fields and the header 2"),
        (b"1,2,3", "wrong number of fields", "the row has 3 fields"),
        (b"\xff,2", "invalid UTF-8", "byte 1 of it is 0xff"),
        (b'"a"b,2', "invalid CSV", "',' expected after '\"'"),
        (b"a\rb,2", "invalid CSV", "new-line character seen in unquoted field"),
    ],
)
def test_bad_csv_row_never_hides_the_next(tmp_path, row, reason, detail):
    file = tmp_path / "d.csv"
    file.write_bytes(b"a,b\n0,0\n" + row + b"\n9,9\n")
    first, bad, last = values(file)
    assert (first, last) == ({"a": "0", "b": "0"}, {"a": "9", "b": "9"})
    assert (bad.location, bad.reason) == (f"{file}:3", reason)
    assert detail in str(bad)
    assert count_records(split_file(file, 1)[0]) == 3


def test_csv_quote_that_is_not_closed(tmp_path):
    (tmp_path / "d.csv").write_text('a,b\n0,0\n"1,1\n2,2\n')
    first, bad = values(tmp_path / "d.csv")
    assert first == {"a": "0", "b": "0"}
    assert "d.csv:3: invalid CSV: a quote is opened and not closed before the end" in str(bad)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"d\.csv: the file is empty; a \.csv file begins with a header line"),
        (b"\n\n", r"d\.csv: the file is empty"),
        (b"a,b,a\n1,2,3\n", r"d\.csv:1: the header names 'a' more than once"),
        (b'a,"b\n', r"d\.csv:1: the header cannot be read: invalid CSV: a quote is opened"),
        (b"a,\xff\n", r"d\.csv:1: the header cannot be read: invalid UTF-8: byte 3"),
    ],
)
def test_csv_header(tmp_path, text, message):
    (tmp_path / "d.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        values(tmp_path / "d.csv")
    assert type(caught.value) is ValueError


# Compression


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("inner", ["d.jsonl", "d.json", "d.txt"])
def test_compressed_is_read_like_plain(tmp_path, inner, suffix):
    plain = write(tmp_path / inner, RECORDS)
    packed = write(tmp_path / f"p{inner}{suffix}", RECORDS)
    assert values(packed, 1) == values(plain)
    assert places(packed, 1) == places(plain)
    (span,) = split_file(packed, 1)
    assert count_records(span) == 10
    assert span.num_bytes == packed.stat().st_size
    assert sum(record.length for record in read_span(span)) == span.num_bytes


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_parts_that_were_compressed_one_by_one(tmp_path, suffix, pack):
    lines = [json.dumps(record).encode() + b"\n" for record in RECORDS]
    data = b"".join(map(pack, lines))
    if suffix == ".zst":
        # A frame to be skipped, as parallel compressors write it.
        data = b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab" + data
    (tmp_path / f"d.jsonl{suffix}").write_bytes(data)
    assert values(tmp_path / f"d.jsonl{suffix}") == RECORDS


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.json.zst", "d.csv.gz", "d.txt.zst"])
@pytest.mark.parametrize("keep", [0, 3, 30, -1, -9])
def test_truncated_compressed_file(tmp_path, name, keep):
    file = write(tmp_path / name, FLAT if "csv" in name else RECORDS)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{name}: cannot be decompressed: .*; download or"):
        read(file)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst"])
def test_file_that_is_not_compressed(tmp_path, name):
    (tmp_path / name).write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"does not begin as .* or correct its name if it is not"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst"])
def test_damage_within_compressed_data(tmp_path, name):
    file = write(tmp_path / name, RECORDS)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: cannot be decompressed: "):
        read(file)


def test_an_error_of_the_disk_is_raised_as_it_is(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    table = write(tmp_path / "d.parquet", RECORDS)
    (span,) = split_file(table, WHOLE)
    monkeypatch.setattr(tables, "_open_parquet", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(read_span(span))
    with ByteStream(write(tmp_path / "d.jsonl.zst", RECORDS)) as stream:
        monkeypatch.setattr(stream, "_stream", SimpleNamespace(read=fail, close=lambda: None))
        with pytest.raises(OSError, match="Input/output error"):
            stream.read(1)


# Reports


def test_record_errors_cross_processes_and_reports_merge():
    error = RecordError("d.jsonl:3", "empty answer", "'output' is an empty string")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (str(copy), copy.location, copy.reason) == (str(error), error.location, error.reason)
    first, second = SkipReport(max_locations=3), SkipReport()
    for line in (1, 2):
        first.add(RecordError(f"d:{line}", "a", ""))
        second.add(RecordError(f"d:{line + 2}", "a", ""))
    second.add(RecordError("d:9", "b", ""))
    first.merge(second)
    assert first.counts == {"a": 4, "b": 1}
    assert first.locations == {"a": ["d:1", "d:2", "d:3"], "b": ["d:9"]}
    assert second.locations["a"] == ["d:3", "d:4"]
