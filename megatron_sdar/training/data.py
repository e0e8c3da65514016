"""From the data section of the configuration to a loader.

Order: token files (made on rank 0 when datasets are named), which documents of them are used
(validation split, mixing), rows, loader. Every rank gets the same rows and takes its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import SdarConfig
from megatron_sdar.config_rules_evaluation import evaluates
from megatron_sdar.config_weights import parse_numbers
from megatron_sdar.data.loading.documents import (
    DocumentStore,
    hold_out,
    interleave_documents,
)
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.data.loading.packing import PackedIndex, pack_documents
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.row_settings import blend_schedule, row_options
from megatron_sdar.training.token_files import check_token_files, make_token_files


@dataclass(frozen=True)
class TrainingDocuments:
    """Which documents a run uses.

    Attributes:
        train: one store, or with mix_strategy blend one per dataset; selections of one store.
        validation: documents held out by val_size, if any.
    """

    train: tuple[DocumentStore, ...]
    validation: DocumentStore | None


def prepare_documents(
    config: SdarConfig, mesh: ParallelMesh, say: Callable[[str], None]
) -> TrainingDocuments:
    """Tokenise on rank 0 if datasets are named, open the token files, choose the documents.

    Args:
        say: called on rank 0 with lines for the user.

    Raises:
        ValueError: unreadable data; token files made with other options than the configuration
            asks for; a mixture that does not fit the datasets.

    Collective: broadcast_object_list (world).
    """
    data = config.data
    prefixes = list(data.data_path)
    if prefixes:
        run_on_main(lambda: check_token_files(prefixes, config, say), mesh)
    else:
        prefixes = run_on_main(lambda: make_token_files(config, say), mesh)
    store = DocumentStore([TokenizedDataset(prefix) for prefix in prefixes])
    return TrainingDocuments(*_choose(store, config))


def pack(config: SdarConfig, arch: Architecture, documents: TrainingDocuments) -> list[PackedIndex]:
    """Assign the documents of every training store to rows; the same on every rank."""
    assert arch.block_size is not None, "validated"
    data = config.data
    return [
        pack_documents(
            store.lengths,
            data.cutoff_len,
            arch.block_size,
            truncate_mode=data.truncate_mode or store.truncate_mode,
            packing=data.neat_packing,
            algorithm=data.packing_algorithm,
            cut_lengths=store.cut_lengths,
            num_workers=data.preprocessing_num_workers or 1,
        )
        for store in documents.train
    ]


def describe_pack(
    documents: TrainingDocuments, indexes: Sequence[PackedIndex], config: SdarConfig
) -> str:
    """Rows and fill, and every document that was held out, dropped, cut or split."""
    cutoff = config.data.cutoff_len
    lines = []
    for number, index in enumerate(indexes):
        name = f"dataset {number}: " if len(indexes) > 1 else ""
        lines.append(
            f"{name}{index.doc_ids.size:,} documents in {len(index):,} rows of {cutoff} tokens, "
            f"fill {index.fill:.3f}"
        )
        lines += describe_truncation(index, cutoff)
    if documents.validation is not None:
        lines.append(
            f"val_size={config.data.val_size:g}: {len(documents.validation):,} documents are held "
            f"out{_fate(config)}"
        )
    return "\n".join(lines)


def describe_truncation(index: PackedIndex, cutoff_len: int) -> list[str]:
    """A line on what was longer than cutoff_len, if anything was."""
    if not (index.num_dropped or index.num_cut or index.num_split):
        return []
    return [
        f"longer than cutoff_len={cutoff_len}: {index.num_dropped:,} documents dropped, "
        f"{index.num_cut:,} cut, {index.num_split:,} split, "
        f"{index.num_lost_tokens:,} tokens lost (truncate_mode: {index.truncate_mode})"
    ]


def _fate(config: SdarConfig) -> str:
    return "" if evaluates(config) else " (and not evaluated: eval_strategy, do_eval)"


def make_loader(
    config: SdarConfig,
    arch: Architecture,
    mesh: ParallelMesh,
    documents: TrainingDocuments,
    indexes: Sequence[PackedIndex],
) -> RowLoader:
    """The loader of this data-parallel rank; identical on its tp and pp peers."""
    data, training = config.data, config.training
    rows_per_step = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * mesh.dp_size
    )
    pad_token_id = documents.train[0].datasets[0].metadata.pad_token_id
    return RowLoader(
        documents.train,
        indexes,
        row_options(config, arch, pad_token_id, rows_per_step),
        rows_per_micro_batch=training.per_device_train_batch_size,
        num_micro_batches=training.gradient_accumulation_steps,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        schedule=blend_schedule(data, rows_per_step),
        repack=data.neat_packing,
        num_workers=data.dataloader_num_workers,
        prefetch=True,
    )


def _choose(
    store: DocumentStore, config: SdarConfig
) -> tuple[tuple[DocumentStore, ...], DocumentStore | None]:
    """(training stores, held-out documents) of STORE."""
    data, seed = config.data, config.training.seed
    if not data.val_size and data.mix_strategy == "concat":
        return (store,), None
    validation = None
    spans = [store.ids_of(number) for number in range(len(store.datasets))]
    chosen = [np.arange(span.start, span.stop) for span in spans]
    if data.val_size:
        # Before mixing, so that no repetition of a held-out document is trained on.
        kept, held_out = hold_out(store, data.val_size, seed)
        validation = store.select(held_out)
        edges = [np.searchsorted(kept, (span.start, span.stop)) for span in spans]
        chosen = [kept[start:stop] for start, stop in edges]
    if data.mix_strategy == "blend":
        for dataset, ids in zip(store.datasets, chosen, strict=True):
            if not ids.size:
                raise ValueError(f"mix_strategy blend: {dataset.prefix} has no training document")
        return tuple(store.select(ids) for ids in chosen), validation
    ids = np.concatenate(chosen)
    if data.mix_strategy != "concat":
        probs = None
        if data.interleave_probs is not None:
            probs = parse_numbers("interleave_probs", data.interleave_probs)
        mixed = interleave_documents([len(i) for i in chosen], data.mix_strategy, probs, seed)
        ids = ids[mixed % len(ids)] + mixed // len(ids) * store.total
    return (store.select(ids),), validation
