"""Text files cut into spans: nothing lost, nothing twice, every record with its exact place."""

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from data_files import WHOLE, places, read, values, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sdar.data.readers import json_list, line_files, streams
from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.readers.spans import (
    count_records,
    data_suffix,
    read_file,
    read_span,
    split_file,
)

PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.sampled_from('ab"\\{}[],: \u00e9\u2028\U0001f600'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=12)
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n"])
TARGETS = st.sampled_from([1, 2, 7, 40, 200, WHOLE])


def check_spans(file: Path, target_bytes: int) -> None:
    """Spans of FILE follow each other, and give what reading it from the start gives."""
    spans = split_file(file, target_bytes)
    assert spans == split_file(file, target_bytes)
    for before, after in pairwise(spans):
        assert before.stop <= after.start
        assert before.first_line <= after.first_line
    whole = [(r.location, str(r.value)) for r in read_file(file)]
    assert [(r.location, str(r.value)) for r in read(file, target_bytes)] == whole
    for span in spans:
        assert count_records(span) == len(list(read_span(span)))
    assert bool(spans) or not whole


@PROPERTY
@given(RECORDS, LINE_ENDS, st.booleans(), st.booleans(), TARGETS)
def test_lines(tmp_path, records, line_end, bom, closed, target):
    text = line_end.join(json.dumps(record, ensure_ascii=False) for record in records)
    text = "\ufeff" * bom + text + line_end * closed
    (tmp_path / "d.jsonl").write_bytes(text.encode())
    check_spans(tmp_path / "d.jsonl", target)
    assert values(tmp_path / "d.jsonl", target) == records
    step = line_end.count("\n")
    assert places(tmp_path / "d.jsonl", target) == [1 + step * i for i in range(len(records))]


@PROPERTY
@given(RECORDS, st.sampled_from([None, 0, 2]), st.booleans(), st.booleans(), TARGETS)
def test_list(tmp_path, records, indent, bom, ascii_only, target):
    text = "\ufeff" * bom + "\n" + json.dumps(records, ensure_ascii=ascii_only, indent=indent)
    (tmp_path / "d.json").write_bytes(text.encode() + b"\r\n")
    check_spans(tmp_path / "d.json", target)
    assert values(tmp_path / "d.json", target) == records


@PROPERTY
@given(st.lists(TEXT), st.booleans(), TARGETS)
def test_text_documents(tmp_path, lines, closed, target):
    (tmp_path / "d.txt").write_bytes(("\r\n".join(lines) + "\n" * closed).encode())
    check_spans(tmp_path / "d.txt", target)
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip(" ")]
    assert values(tmp_path / "d.txt", target) == [{"text": line} for _, line in kept]
    assert places(tmp_path / "d.txt", target) == [number for number, _ in kept]


def test_spans_have_about_the_size_that_is_asked_for(tmp_path):
    records = [{"text": "x" * 80}] * 1000
    for name in ("d.jsonl", "d.json"):
        file = write(tmp_path / name, records)
        spans = split_file(file, 9000)
        assert len(spans) == pytest.approx(file.stat().st_size / 9000, rel=0.1)
        assert all(span.num_bytes < 9200 for span in spans)
    assert [s.first_line for s in split_file(tmp_path / "d.jsonl", 9000)][:3] == [1, 98, 195]


