"""Damaged token files of every kind: a named error, never a wrong token."""

import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.indexed_files import GOLDEN_IDX, write_golden, write_plain

from megatron_sdar.data.storage.indexed import IndexedDataset


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"p\.bin: no such file; .* must be the prefix"):
        IndexedDataset(tmp_path / "p")
    (tmp_path / "p.bin").touch()
    with pytest.raises(ValueError, match=r"p\.idx: no such file"):
        IndexedDataset(tmp_path / "p")


def damage(prefix: Path, offset: int, new: bytes) -> None:
    file = Path(f"{prefix}.idx")
    content = bytearray(file.read_bytes())
    content[offset : offset + len(new)] = new
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "new", "message"),
    [
        (0, b"X", "not an index file"),
        (9, struct.pack("<Q", 2), "index version 2 is not supported"),
        (17, b"\x00", "unknown dtype code 0"),
        (17, b"\x09", "unknown dtype code 9"),
        (17, b"\x05", r"g\.bin: 36 bytes, but g\.idx describes 48"),
        (18, struct.pack("<Q", 4), "4 sequences and 4 document indices need"),
        (18, struct.pack("<Q", 2**64 - 1), "need 221360928884514619446 bytes"),
        (26, struct.pack("<Q", 2**63), "document indices need"),
        (46, struct.pack("<q", 4), "the first sequence does not begin at 0"),
        (42, struct.pack("<i", 4), r"g\.bin: 36 bytes, but g\.idx describes 40"),
        (70, struct.pack("<q", 1), "must run from 0 to 3"),
        (94, struct.pack("<q", 2), "must run from 0 to 3"),
    ],
)
def test_damaged_index(tmp_path, offset, new, message):
    write_golden(tmp_path / "g")
    damage(tmp_path / "g", offset, new)
    with pytest.raises(ValueError, match=message) as caught:
        IndexedDataset(tmp_path / "g")
    assert str(tmp_path / "g.") in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "new", "verified", "read"),
    [
        (34, struct.pack("<i", -4), "sequence 0 has a negative length", 0),
        (34, struct.pack("<i", 5), "sequence 1 does not begin", 0),
        (54, struct.pack("<q", 2**62), "sequence 1 does not begin", 1),
        (54, struct.pack("<q", -8), "sequence 1 does not begin", 1),
        (78, struct.pack("<q", 2), "document indices go backwards", None),
    ],
)
def test_damage_inside_the_index_is_found_when_it_is_read_or_verified(
    tmp_path, offset, new, verified, read
):
    write_golden(tmp_path / "g")
    IndexedDataset(tmp_path / "g").verify()
    damage(tmp_path / "g", offset, new)
    dataset = IndexedDataset(tmp_path / "g")
    with pytest.raises(ValueError, match=rf"g\.idx: {verified}.*build it again"):
        dataset.verify()
    if read is not None:
        with pytest.raises(ValueError, match=rf"g\.idx: sequence {read} does not end where"):
            dataset[read]


def test_index_without_document_indices(tmp_path):
    write_plain(tmp_path / "p", ())
    file = tmp_path / "p.idx"
    file.write_bytes(file.read_bytes()[:26] + bytes(8))
    with pytest.raises(ValueError, match="must run from 0 to 0"):
        IndexedDataset(tmp_path / "p")


def test_multimodal_modes_are_refused(tmp_path):
    write_golden(tmp_path / "g")
    with (tmp_path / "g.idx").open("ab") as stream:
        stream.write(bytes(3))
    with pytest.raises(ValueError, match="multimodal modes"):
        IndexedDataset(tmp_path / "g")


@pytest.mark.parametrize("size", range(102))
def test_index_cut_short(tmp_path, size):
    write_golden(tmp_path / "g")
    (tmp_path / "g.idx").write_bytes(GOLDEN_IDX[:size])
    with pytest.raises(ValueError, match=r"g\.idx: .*build it again"):
        IndexedDataset(tmp_path / "g")


@pytest.mark.parametrize("size", [0, 1, 35, 37])
def test_bin_of_the_wrong_size(tmp_path, size):
    write_golden(tmp_path / "g")
    (tmp_path / "g.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"g\.bin: {size} bytes, .* describes 36; .*again"):
        IndexedDataset(tmp_path / "g")


@given(
    changes=st.lists(st.tuples(st.integers(0, 101), st.integers(0, 255)), min_size=1, max_size=4)
)
@settings(max_examples=300, deadline=None)
def test_any_changed_bytes_give_a_value_error_or_the_same_shape(changes):
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "g"
        write_golden(prefix)
        for offset, value in changes:
            damage(prefix, offset, bytes([value]))
        try:
            dataset = IndexedDataset(prefix)
            dataset.verify()
        except ValueError:
            return
        # Only changes that keep the file consistent get here; every token is still readable.
        total = sum(dataset[i].size for i in range(len(dataset)))
        assert total * dataset.dtype.itemsize == 36


@given(
    changes=st.lists(st.tuples(st.integers(0, 101), st.integers(0, 255)), min_size=1, max_size=4)
)
@settings(max_examples=200, deadline=None)
def test_reading_a_damaged_dataset_never_leaves_the_file(changes):
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "g"
        write_golden(prefix)
        for offset, value in changes:
            damage(prefix, offset, bytes([value]))
        try:
            dataset = IndexedDataset(prefix)
            for index in range(len(dataset)):
                assert dataset[index].size == dataset.lengths[index]
        except ValueError as error:
            named = str(prefix) in str(error)
        else:
            named = True
        assert named, "the message must name the file"
