"""Evaluation sets: named documents that are never trained, cut and padded as training does it.

They come from val_size, from eval_dataset (tokenised like dataset) or from token files. Every
rank opens the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import SdarConfig
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.packing import pack_documents
from megatron_sdar.data.loading.row_stream import RowPart, RowStream
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.data import TrainingDocuments, describe_truncation
from megatron_sdar.training.row_settings import row_options
from megatron_sdar.training.token_files import check_token_files, make_evaluation_files

HELD_OUT = "validation"


@dataclass(frozen=True)
class EvaluationSet:
    """Documents under one name; `items` are (document id, piece) in order, each once."""

    name: str
    stream: RowStream
    items: tuple[tuple[int, int], ...]

    @property
    def store(self) -> DocumentStore:
        return self.stream.parts[0].store

    def tokens(
        self, item: tuple[int, int], block_length: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """ids and labels of an item, truncated as in training and padded to whole blocks."""
        return self.stream.tokens(0, *item, block_length)


def prepare_evaluation_sets(
    config: SdarConfig,
    arch: Architecture,
    mesh: ParallelMesh,
    documents: TrainingDocuments | None,
    say: Callable[[str], None],
) -> list[EvaluationSet]:
    """Open (and on rank 0 tokenise) what the configuration evaluates on.

    Args:
        documents: what is trained, with what val_size holds out; None: nothing is.
        say: called on rank 0 with lines for the user.

    Raises:
        ValueError: unreadable data; token files that do not fit the run's; two sets of one name.

    Collective: broadcast_object_list (world).
    """
    evaluation = config.evaluation
    stores: list[tuple[str, DocumentStore]] = []
    if documents is not None and documents.validation is not None:
        stores.append((HELD_OUT, documents.validation))
    prefixes = list(evaluation.eval_data_path)
    if prefixes:
        run_on_main(lambda: check_token_files(prefixes, config, say, "eval_data_path"), mesh)
    if evaluation.eval_dataset:
        prefixes += run_on_main(lambda: make_evaluation_files(config, say), mesh)
    trained = () if documents is None else documents.train[0].datasets
    for prefix in prefixes:
        dataset = TokenizedDataset(prefix)
        DocumentStore([*trained, dataset])  # refuses what another tokenizer made
        stores.append((_set_name(prefix), DocumentStore([dataset])))
    names = [name for name, _ in stores]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"two evaluation sets are called {twice!r}; give their files (eval_data_path, "
            "eval_dataset) different names"
        )
    sets = [evaluation_set(name, store, config, arch) for name, store in stores]
    for each in sets:
        index = each.stream.parts[0].index
        text = f"evaluation set {each.name}: {index.doc_ids.size:,} documents"
        say("; ".join([text, *describe_truncation(index, config.data.cutoff_len)]))
    return sets


def evaluation_set(
    name: str, store: DocumentStore, config: SdarConfig, arch: Architecture
) -> EvaluationSet:
    """The documents of a store as they are evaluated, eval_max_documents of them at most.

    Raises:
        ValueError: truncation leaves none.
    """
    assert arch.block_size is not None, "validated"
    most = config.evaluation.eval_max_documents
    if most is not None and most < len(store):
        store = store.select(store.ids_at(np.arange(most)))
    try:
        index = pack_documents(
            store.lengths,
            config.data.cutoff_len,
            arch.block_size,
            truncate_mode=config.data.truncate_mode or store.truncate_mode,
            cut_lengths=store.cut_lengths,
        )
    except ValueError as error:
        raise ValueError(f"evaluation set {name}: {error}") from error
    options = row_options(config, arch, store.datasets[0].metadata.pad_token_id, rows_per_step=1)
    pieces = np.zeros_like(index.doc_ids) if index.pieces is None else index.pieces
    ids = store.ids_at(index.doc_ids.astype(np.int64))
    items = sorted(zip(ids.tolist(), pieces.tolist(), strict=True))
    return EvaluationSet(name, RowStream([RowPart(store, index)], options), tuple(items))


def _set_name(prefix: str) -> str:
    """eval_dataset's files are called PREFIX.eval-<number>-<name>."""
    return re.sub(r"^.*\.eval-\d+-", "", Path(prefix).name)
