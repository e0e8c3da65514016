"""Token files: golden bytes of Megatron-LM's writer, round trips, size, concatenation."""

import hashlib
import resource
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.indexed_files import GOLDEN_IDX, write_golden, write_plain

from megatron_sdar.data.storage.indexed import IndexedDataset, token_dtype
from megatron_sdar.data.storage.indexed_writer import IndexedWriter, concatenate


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


def test_sequences_are_not_copied_again_and_read_only(tmp_path):
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


# Size


def test_a_hundred_million_documents_open_at_once(tmp_path):
    """An index of 2 GB, sparse on disk: opening reads its ends only, and copies nothing."""
    number = 100_000_000
    lengths, pointers, ends = 34, 34 + 4 * number, 34 + 12 * number
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, number, number + 1)
    with (tmp_path / "b.idx").open("wb") as stream:
        stream.truncate(ends + 8 * (number + 1))
        for offset, value in (
            (0, header),
            (lengths + 4 * (number - 1), struct.pack("<i", 3)),
            (ends + 8 * number, struct.pack("<q", number)),
        ):
            stream.seek(offset)
            stream.write(value)
        # Documents before the last two are empty; the last but one has 5 tokens.
        stream.seek(lengths + 4 * (number - 2))
        stream.write(struct.pack("<i", 5))
        stream.seek(pointers + 8 * (number - 1))
        stream.write(struct.pack("<q", 20))
    (tmp_path / "b.bin").write_bytes(np.arange(8, dtype="<i4").tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = IndexedDataset(tmp_path / "b")
    assert len(dataset) == number
    assert dataset[number - 1].tolist() == [5, 6, 7]
    assert dataset[number - 2].tolist() == [0, 1, 2, 3, 4]
    assert dataset[0].size == 0
    assert not dataset[number - 1].flags.owndata, "a sequence is not copied once read"
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 4096, "opening must not read the index"


# Concatenation


@given(
    parts=st.lists(
        st.lists(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=3), max_size=3),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_concatenated_parts_are_the_bytes_of_one_writer(parts):
    with tempfile.TemporaryDirectory() as folder:
        prefixes = [Path(folder) / f"part{i}" for i in range(len(parts))]
        whole = IndexedWriter(Path(folder) / "whole", np.int32)
        for prefix, documents in zip(prefixes, parts, strict=True):
            with IndexedWriter(prefix, np.int32) as writer:
                for document in documents:
                    for target in (writer, whole):
                        for sequence in document:
                            target.add_sequence(np.array(sequence, dtype=np.int32))
                        target.end_document()
        whole.finalize()
        concatenate(prefixes, Path(folder) / "joined", np.int32)
        for suffix in (".bin", ".idx"):
            joined = Path(folder, "joined").with_suffix(suffix).read_bytes()
            assert joined == Path(folder, "whole").with_suffix(suffix).read_bytes()


def test_concatenation_refuses_what_it_cannot_join(tmp_path):
    write_plain(tmp_path / "a")
    write_plain(tmp_path / "b", dtype=np.uint16)
    with pytest.raises(ValueError, match=r"b\.idx: dtype uint16, expected int32"):
        concatenate([tmp_path / "a", tmp_path / "b"], tmp_path / "c", np.int32)
    concatenate([tmp_path / "a"], tmp_path / "c", np.int32)
    with pytest.raises(ValueError, match="exists already"):
        concatenate([tmp_path / "a"], tmp_path / "c", np.int32)
    concatenate([tmp_path / "a", tmp_path / "a"], tmp_path / "c", np.int32, overwrite=True)
    assert len(IndexedDataset(tmp_path / "c")) == 4
    assert not list(tmp_path.glob("*.tmp"))
