"""A tokenized dataset: ids, labels and turns of every document, and a JSON of what they are.

PREFIX holds ids, PREFIX.labels what is trained on, PREFIX.turns the lengths of each document's
prompts and answers, all in Megatron-LM's format with one sequence per document. PREFIX.json is
written last: its presence means that the build is complete.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.storage.indexed import IndexedDataset
from megatron_sdar.data.storage.metadata import TokenizedMetadata, metadata_path, read_metadata
from megatron_sdar.diffusion.rows import IGNORED_LABEL

_CHUNK = 1 << 20
COMPANIONS = ("", ".labels", ".turns")


class TokenizedDataset:
    """Documents with labels and turns at PREFIX, mapped into memory.

    Opening takes the same time for every size. `lengths` is int32 [N], tokens per document, a
    view of the file. Raises ValueError when the files do not belong together or the metadata is
    missing, which means that a build did not finish.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.metadata: TokenizedMetadata = read_metadata(prefix)
        self._parts = [IndexedDataset(f"{prefix}{suffix}") for suffix in COMPANIONS]
        self._tokens, self._labels, self._turns = self._parts
        for part in self._parts:
            if part.dtype.kind not in "iu":
                raise ValueError(f"{part.prefix}.idx: dtype {part.dtype} is not an integer one")
            if not len(part) == len(part.document_indices) - 1 == self.metadata.num_documents:
                raise self._mismatch(
                    f"{part.prefix}.idx has {len(part)} sequences in "
                    f"{len(part.document_indices) - 1} documents, "
                    f"{metadata_path(prefix).name} counts {self.metadata.num_documents}"
                )
        for part in (self._tokens, self._labels):
            if part.num_tokens != self.metadata.num_tokens:
                raise self._mismatch(
                    f"{part.bin_path} has {part.num_tokens} tokens, "
                    f"{metadata_path(prefix).name} counts {self.metadata.num_tokens}"
                )

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of every document, int32 [N]; a view of the file, not aligned to 4 bytes."""
        return self._tokens.lengths

    def __len__(self) -> int:
        return len(self._tokens)

    def verify(self) -> None:
        """Check every index entry. Raises ValueError naming the first that is wrong."""
        for part in self._parts:
            part.verify()
            each = part.document_indices
            for first in range(0, len(each), _CHUNK):
                chunk = each[first : first + _CHUNK]
                if not np.array_equal(chunk, np.arange(first, first + len(chunk))):
                    raise self._mismatch(f"{part.prefix}.idx: not one sequence per document")
        for first in range(0, len(self), _CHUNK):
            span = slice(first, first + _CHUNK)
            if not np.array_equal(self._tokens.lengths[span], self._labels.lengths[span]):
                raise self._mismatch("tokens and labels differ in length")

    def get(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(ids, labels) of document INDEX, int32 [lengths[INDEX]] each; read-only views.

        Ids are copied when they are stored as uint16. Labels are the id where it is trained on
        and -100 elsewhere. Raises ValueError when a label is neither or an id is outside the
        vocabulary.
        """
        ids = self._tokens[index].astype(np.int32, copy=False)
        labels = self._labels[index].astype(np.int32, copy=False)
        if len(ids) != len(labels) or not ((labels == ids) | (labels == IGNORED_LABEL)).all():
            raise ValueError(
                f"{self.prefix}.labels.bin: document {index} has a label that is neither its "
                "token nor -100; build the dataset again"
            )
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.metadata.vocab_size:
            raise ValueError(
                f"{self.prefix}.bin: document {index} has an id outside the vocabulary of "
                f"{self.metadata.vocab_size}; build the dataset again"
            )
        return ids, labels

    def turns(self, index: int) -> NDArray[np.int32]:
        """[prompt, answer, prompt, answer, ...] lengths in tokens of document INDEX, int32.

        Raises ValueError when they do not add up to the document.
        """
        turns = self._turns[index].astype(np.int32, copy=False)
        if len(turns) % 2 or turns.sum() != self._tokens.lengths[index] or turns.min() < 0:
            raise ValueError(
                f"{self.prefix}.turns.bin: the turns of document {index} do not add up to its "
                "tokens; build the dataset again"
            )
        return turns

    def _mismatch(self, what: str) -> ValueError:
        return ValueError(
            f"{self.prefix}: {what}; the files do not belong together: build the dataset again"
        )