@pytest.mark.parametrize("size", [1, 3, 10, 14, 2**20])
@pytest.mark.parametrize(("target", "lines_per_span"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_lines_across_the_edges_of_the_buffer(tmp_path, monkeypatch, size, target, lines_per_span):
    monkeypatch.setattr(line_files, "_CHUNK_BYTES", size)
    file = tmp_path / "d.txt"
    file.write_bytes(b"".join(b"line %04d\n" % number for number in range(1, 8)))
    spans = split_file(file, target)
    firsts = list(range(1, 8, lines_per_span))
    assert [span.first_line for span in spans] == firsts
    assert [span.start for span in spans] == [10 * (first - 1) for first in firsts]
    assert [record.value["text"] for record in read(file, target)] == [
        f"line {number:04}" for number in range(1, 8)
    ]
    assert places(file, target) == list(range(1, 8))


def test_list_elements_keep_the_line_they_begin_in(tmp_path):
    text = '\ufeff\n[\n  {"a": "\u00e9"},\n\n {"a": "b",\n "c": "2"}, {"d":\n{}}, 3]\n'
    (tmp_path / "d.json").write_text(text, encoding="utf-8")
    for target in (1, WHOLE):
        assert places(tmp_path / "d.json", target) == [3, 5, 6, 7]
        *good, bad = values(tmp_path / "d.json", target)
        assert good == [{"a": "\u00e9"}, {"a": "b", "c": "2"}, {"d": {}}]
        assert isinstance(bad, RecordError)
        assert str(bad).startswith(f"{tmp_path}/d.json:7: not an object: ")


def test_json_suffix_with_lines_is_read_as_lines(tmp_path):
    (tmp_path / "d.json").write_text(" " * 2**21 + '\n{"a": 1}\n{"b": 2}')
    assert values(tmp_path / "d.json") == [{"a": 1}, {"b": 2}]
    assert places(tmp_path / "d.json", 1) == [2, 3]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt"])
def test_empty_file_has_no_spans(tmp_path, name):
    (tmp_path / name).write_text("")
    assert split_file(tmp_path / name, 1) == []
    (tmp_path / name).write_text("\ufeff\n \n")
    assert read(tmp_path / name, 1) == []


def test_empty_list_has_no_spans(tmp_path):
    (tmp_path / "d.json").write_text(" [ ] \n")
    assert split_file(tmp_path / "d.json", 1) == []
    assert list(read_file(tmp_path / "d.json")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}\n,{"a" 1}]', "2: invalid JSON: Expecting ':' delimiter"),
        ('[{"a": 1}\n{"a": 1}]', "2: invalid JSON: ',' or ']' expected after a record"),
        ('[{"a": 1},\n]', "2: invalid JSON: Expecting value"),
        ('[{"a": 1}', "1: invalid JSON: ',' or ']' expected after a record"),
        ('[{"a": 1},\n{"a": "x', "2: invalid JSON: Unterminated string"),
        ('[{"a": 1},\n{"a":\n tru]', "3: invalid JSON: Expecting value"),
        ('[{"a": 1}},\n{"a": 1}]', "1: invalid JSON: ',' or ']' expected"),
        ('[{"a": 1\n]', "2: invalid JSON: Expecting ',' delimiter"),
        ("[", "1: invalid JSON: Expecting value"),
        ("[]\n[]", "2: invalid JSON: text after the closing ']'"),
        ('[\n{"a": ' + "[" * 100_000, "2: invalid JSON: a record has more levels"),
        ('[\n{"a": ' + "1" * 5000 + "}]", "2: invalid JSON: Exceeds the limit"),
    ],
)
def test_damaged_list(tmp_path, text, message):
    file = tmp_path / "d.json"
    file.write_text(text)
    for records in (lambda: split_file(file, 1), lambda: list(read_file(file))):
        with pytest.raises(ValueError, match="the rest of a damaged list cannot be read") as caught:
            records()
        assert str(caught.value).startswith(f"{file}:{message}")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_list_elements_across_the_edges_of_the_buffer(tmp_path, monkeypatch, size):
    monkeypatch.setattr(json_list, "_CHUNK_BYTES", size)
    records = [{"a": ['x"\\', -12.5e3, None, True]}, {}, {"\u00e9": {"b": "\u2028" * 9}}]
    (tmp_path / "d.json").write_text(json.dumps([*records, 12345]), encoding="utf-8")
    *good, last = values(tmp_path / "d.json", 1)
    assert good == records
    assert "got int" in str(last)
    (tmp_path / "d.json").write_text('[{"a": "x", b}]')
    with pytest.raises(ValueError, match="1: invalid JSON: Expecting property name"):
        split_file(tmp_path / "d.json", 1)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b"{", "invalid JSON", "column 2"),
        (b'{"a": "x}', "invalid JSON", "Unterminated string"),
        (b'{"a": ' + b"1" * 5000 + b"}", "invalid JSON", "Exceeds the limit"),
        (b"[" * 100_000, "nested too deep", "more levels"),
        (b'{"output": "\xff"}', "invalid UTF-8", "byte 13 of it is 0xff"),
        (b"[1]", "not an object", "got list"),
    ],
)
def test_bad_line_never_hides_the_next(tmp_path, line, reason, detail):
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    for target in (1, WHOLE):
        first, bad, last = values(file, target)
        assert (first, last) == ({"a": 1}, {"a": 2})
        assert isinstance(bad, RecordError)
        assert (bad.location, bad.reason) == (f"{file}:2", reason)
        assert detail in str(bad)


def test_invalid_utf8_in_a_list_and_in_text(tmp_path):
    (tmp_path / "d.json").write_bytes(b'[\n{"a": "\xff"},\n{"a": 1}]')
    bad, good = values(tmp_path / "d.json", 1)
    assert str(bad).startswith(f"{tmp_path}/d.json:2: invalid UTF-8: byte 8 of it is 0xff")
    assert good == {"a": 1}
    (tmp_path / "d.txt").write_bytes(b"a\n\xfe\nb")
    first, bad, last = values(tmp_path / "d.txt", 1)
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    assert str(bad).startswith(f"{tmp_path}/d.txt:2: invalid UTF-8: byte 1 of it is 0xfe")


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt", "d.json", "d.csv"])
def test_absurdly_long_record_is_never_held(tmp_path, monkeypatch, name):
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 2**20)
    monkeypatch.setattr(streams, "_BUFFER_BYTES", 2**16)
    monkeypatch.setattr(json_list, "_CHUNK_BYTES", 2**16)
    file = tmp_path / name
    short, long = {"text": "a" * 100}, {"text": "b" * (1 << 24)}
    write(file, [short, long, short])
    spans = split_file(file, WHOLE) if name != "d.json" else []
    tracemalloc.start()
    try:
        if name == "d.json":
            with pytest.raises(ValueError, match="a record has more than 1048576 bytes, or a quo"):
                split_file(file, WHOLE)
        else:
            first, bad, last = (r.value for span in spans for r in read_span(span))
            assert first == last == short
            assert bad.reason == "line too long"
            assert "at most 1048576" in str(bad)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20
    (tmp_path / "end.jsonl").write_bytes(b"x" * (1 << 21))
    assert [r.value.reason for r in read(tmp_path / "end.jsonl")] == ["line too long"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt", "d.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(streams, "_BUFFER_BYTES", 2**16)
    for module in (json_list, line_files):
        monkeypatch.setattr(module, "_CHUNK_BYTES", 2**16)
    file = write(tmp_path / name, [{"text": f"{i} " + "x" * 100} for i in range(25_000)])
    tracemalloc.start()
    try:
        spans = split_file(file, 2**18)
        assert sum(1 for span in spans for _ in read_span(span)) == 25_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert file.stat().st_size > 5 << 19


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.b.jsonl", ".jsonl"),
        ("a.json.gz", ".json"),
        ("a.csv.zst", ".csv"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.tsv", None),
        ("a", None),
    ],
)
def test_which_files_are_data(name, suffix):
    assert data_suffix(Path(name)) == suffix
