"""From the data section of the configuration to a loader.

Order: token files (made on rank 0 when datasets are named), which documents of them are used
(validation split, mixing), rows, loader. Every rank gets the same rows and takes its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import DataConfig, SdarConfig
from megatron_sdar.config_weights import parse_blend, parse_numbers
from megatron_sdar.data.building.build_options import BuildOptions, available_cores
from megatron_sdar.data.building.builder import ensure_dataset
from megatron_sdar.data.loading.blend import BlendSchedule
from megatron_sdar.data.loading.documents import (
    DocumentStore,
    hold_out,
    interleave_documents,
)
from megatron_sdar.data.loading.loader import RowLoader, RowOptions
from megatron_sdar.data.loading.packing import PackedIndex, pack_documents
from megatron_sdar.data.sources.datasets import DatasetSpec, resolve_datasets
from megatron_sdar.data.storage.metadata import read_metadata
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.templates.chat_template import load_chat_template, load_template_tokens
from megatron_sdar.data.templates.template import TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh

_TOLD_OPTIONS = ("template", "enable_thinking", "mask_history", "train_on_prompt")


@dataclass(frozen=True)
class TrainingDocuments:
    """Which documents a run uses.

    Attributes:
        train: one store, or with mix_strategy blend one per dataset; selections of one store.
        validation: documents held out by val_size, if any.
    """

    train: tuple[DocumentStore, ...]
    validation: DocumentStore | None


def tokenizer_path(config: SdarConfig) -> str:
    """Where the tokenizer lies."""
    return config.model.tokenizer_name_or_path or config.model.model_name_or_path


def template_options(config: SdarConfig) -> TemplateOptions:
    """How the data configuration wants documents written."""
    data = config.data
    own: dict[str, str] = {}
    if data.template == "chat_template":
        path = tokenizer_path(config)
        own = {"chat_template": load_chat_template(path), **load_template_tokens(path)}
    return TemplateOptions(
        template=data.template,
        enable_thinking=data.enable_thinking,
        mask_history=data.mask_history,
        train_on_prompt=data.train_on_prompt,
        default_system=data.default_system,
        llamafactory_version=data.llamafactory_version,
        **own,
    )


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
        run_on_main(lambda: _check_recipes(prefixes, config, say), mesh)
        # Damage far inside an index is found here, not after days of training.
        run_on_main(lambda: _verify(prefixes), mesh)
    else:
        prefixes = run_on_main(lambda: _tokenise(config, say), mesh)
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
        if index.num_dropped or index.num_cut or index.num_split:
            lines.append(
                f"longer than cutoff_len={cutoff}: {index.num_dropped:,} documents dropped, "
                f"{index.num_cut:,} cut, {index.num_split:,} split, "
                f"{index.num_lost_tokens:,} tokens lost (truncate_mode: {index.truncate_mode})"
            )
    if documents.validation is not None:
        lines.append(
            f"val_size={config.data.val_size:g}: {len(documents.validation):,} documents are held "
            "out (they are not evaluated during training yet)"
        )
    return "\n".join(lines)


def make_loader(
    config: SdarConfig,
    arch: Architecture,
    mesh: ParallelMesh,
    documents: TrainingDocuments,
    indexes: Sequence[PackedIndex],
) -> RowLoader:
    """The loader of this data-parallel rank; identical on its tp and pp peers."""
    assert arch.block_size is not None, "validated"
    assert arch.mask_token_id is not None, "validated"
    data, training = config.data, config.training
    schedule = None
    rows_per_step = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * mesh.dp_size
    )
    if data.blend_weights is not None:
        segments = parse_blend(data.blend_weights)
        schedule = BlendSchedule([(step * rows_per_step, weights) for step, weights in segments])
    return RowLoader(
        documents.train,
        indexes,
        RowOptions(
            cutoff_len=data.cutoff_len,
            block_length=arch.block_size,
            mask_token_id=arch.mask_token_id,
            pad_token_id=documents.train[0].datasets[0].metadata.pad_token_id,
            noise_eps=config.diffusion.noise_eps,
            seed=training.seed,
            shuffle=not data.disable_shuffling,
            semantics=config.diffusion.semantics,
            row_length=config.diffusion.row_length,
            num_views=config.diffusion.noisy_views,
            complementary_views=config.diffusion.complementary_views,
        ),
        rows_per_micro_batch=training.per_device_train_batch_size,
        num_micro_batches=training.gradient_accumulation_steps,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        schedule=schedule,
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


def _check_recipes(prefixes: Sequence[str], config: SdarConfig, say: Callable[[str], None]) -> None:
    """Refuse token files made with another tokenizer or other options, and tell their options."""
    for prefix in prefixes:
        _check_recipe(prefix, config)
    first = read_metadata(prefixes[0]).recipe
    path = tokenizer_path(config)
    try:
        fingerprint = load_tokenizer(path).fingerprint()
    except ValueError as error:
        say(f"the tokenizer of {prefixes[0]} is not checked: {error}")
        fingerprint = first.tokenizer_fingerprint
    if fingerprint != first.tokenizer_fingerprint:
        raise ValueError(
            f"data_path: {prefixes[0]} was made with another tokenizer than {path}; give the "
            "tokenizer it was made with (tokenizer_name_or_path), or run "
            "tools/preprocess_data.py with this one"
        )
    options = ", ".join(
        f"{key} {value}" for key, value in first.template.items() if key in _TOLD_OPTIONS
    )
    say(f"{', '.join(prefixes)}: {options}")


def _check_recipe(prefix: str, config: SdarConfig) -> None:
    """Refuse options that the token files at `prefix` were not made with.

    Keys left at their default follow the files; a key that was set must agree with them.
    """
    data = config.data
    recipe = read_metadata(prefix).recipe
    defaults = DataConfig()
    found = {**recipe.template, "max_samples": recipe.max_samples}
    # The template's text and tokens come from the tokenizer, not from keys.
    keys = [key.name for key in fields(data) if key.name in found]
    problems = [
        f"{key} is {getattr(data, key)!r}, the files were made with {found[key]!r}"
        for key in keys
        if getattr(data, key) not in (found[key], getattr(defaults, key))
    ]
    if config.training.stage == "pt" and not recipe.is_plain_text:
        problems.append("stage is 'pt', the files hold conversations")
    if problems:
        raise ValueError(
            f"data_path: {prefix} is tokenised already and these keys come too late: "
            f"{'; '.join(problems)}; remove them, or run tools/preprocess_data.py with them"
        )


def _verify(prefixes: Sequence[str]) -> None:
    for prefix in prefixes:
        TokenizedDataset(prefix).verify()


def _tokenise(config: SdarConfig, say: Callable[[str], None]) -> list[str]:
    """Make the token files where they are not there yet; their prefixes."""
    data = config.data
    cache = data.tokenized_path or f"{config.training.output_dir}/tokenized/data"
    if Path(cache).is_dir():
        raise ValueError(
            f"tokenized_path: {cache} is a folder, but here it is the prefix of token files; give "
            f"{cache}/tokens instead (a LLaMA-Factory cache of packed rows cannot be read: its "
            "documents are tokenised again)"
        )
    specs = resolve_datasets(data.dataset, data.dataset_dir, config.training.stage)
    builds: list[tuple[str, list[DatasetSpec]]] = [(cache, specs)]
    if data.mix_strategy != "concat":
        builds = [(f"{cache}.{i}-{spec.name}", [spec]) for i, spec in enumerate(specs)]
    tokenizer = load_tokenizer(tokenizer_path(config))
    cores = available_cores()
    num_workers = min(data.preprocessing_num_workers or cores, cores)
    if (data.preprocessing_num_workers or 0) > cores:
        say(
            f"preprocessing_num_workers: {data.preprocessing_num_workers} is more than the "
            f"{cores} cores here; {num_workers} are used"
        )
    for prefix, chosen in builds:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        summary = ensure_dataset(
            chosen,
            prefix,
            tokenizer,
            template_options(config),
            BuildOptions(
                num_workers=num_workers,
                max_samples=data.max_samples,
                seed=config.training.seed,
                on_error=data.on_data_error,
                overwrite=data.overwrite_cache,
            ),
            # Without tokenized_path the files are this run's own, so they may follow its inputs.
            rebuild_stale=data.tokenized_path is None,
        )
        say(summary.format())
    prefixes = [prefix for prefix, _ in builds]
    _verify(prefixes)
    return prefixes
