"""Datasets to token files: plan, build the parts, put them together, say what came out.

Owns the build of a TokenizedDataset and the decision whether one that exists may be reused. The
files are the same bytes for every number of workers, for shards that are merged, and for a build
that was killed and run again.
"""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from megatron_sdar.data.build_progress import BuildProgress
from megatron_sdar.data.indexed_writer import concatenate
from megatron_sdar.data.metadata import (
    COUNTS,
    Recipe,
    TokenizedMetadata,
    hash_file,
    metadata_path,
    read_metadata,
    write_metadata,
)
from megatron_sdar.data.part import PartReport, dtypes, part_pieces
from megatron_sdar.data.part_pool import PartBuilder, build_parts
from megatron_sdar.data.plan import Part, choose_part_bytes, plan_parts
from megatron_sdar.data.records import RecordError, SkipReport
from megatron_sdar.data.sources import ON_ERROR_MODES, DatasetSpec
from megatron_sdar.data.spans import read_span
from megatron_sdar.data.summary import BuildSummary, summarize_dataset
from megatron_sdar.data.template import TemplateOptions
from megatron_sdar.data.tokenizer import SdarTokenizer
from megatron_sdar.data.tokens import COMPANIONS
from megatron_sdar.data.work_directory import WorkDirectory

_SAMPLE_RECORDS = 64
_SAMPLE_PARTS = 8


@dataclass(frozen=True)
class BuildOptions:
    """How a build goes about it; of these only max_samples, seed and shard decide the tokens.

    Attributes:
        num_workers: processes; None for one per core.
        max_samples: first records of every dataset; None for all.
        seed: of num_samples.
        on_error: a bad record stops the build ("raise") or is left out and counted ("skip").
        overwrite: replace a dataset that is there.
        shard: (i, n): build the i-th of n shares (i from 0), for `merge_shards`.
        part_bytes: source bytes of one part; None to choose.
        progress: show how far it is.
    """

    num_workers: int | None = None
    max_samples: int | None = None
    seed: int = 42
    on_error: str = "raise"
    overwrite: bool = False
    shard: tuple[int, int] | None = None
    part_bytes: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(
                f"max_samples must be at least 1 (or absent for all), got {self.max_samples}"
            )
        if self.on_error not in ON_ERROR_MODES:
            raise ValueError(
                f"on_error must be one of {', '.join(ON_ERROR_MODES)}: {self.on_error!r}"
            )
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise ValueError(
                f"shard {self.shard[0]}/{self.shard[1]}: give I/N with I from 0 to N-1"
            )


def shard_prefix(prefix: str | Path, shard: tuple[int, int]) -> str:
    """Where shard (i, n) of the dataset PREFIX lies."""
    return f"{prefix}.shard-{shard[0]:05d}-of-{shard[1]:05d}"


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
    if metadata_path(target).exists() and not options.overwrite:
        raise ValueError(
            f"{metadata_path(target)} exists already; choose another prefix or ask to overwrite it"
        )
    if target.endswith("/"):
        raise ValueError(f"{target}: a prefix must end in a file name, such as {target}train")
    with BuildProgress(options.progress) as progress:
        recipe = _make_recipe(specs, tokenizer, template, options, progress)
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
    if metadata_path(prefix).exists() and not options.overwrite:
        with BuildProgress(options.progress) as progress:
            recipe = _make_recipe(specs, tokenizer, template, options, progress)
        metadata = read_metadata(prefix)
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


def merge_shards(prefix: str | Path, num_shards: int, *, overwrite: bool = False) -> BuildSummary:
    """Put the NUM_SHARDS shards of PREFIX together: the files that one machine would have made.

    The shards stay where they are. Raises ValueError when one is missing or was made from other
    inputs or options than the first.
    """
    prefixes = [shard_prefix(prefix, (i, num_shards)) for i in range(num_shards)]
    missing = [p for p in prefixes if not metadata_path(p).exists()]
    if missing:
        raise ValueError(
            f"{metadata_path(missing[0])}: no such file: {len(missing)} of {num_shards} shards "
            f"are not built; run preprocess_data.py with --shard I/{num_shards} for each"
        )
    started = time.perf_counter()
    shards = [read_metadata(p) for p in prefixes]
    recipe = replace(shards[0].recipe, shard=None)
    for other, shard in zip(prefixes, shards, strict=True):
        differences = recipe.differences(replace(shard.recipe, shard=None))
        if differences:
            raise ValueError(
                f"{other}.json: this shard differs from the first: {'; '.join(differences)}; "
                "build every shard from the same inputs"
            )
    skipped = SkipReport()
    for shard in shards:
        skipped.merge(SkipReport(counts=shard.skipped, locations=shard.skipped_locations))
    metadata = replace(
        shards[0],
        recipe=recipe,
        skipped=skipped.counts,
        skipped_locations=skipped.locations,
        **{name: sum(getattr(shard, name) for shard in shards) for name in COUNTS},
    )
    if metadata_path(prefix).exists() and not overwrite:
        raise ValueError(
            f"{metadata_path(prefix)} exists already; choose another prefix or ask to overwrite it"
        )
    _join(prefixes, prefix, metadata)
    return replace(summarize_dataset(prefix), seconds=time.perf_counter() - started)


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
    num_workers = options.num_workers or len(os.sched_getaffinity(0))
    key = {
        "fingerprint": recipe.fingerprint(),
        "part_bytes": part_bytes,
        "on_error": options.on_error,
    }
    with WorkDirectory(target, key) as work:
        reports = work.finished(parts)
        resumed = len(reports)
        left = {index: part for index, part in parts.items() if index not in reports}
        progress.stage("tokenising", sum(part.num_bytes for part in left.values()))
        prefixes = {index: work.part_prefix(index) for index in parts}
        for index, report in build_parts(builder, left, prefixes, num_workers, progress.advance):
            reports[index] = report
        ordered = [(parts[index], reports[index]) for index in parts]
        _check_columns(specs, ordered)
        metadata = _metadata(tokenizer, recipe, [report for _, report in ordered])
        if not metadata.num_documents and options.shard is None:
            raise _no_documents(specs, metadata.skipped)
        _join(list(prefixes.values()), target, metadata)
        work.remove()
    return replace(
        summarize_dataset(target),
        seconds=time.perf_counter() - started,
        tokenizer_note=note,
        num_parts=len(parts),
        num_resumed_parts=resumed,
    )


