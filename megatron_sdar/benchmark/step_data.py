"""The documents that the step benchmark trains on: real tokens, fixed noise, a small vocabulary.

Tokens come through the project's own data path. The benchmark's model has fewer tokens than a
real tokenizer, so ids are folded into its vocabulary: lengths and labels stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.building.build_options import BuildOptions
from megatron_sdar.data.building.builder import build_dataset
from megatron_sdar.data.loading.packing import pad_to_block
from megatron_sdar.data.sources.datasets import dataset_from_file
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.templates.template import TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer
from megatron_sdar.diffusion.noise import NoiseDraw, NoiseKey, draw_noise
from megatron_sdar.diffusion.noise_schedule import complement
from megatron_sdar.diffusion.rows import IGNORED_LABEL

NOISE_EPS = 1e-3


@dataclass(frozen=True)
class Document:
    """One document, padded to whole blocks, with its noise.

    Attributes:
        ids, labels: int32 [n]; IGNORED_LABEL marks the prompt.
        noise: the draw that every form trains on; views beyond the first follow from it.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    noise: NoiseDraw

    @property
    def num_labels(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORED_LABEL))

    def views(self, count: int) -> tuple[NoiseDraw, ...]:
        """The noise of one noisy copy, or of a complementary pair of them."""
        assert count in (1, 2)
        mate = complement(self.noise, self.labels != IGNORED_LABEL)
        return (self.noise, mate)[:count]


@dataclass(frozen=True)
class Corpus:
    """Documents, and how many of their tokens had another id in the tokenizer."""

    documents: tuple[Document, ...]
    num_folded: int


def read_corpus(
    file: Path,
    tokenizer: Path,
    work: Path,
    *,
    vocab_size: int,
    block_length: int,
    seed: int,
    max_documents: int,
) -> Corpus:
    """Tokenise the first documents of a file and draw their noise.

    Args:
        file, tokenizer: as tools/preprocess_data.py takes them.
        work: a folder for the token files.
        vocab_size: of the model; its last id is the mask token, no document holds it.
        block_length, seed: of padding and noise.
        max_documents: how many are read.
    """
    build_dataset(
        [dataset_from_file(file)],
        work / "tokens",
        load_tokenizer(tokenizer),
        TemplateOptions(),
        BuildOptions(max_samples=max_documents, progress=False),
    )
    dataset = TokenizedDataset(work / "tokens")
    documents, num_folded = [], 0
    for number in range(len(dataset)):
        ids, labels = pad_to_block(
            *dataset.get(number), block_length, dataset.metadata.pad_token_id
        )
        folded = (ids % (vocab_size - 1)).astype(np.int32)
        num_folded += int(np.count_nonzero(folded != ids))
        trained = labels != IGNORED_LABEL
        noise = draw_noise(NoiseKey(seed, 0), number, trained, NOISE_EPS)
        labels = np.where(trained, folded, np.int32(IGNORED_LABEL)).astype(np.int32)
        documents.append(Document(folded, labels, noise))
    return Corpus(tuple(documents), num_folded)


def save_documents(documents: Sequence[Document], path: Path) -> None:
    """Write them for another process (.npz)."""
    np.savez(
        path,
        lengths=np.array([document.ids.size for document in documents]),
        ids=np.concatenate([document.ids for document in documents]),
        labels=np.concatenate([document.labels for document in documents]),
        masked=np.concatenate([document.noise.masked for document in documents]),
        mask_probs=np.array([document.noise.mask_prob for document in documents]),
    )


def load_documents(path: Path) -> list[Document]:
    """Read what `save_documents` wrote."""
    with np.load(path) as arrays:
        edges = np.cumsum(arrays["lengths"])[:-1]
        ids, labels, masked = (
            np.split(arrays[name], edges) for name in ("ids", "labels", "masked")
        )
        probs = arrays["mask_probs"].tolist()
    return [
        Document(own_ids, own_labels, NoiseDraw(prob, own_masked))
        for own_ids, own_labels, own_masked, prob in zip(ids, labels, masked, probs, strict=True)
    ]
