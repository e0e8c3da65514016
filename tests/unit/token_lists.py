"""Tokenised datasets in memory, so that loader tests need no files and no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.loader import RowLoader, RowOptions
from megatron_sdar.data.loading.packing import PackedIndex, pack_documents

MASK_ID, PAD_ID, CUTOFF, BLOCK = 999, 998, 128, 4
OPTIONS = RowOptions(CUTOFF, BLOCK, MASK_ID, PAD_ID, 1e-3, seed=3)


class TokenList:
    """What a TokenizedDataset offers, for documents with turns of the given lengths.

    Ids count through the dataset (modulo 900), so that a wrong slice shows; every second turn
    is an answer and has labels.
    """

    def __init__(self, turns: Sequence[Sequence[int]], name: str = "data") -> None:
        self.prefix = name
        self.metadata = SimpleNamespace(
            mask_token_id=MASK_ID,
            pad_token_id=PAD_ID,
            vocab_size=1000,
            fingerprint=name * 16,
            recipe=SimpleNamespace(
                template={"mask_history": False},
                is_plain_text=False,
                tokenizer_fingerprint="t" * 64,
            ),
        )
        self._turns = [np.array(each, dtype=np.int32) for each in turns]
        self._lengths = np.array([each.sum() for each in self._turns], dtype=np.int32)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self.length_reads = 0

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def lengths(self) -> NDArray[np.int32]:
        self.length_reads += 1
        return self._lengths

    def get(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        start = int(self._starts[index])
        ids = (np.arange(start, start + self._lengths[index]) % 900).astype(np.int32)
        answer = np.repeat(np.arange(len(self._turns[index])) % 2 == 1, self._turns[index])
        return ids, np.where(answer, ids, -100).astype(np.int32)

    def turns(self, index: int) -> NDArray[np.int32]:
        return self._turns[index]


def random_documents(
    num_documents: int = 60, *, longest: int = 60, seed: int = 0, name: str = "data"
) -> TokenList:
    """Documents of one turn, prompt and answer of 3 to `longest` tokens each."""
    rng = np.random.default_rng(seed)
    return TokenList(rng.integers(3, longest + 1, size=(num_documents, 2)).tolist(), name)


def pack(store: DocumentStore, truncate_mode: str = "cut", cutoff_len: int = CUTOFF) -> PackedIndex:
    return pack_documents(
        store.lengths,
        cutoff_len,
        BLOCK,
        truncate_mode=truncate_mode,
        cut_lengths=store.cut_lengths,
    )


def make_loader(
    dataset: TokenList | None = None, options: RowOptions = OPTIONS, **changes: object
) -> RowLoader:
    """A loader over one dataset; 4 micro-batches of one row a step unless told."""
    store = DocumentStore([dataset or random_documents()])
    settings = {"rows_per_micro_batch": 1, "num_micro_batches": 4, "dp_rank": 0, "dp_size": 1}
    return RowLoader(store, pack(store), options, **(settings | changes))


def same(a: object, b: object) -> bool:
    """Equal rows, arrays bit for bit and of the same type."""
    for name, ours in vars(a).items():
        theirs = getattr(b, name)
        if not np.array_equal(ours, theirs) or np.asarray(ours).dtype != np.asarray(theirs).dtype:
            return False
    return True