def _make_recipe(
    specs: Sequence[DatasetSpec],
    tokenizer: SdarTokenizer,
    template: TemplateOptions,
    options: BuildOptions,
    progress: BuildProgress,
) -> Recipe:
    files = [file for spec in specs for file in spec.files]
    progress.stage("hashing", sum(file.stat().st_size for file in files))
    with ThreadPoolExecutor() as executor:
        # The digest releases the interpreter lock, and so do the reads before it.
        hashes = dict(
            zip(files, executor.map(lambda f: hash_file(f, progress.advance), files), strict=True)
        )
    sources = []
    for spec in specs:
        entries = []
        for file in spec.files:
            size, digest = hashes[file]
            entries.append({"name": file.name, "size": size, "sha256": digest})
        sources.append(
            {
                "name": spec.name,
                "layout": asdict(spec.layout),
                "num_samples": spec.num_samples,
                "files": entries,
            }
        )
    return Recipe(
        tokenizer_fingerprint=tokenizer.fingerprint(),
        template=asdict(template),
        sources=sources,
        max_samples=options.max_samples,
        seed=options.seed if any(spec.num_samples is not None for spec in specs) else None,
        shard=None if options.shard is None else list(options.shard),
    )


def _sample_texts(
    specs: Sequence[DatasetSpec], parts: Mapping[int, Part], template: TemplateOptions
) -> list[str]:
    """Real strings to try the fast tokenizer on: the first records of a few parts."""
    texts: list[str] = []
    chosen = list(parts.values())
    for part in chosen[:: max(1, len(chosen) // _SAMPLE_PARTS)]:
        for record in islice(read_span(part.spans[0]), _SAMPLE_RECORDS):
            with suppress(RecordError):  # told when the part is built
                texts += [p.text for p in part_pieces(specs[part.dataset], record, template)]
    return texts


def _check_columns(
    specs: Sequence[DatasetSpec], reports: Sequence[tuple[Part, PartReport]]
) -> None:
    """An optional column that dataset_info.json names must turn up somewhere."""
    for number, spec in enumerate(specs):
        own = [report for part, report in reports if part.dataset == number]
        good = [report for report in own if report.num_documents]
        unseen = set(spec.explicit_columns).intersection(*(r.unseen_columns for r in good))
        if good and unseen:
            raise ValueError(
                f"dataset {spec.name}: column {', '.join(map(repr, sorted(unseen)))} is in no "
                f"record of {', '.join(map(str, spec.files))}; correct 'columns' in "
                "dataset_info.json"
            )


def _metadata(
    tokenizer: SdarTokenizer, recipe: Recipe, reports: Sequence[PartReport]
) -> TokenizedMetadata:
    skipped = SkipReport()
    for report in reports:
        skipped.merge(SkipReport(counts=report.skipped, locations=report.skipped_locations))
    return TokenizedMetadata(
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=tokenizer.vocab_size,
        recipe=recipe,
        skipped=skipped.counts,
        skipped_locations=skipped.locations,
        **{name: sum(getattr(report, name) for report in reports) for name in COUNTS},
    )


def _no_documents(specs: Sequence[DatasetSpec], skipped: Mapping[str, int]) -> ValueError:
    names = ", ".join(spec.name for spec in specs)
    left_out = "; ".join(f"{count} {reason}" for reason, count in skipped.items())
    why = f"every record was skipped ({left_out})" if left_out else "the files are empty"
    return ValueError(f"{names}: no document was read: {why}; correct the dataset")


def _join(parts: Sequence[str], prefix: str | Path, metadata: TokenizedMetadata) -> None:
    """Write PARTS behind each other as PREFIX, and METADATA last."""
    # From here until the metadata is written the dataset counts as incomplete.
    metadata_path(prefix).unlink(missing_ok=True)
    for suffix, dtype in zip(COMPANIONS, dtypes(metadata.vocab_size), strict=True):
        concatenate([f"{p}{suffix}" for p in parts], f"{prefix}{suffix}", dtype, overwrite=True)
    write_metadata(prefix, metadata)
