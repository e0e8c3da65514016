"""Datasets to token files: plan, build the parts, put them together, say what came out.

Owns the build of a TokenizedDataset and the decision whether one that exists may be reused. The
files are the same bytes for every number of workers, for shards that are merged, and for a build
that was killed and run again.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from megatron_sdar.data.building.build_options import (
    BuildOptions,
    available_cores,
    make_recipe,
    source_bytes,
)
from megatron_sdar.data.building.build_progress import BuildProgress
from megatron_sdar.data.building.part import PartReport, part_pieces
from megatron_sdar.data.building.part_pool import PartBuilder, build_parts, storage_error
from megatron_sdar.data.building.plan import Part, choose_part_bytes, plan_parts
from megatron_sdar.data.building.shards import (
    check_complete,
    check_target,
    join_parts,
    shard_prefix,
)
from megatron_sdar.data.building.summary import BuildSummary, summarize_dataset
from megatron_sdar.data.building.work_directory import WorkDirectory
from megatron_sdar.data.readers.records import RecordError, SkipReport
from megatron_sdar.data.readers.spans import read_span
from megatron_sdar.data.sources.datasets import DatasetSpec
from megatron_sdar.data.storage.metadata import (
    COUNTS,
    Recipe,
    TokenizedMetadata,
    metadata_path,
    read_metadata,
)
from megatron_sdar.data.templates.template import TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer

_SAMPLE_RECORDS = 64
# Below this, starting processes takes longer than the work.
_POOL_BYTES = 2_000_000
_SAMPLE_PARTS = 8
_SAMPLE_CHARACTERS = 400_000


def build_dataset(
    specs: Sequence[DatasetSpec],
    prefix: str | Path,
    tokenizer: SdarTokenizer,
    template: TemplateOptions,
    options: BuildOptions,
) -> BuildSummary:
    """Tokenise SPECS into token files at PREFIX (a shard of it: at its shard_prefix).

    A build that was interrupted goes on where it stopped when it is called again with the same
    inputs. Raises ValueError for a bad record (file and line), when PREFIX exists (unless
    overwrite) and when no document results. A failed build leaves what was there untouched.
    """
    if not specs:
        raise ValueError("no dataset is given; name at least one")
    target = str(prefix) if options.shard is None else shard_prefix(prefix, options.shard)
    check_target(target, options.overwrite)
    with BuildProgress(options.progress) as progress:
        progress.stage("hashing", source_bytes(specs))
        recipe = make_recipe(specs, tokenizer, template, options, progress.advance)
        return _build(specs, target, tokenizer, template, options, recipe, progress)


def ensure_dataset(
    specs: Sequence[DatasetSpec],
    prefix: str | Path,
    tokenizer: SdarTokenizer,
    template: TemplateOptions,
    options: BuildOptions,
    *,
    rebuild_stale: bool = False,
) -> BuildSummary:
    """Like `build_dataset`, but reuse PREFIX when it was made from exactly the same inputs.

    When PREFIX holds another dataset, it is replaced with REBUILD_STALE (a cache of the
    caller's own); otherwise, and without overwrite, ValueError says what differs. The folder of
    the source files may differ; their names and contents may not.
    """
    if rebuild_stale and not metadata_path(prefix).exists():
        options = replace(options, overwrite=True)
    if metadata_path(prefix).exists() and not options.overwrite:
        try:
            metadata = read_metadata(prefix)
        except ValueError:
            if not rebuild_stale:
                raise
            options = replace(options, overwrite=True)
            return build_dataset(specs, prefix, tokenizer, template, options)
        with BuildProgress(options.progress) as progress:
            progress.stage("hashing", source_bytes(specs))
            recipe = make_recipe(specs, tokenizer, template, options, progress.advance)
        differences = metadata.recipe.differences(recipe)
        if metadata.skipped and options.on_error == "raise":
            differences.append(
                f"it was built leaving out {sum(metadata.skipped.values())} bad records"
            )
        if not differences:
            return summarize_dataset(prefix)
        if not rebuild_stale:
            raise ValueError(
                f"{prefix}.json: the token files were made differently: {'; '.join(differences)}; "
                "build again with overwrite (overwrite_cache: true, or preprocess_data.py "
                "--overwrite), or choose another prefix"
            )
        options = replace(options, overwrite=True)
    return build_dataset(specs, prefix, tokenizer, template, options)


def _build(
    specs: Sequence[DatasetSpec],
    target: str,
    tokenizer: SdarTokenizer,
    template: TemplateOptions,
    options: BuildOptions,
    recipe: Recipe,
    progress: BuildProgress,
) -> BuildSummary:
    started = time.perf_counter()
    part_bytes = options.part_bytes or choose_part_bytes(specs)
    parts = dict(enumerate(plan_parts(specs, part_bytes, options.max_samples, options.seed)))
    if options.shard is not None:
        index, number = options.shard
        first, stop = len(parts) * index // number, len(parts) * (index + 1) // number
        parts = {i: parts[i] for i in range(first, stop)}
    note = tokenizer.enable_fast(_sample_texts(specs, parts, template))
    builder = PartBuilder(tuple(specs), tokenizer, template, options.on_error)
    num_workers = options.num_workers or available_cores()
    if options.num_workers is None and sum(p.num_bytes for p in parts.values()) < _POOL_BYTES:
        num_workers = 1
    key = {
        "fingerprint": recipe.fingerprint(),
        "part_bytes": part_bytes,
        "on_error": options.on_error,
    }
    try:
        with WorkDirectory(target, key) as work:
            reports = work.finished(parts)
            resumed = len(reports)
            resumed_tokens = sum(report.num_tokens for report in reports.values())
            left = {index: part for index, part in parts.items() if index not in reports}
            progress.stage("tokenising", sum(part.num_bytes for part in left.values()))
            prefixes = {index: work.part_prefix(index) for index in parts}
            for index, report in build_parts(
                builder, left, prefixes, num_workers, progress.advance
            ):
                reports[index] = report
            ordered = [(parts[index], reports[index]) for index in parts]
            metadata = _metadata(tokenizer, recipe, ordered)
            if options.shard is None:
                try:
                    check_complete(metadata)
                except ValueError:
                    work.remove()  # the dataset has to change, so its parts serve no other build
                    raise
            join_parts(list(prefixes.values()), target, metadata, work)
            work.remove()
    except OSError as error:
        raise storage_error(error, target) from error
    return replace(
        summarize_dataset(target),
        seconds=time.perf_counter() - started,
        tokenizer_note=note,
        num_parts=len(parts),
        num_resumed_parts=resumed,
        num_resumed_tokens=resumed_tokens,
    )


def _sample_texts(
    specs: Sequence[DatasetSpec], parts: Mapping[int, Part], template: TemplateOptions
) -> list[str]:
    """Real strings to try the fast tokenizer on: the first records of a few parts."""
    texts: list[str] = []
    chosen = list(parts.values())
    for part in chosen[:: max(1, len(chosen) // _SAMPLE_PARTS)]:
        left = _SAMPLE_CHARACTERS // _SAMPLE_PARTS
        for record in islice(read_span(part.spans[0]), _SAMPLE_RECORDS):
            with suppress(RecordError):  # told when the part is built
                pieces = part_pieces(specs[part.dataset], record, template)
                texts += [piece.text[:left] for piece in pieces]
                left -= sum(len(piece.text) for piece in pieces)
            if left <= 0:
                break
    return texts


def _metadata(
    tokenizer: SdarTokenizer, recipe: Recipe, ordered: Sequence[tuple[Part, PartReport]]
) -> TokenizedMetadata:
    skipped = SkipReport()
    left_out: Counter[str] = Counter()
    unseen: dict[str, list[str]] = {}
    for part, report in ordered:
        left_out.update(report.left_out)
        skipped.merge(SkipReport(counts=report.skipped, locations=report.skipped_locations))
        if report.num_documents:
            name, columns = str(part.dataset), report.unseen_columns
            unseen[name] = sorted(set(unseen.get(name, columns)) & set(columns))
    return TokenizedMetadata(
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=tokenizer.vocab_size,
        recipe=recipe,
        unseen_columns=unseen,
        left_out=dict(left_out),
        skipped=skipped.counts,
        skipped_locations=skipped.locations,
        **{name: sum(getattr(report, name) for _, report in ordered) for name in COUNTS},
    )
