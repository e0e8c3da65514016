"""Damaged files of every format: a record or an error of ours comes out, never anything else.

Bytes of valid files are changed, left out, put in and cut off. What is read must end in bounded
time, and every error must name the file.
"""

import contextlib
import random
import resource
from pathlib import Path

import pytest
from data_files import read, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.readers.spans import count_records, split_file
from megatron_sdar.data.sources.conversations import Layout, read_document
from megatron_sdar.data.sources.datasets import dataset_from_file
from megatron_sdar.data.sources.layouts import OPENAI_TAGS, Columns

RECORDS = [
    {
        "messages": [
            {"role": "user", "content": "q\u00e9" * i},
            {"role": "assistant", "content": None if i % 3 else "a"},
        ],
        "tools": "[]",
    }
    for i in range(1, 8)
]
FLAT = [{"prompt": "q\u00e9\n", "response": 'x"' * i} for i in range(1, 8)]
LINES = [{"text": "\u00e9" * i} for i in range(1, 20)]
NAMES = {
    **dict.fromkeys(("d.jsonl", "d.json", "d.jsonl.gz", "d.json.zst", "d.jsonl.zst"), RECORDS),
    **dict.fromkeys(("d.parquet", "d.file.arrow", "d.arrow"), RECORDS),
    **dict.fromkeys(("d.csv", "d.csv.gz"), FLAT),
    **dict.fromkeys(("d.txt", "d.txt.zst"), LINES),
}
# What hostile lengths and counts would be turned into memory with; address space in use now is
# far below it, so that an allocation of this size fails instead of being made.
MEMORY = 64 << 30


@pytest.fixture(autouse=True)
def _bounded_memory():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutate(data: bytes, seed: int) -> bytes:
    """DATA with one to four damages drawn from SEED."""
    draw = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(damaged) + 1)
        match draw.randrange(6):
            case 0:
                damaged[place : place + 1] = draw.randbytes(1)
            case 1:
                damaged[place : place + 1] = draw.choice([b'"', b"[", b"}", b"\\", b",", b"\n"])
            case 2:
                del damaged[place : place + draw.randint(1, 20)]
            case 3:
                damaged[place:place] = draw.randbytes(draw.randint(1, 8))
            case 4:
                del damaged[place:]
            case 5:
                damaged[place : place + 4] = draw.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0"])
    return bytes(damaged)


def read_all(file: Path) -> int:
    """Read FILE in all ways there are; how many documents came out."""
    found = 0
    try:
        layout = dataset_from_file(file, "pt" if ".txt" in file.name else "sft").layout
    except ValueError as error:
        check(error, file)
        layout = Layout()
    try:
        records = read(file, 64)
        assert len(records) == sum(count_records(span) for span in split_file(file, 64))
    except ValueError as error:
        check(error, file)
        return 0
    for record in records:
        assert record.location.startswith(f"{file}:")
        if isinstance(record.value, RecordError):
            check(record.value, file)
            continue
        try:
            read_document(record.value, layout, record.location)
            found += 1
        except RecordError as error:
            check(error, file)
    return found


def check(error: ValueError, file: Path) -> None:
    """ERROR is one of ours, and one readable line about FILE."""
    assert type(error) in (ValueError, RecordError), repr(error)
    assert str(error).startswith(f"{file}:"), str(error)


@pytest.mark.parametrize("name", NAMES)
@settings(
    max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
@example(seed=47)
def test_damaged_file(tmp_path, name, seed):
    file = write(tmp_path / name, NAMES[name])
    file.write_bytes(mutate(file.read_bytes(), seed))
    read_all(file)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_good_before_they_are_damaged(tmp_path, name):
    expected = sum(1 for r in NAMES[name] if "messages" not in r or r["messages"][1]["content"])
    assert read_all(write(tmp_path / name, NAMES[name])) == expected


@settings(
    max_examples=100, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    record=st.recursive(
        st.none() | st.integers() | st.text(max_size=3) | st.sampled_from(["user", "tool"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "role", "content", "tool_calls", "function", "tools", "prompt"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(lambda value: value if isinstance(value, dict) else {"messages": value}),
    formatting=st.sampled_from(["alpaca", "sharegpt", "openai", "text"]),
)
def test_any_record_is_a_document_or_an_error(record, formatting):
    columns = Columns("prompt", "content", "role", "tools", "messages", "content", "tools")
    layout = Layout(formatting, columns, OPENAI_TAGS)
    with contextlib.suppress(RecordError):
        assert read_document(record, layout, "d:1").location == "d:1"
