"""Token files: golden bytes of Megatron-LM's writer, round trips, damage of every kind."""

import hashlib
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdar.data.tokens import IndexedDataset, IndexedWriter, token_dtype

GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000"
    "0100000000000000"
    "04"
    "0300000000000000"
    "0400000000000000"
    "04000000"
    "02000000"
    "03000000"
    "0000000000000000"
    "1000000000000000"
    "1800000000000000"
    "0000000000000000"
    "0100000000000000"
    "0100000000000000"
    "0300000000000000"
)


def write_golden(prefix: Path) -> None:
    with IndexedWriter(prefix, np.int32) as writer:
        writer.add_sequence([1, 2, 3, 151669])
        writer.end_document()
        writer.end_document()
        writer.add_sequence([10, 11])
        writer.add_sequence([12, 13, 14])
        writer.end_document()


def write_plain(prefix: Path, documents=((1, 2), (3,)), dtype=np.int32) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for tokens in documents:
            writer.add_documents(np.asarray(tokens, dtype=dtype), [len(tokens)])


def test_golden_bytes(tmp_path):
    write_golden(tmp_path / "g")
    index = (tmp_path / "g.idx").read_bytes()
    assert index == GOLDEN_IDX
    assert len(index) == 102
    digest = hashlib.sha256(index).hexdigest()
    assert digest.startswith("694c2ae5")
    assert digest.endswith("09a65d2")
    tokens = [1, 2, 3, 151669, 10, 11, 12, 13, 14]
    assert (tmp_path / "g.bin").read_bytes() == struct.pack("<9i", *tokens)


def test_golden_file_is_read_back(tmp_path):
    write_golden(tmp_path / "g")
    dataset = IndexedDataset(tmp_path / "g")
    assert [dataset[i].tolist() for i in range(len(dataset))] == [
        [1, 2, 3, 151669],
        [10, 11],
        [12, 13, 14],
    ]
    assert dataset.lengths.tolist() == [4, 2, 3]
    assert dataset.lengths.dtype == np.int32
    assert dataset.document_indices.tolist() == [0, 1, 1, 3]


def test_views_are_mapped_and_read_only(tmp_path):
    write_plain(tmp_path / "p")
    view = IndexedDataset(tmp_path / "p")[0]
    assert not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 5


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(512, "uint16"), (65499, "uint16"), (65500, "int32"), (151936, "int32")],
)
def test_token_dtype(vocab_size, name):
    assert token_dtype(vocab_size) == np.dtype(name)


@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 200), max_size=5), max_size=4), max_size=8),
    dtype=st.sampled_from(["u1", "i2", "i4", "i8", "f4", "f8", "u2"]),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(documents, dtype):
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "a.b"
        with IndexedWriter(prefix, dtype) as writer:
            for document in documents:
                for sequence in document:
                    writer.add_sequence(np.asarray(sequence, dtype=dtype))
                writer.end_document()
        dataset = IndexedDataset(prefix)
        ends = dataset.document_indices.tolist()
        found = [
            [dataset[i].tolist() for i in range(start, stop)] for start, stop in pairwise(ends)
        ]
        assert found == documents
        assert dataset.dtype == np.dtype(dtype)


