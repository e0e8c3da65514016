"""Small indexed datasets that the tests of the format share."""

from pathlib import Path

import numpy as np

from megatron_sdar.data.storage.indexed_writer import IndexedWriter

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