def test_batches_equal_single_documents(tmp_path):
    write_plain(tmp_path / "one", ((1, 2), (), (3, 4, 5)))
    with IndexedWriter(tmp_path / "two", np.int32) as writer:
        writer.add_documents([1, 2, 3, 4, 5], [2, 0, 3])
        assert writer.lengths.tolist() == [2, 0, 3]
    for suffix in (".bin", ".idx"):
        one, two = (Path(f"{tmp_path / name}{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two


@pytest.mark.parametrize("sequences", [0, 2])
def test_empty_bin_file(tmp_path, sequences):
    write_plain(tmp_path / "e", ((),) * sequences)
    assert (tmp_path / "e.bin").stat().st_size == 0
    dataset = IndexedDataset(tmp_path / "e")
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[]] * sequences


@pytest.mark.parametrize("index", [-1, 2])
def test_index_out_of_range(tmp_path, index):
    write_plain(tmp_path / "p")
    with pytest.raises(IndexError, match=f"sequence {index} of 2"):
        IndexedDataset(tmp_path / "p")[index]


# Writing


def write_and_fail(prefix: Path, finalize: bool) -> None:
    with IndexedWriter(prefix, np.int32) as writer:
        writer.add_documents([1], [1])
        assert not Path(f"{prefix}.bin").exists()
        assert not Path(f"{prefix}.idx").exists()
        if finalize:
            writer.finalize()
        raise RuntimeError("stop")


def test_nothing_appears_before_the_end_and_errors_leave_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail(tmp_path / "p", finalize=False)
    assert list(tmp_path.iterdir()) == []


def test_finalized_files_survive_a_later_error(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail(tmp_path / "p", finalize=True)
    assert len(IndexedDataset(tmp_path / "p")) == 1
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_existing_files_are_not_overwritten_silently(tmp_path, suffix):
    existing = tmp_path / f"p{suffix}"
    existing.write_text("mine")
    with pytest.raises(ValueError, match=rf"p\{suffix} exists already; .* overwrite"):
        IndexedWriter(tmp_path / "p", np.int32)
    assert [file.name for file in tmp_path.iterdir()] == [existing.name]
    with IndexedWriter(tmp_path / "p", np.int32, overwrite=True) as writer:
        writer.add_documents([7], [1])
        assert existing.read_text() == "mine"
    assert IndexedDataset(tmp_path / "p")[0].tolist() == [7]


def test_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    writer = IndexedWriter(tmp_path / "p", np.int32)
    (tmp_path / "p.bin").write_text("theirs")
    with pytest.raises(ValueError, match="exists already"), writer:
        writer.add_documents([1], [1])
    assert [file.name for file in tmp_path.iterdir()] == ["p.bin"]
    assert (tmp_path / "p.bin").read_text() == "theirs"


@pytest.mark.parametrize(
    ("dtype", "tokens"), [("u2", [65536]), ("u2", [-100]), ("i4", [2**31]), ("i1", [1.5])]
)
def test_values_that_do_not_fit_are_refused(tmp_path, dtype, tokens):
    with (
        pytest.raises(ValueError, match=r"p\.bin: values from .* do not fit"),
        IndexedWriter(tmp_path / "p", dtype) as writer,
    ):
        writer.add_documents(tokens, [1])
    assert list(tmp_path.iterdir()) == []


def test_bad_writer_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"dtype bool cannot be stored"):
        IndexedWriter(tmp_path / "p", np.bool_)
    with pytest.raises(ValueError, match="must end in a file name"):
        IndexedWriter(f"{tmp_path}/", np.int32)
    with IndexedWriter(tmp_path / "p", np.int32) as writer:
        with pytest.raises(ValueError, match=r"shape \(3,\) given for 2 positions"):
            writer.add_documents([1, 2, 3], [1, 1])
        with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
            writer.add_sequence([[1, 2]])


def test_sequence_beyond_the_format_is_refused(tmp_path):
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (2**31,), (0,))
    with (
        IndexedWriter(tmp_path / "p", np.uint8) as writer,
        pytest.raises(ValueError, match=r"has 2147483648 tokens, over 2\^31-1"),
    ):
        writer.add_sequence(huge)


# Damage


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
        (17, b"\x05", "does not begin where the one before ends"),
        (18, struct.pack("<Q", 4), "4 sequences and 4 document indices need"),
        (18, struct.pack("<Q", 2**64 - 1), "need 221360928884514619446 bytes"),
        (26, struct.pack("<Q", 2**63), "document indices need"),
        (34, struct.pack("<i", -4), "sequence 0 has a negative length"),
        (34, struct.pack("<i", 5), "sequence 1 does not begin"),
        (46, struct.pack("<q", 4), "sequence 0 does not begin"),
        (54, struct.pack("<q", 2**62), "sequence 1 does not begin"),
        (42, struct.pack("<i", 4), r"g\.bin: 36 bytes, but g\.idx describes 40"),
        (70, struct.pack("<q", 1), "must run from 0 to 3"),
        (94, struct.pack("<q", 2), "must run from 0 to 3"),
        (78, struct.pack("<q", 2), "document indices go backwards"),
    ],
)
def test_damaged_index(tmp_path, offset, new, message):
    write_golden(tmp_path / "g")
    damage(tmp_path / "g", offset, new)
    with pytest.raises(ValueError, match=message) as caught:
        IndexedDataset(tmp_path / "g")
    assert str(tmp_path / "g.") in str(caught.value)


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
        except ValueError:
            return
        # Only changes that keep the file consistent get here; every token is still readable.
        total = sum(dataset[i].size for i in range(len(dataset)))
        assert total * dataset.dtype.itemsize == 36
