"""Finished pieces of a build put together: parts to a dataset, shards to the whole.

Owns the last step of every build. The metadata goes first and comes back last: while it is
missing the dataset counts as incomplete.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sdar.data.building.part import dtypes
from megatron_sdar.data.building.part_pool import storage_error
from megatron_sdar.data.building.summary import BuildSummary, summarize_dataset
from megatron_sdar.data.building.work_directory import WorkDirectory, is_interrupted_commit
from megatron_sdar.data.readers.records import SkipReport
from megatron_sdar.data.storage.indexed import index_paths
from megatron_sdar.data.storage.indexed_writer import concatenate
from megatron_sdar.data.storage.metadata import (
    COUNTS,
    TokenizedMetadata,
    metadata_path,
    read_metadata,
    write_metadata,
)
from megatron_sdar.data.storage.tokens import COMPANIONS


def shard_prefix(prefix: str | Path, shard: tuple[int, int]) -> str:
    """Where shard (i, n) of the dataset PREFIX lies."""
    return f"{prefix}.shard-{shard[0]:05d}-of-{shard[1]:05d}"


def check_target(prefix: str, overwrite: bool) -> None:
    """Refuse a prefix that is none, and one whose files are there unless they may be replaced."""
    if prefix.endswith("/"):
        raise ValueError(f"{prefix}: a prefix must end in a file name, such as {prefix}train")
    if overwrite or is_interrupted_commit(prefix):
        return
    paths = [path for suffix in COMPANIONS for path in index_paths(f"{prefix}{suffix}")]
    for path in (*paths, metadata_path(prefix)):
        if path.exists():
            raise ValueError(
                f"{path} exists already; choose another prefix, or "
                "overwrite it (--overwrite, in a YAML overwrite_cache: true)"
            )


def merge_shards(prefix: str | Path, num_shards: int, *, overwrite: bool = False) -> BuildSummary:
    """Put the NUM_SHARDS shards of PREFIX together: the files that one machine would have made.

    The shards stay where they are. Raises ValueError when one is missing or was made from other
    inputs or options than the first.
    """
    if num_shards < 1:
        raise ValueError(f"the number of shards must be at least 1, got {num_shards}")
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
    for index, (other, shard) in enumerate(zip(prefixes, shards, strict=True)):
        if (shard.recipe.shard or [])[:2] != [index, num_shards]:
            raise ValueError(
                f"{other}.json: it is not shard {index} of {num_shards} (it says "
                f"{shard.recipe.shard}); build that shard again"
            )
        differences = recipe.differences(replace(shard.recipe, shard=None))
        sizes = [(each.recipe.shard or [0, 0, 0])[2] for each in (shards[0], shard)]
        if sizes[0] != sizes[1]:
            differences.append(f"part_bytes (was {sizes[0]}, now {sizes[1]})")
        if differences:
            raise ValueError(
                f"{other}.json: this shard differs from the first: {'; '.join(differences)}; "
                "build every shard from the same inputs"
            )
    skipped = SkipReport()
    left_out: Counter[str] = Counter()
    for shard in shards:
        left_out.update(shard.left_out)
        skipped.merge(SkipReport(counts=shard.skipped, locations=shard.skipped_locations))
    unseen: dict[str, list[str]] = {}
    for shard in shards:
        for name, columns in shard.unseen_columns.items():
            unseen[name] = sorted(set(unseen.get(name, columns)) & set(columns))
    metadata = replace(
        shards[0],
        recipe=recipe,
        unseen_columns=unseen,
        left_out=dict(left_out),
        skipped=skipped.counts,
        skipped_locations=skipped.locations,
        **{name: sum(getattr(shard, name) for shard in shards) for name in COUNTS},
    )
    check_complete(metadata)
    check_target(str(prefix), overwrite)
    try:
        with WorkDirectory(prefix, {"merge": [shard.fingerprint for shard in shards]}) as work:
            join_parts(prefixes, prefix, metadata, work)
            work.remove()
    except OSError as error:
        raise storage_error(error, str(prefix)) from error
    return replace(summarize_dataset(prefix), seconds=time.perf_counter() - started)


def check_complete(metadata: TokenizedMetadata) -> None:
    """Refuse a whole dataset without documents, or with a column that none of its records has.

    Of a dataset of which only the first records were read the summary tells the latter.
    """
    sources = metadata.recipe.sources
    if not metadata.num_documents:
        names = ", ".join(source["name"] for source in sources)
        reasons = "; ".join(f"{count} {reason}" for reason, count in metadata.skipped.items())
        why = f"every record was skipped ({reasons})" if reasons else "the files are empty"
        raise ValueError(f"{names}: no document was read: {why}; correct the dataset")
    for number, columns in metadata.unseen_columns.items():
        if columns and metadata.recipe.max_samples is None:
            source = sources[int(number)]
            raise ValueError(
                f"dataset {source['name']}: column {', '.join(map(repr, columns))} is in no "
                f"record of {', '.join(file['name'] for file in source['files'])}; correct "
                "'columns' in dataset_info.json"
            )


def join_parts(
    parts: Sequence[str], prefix: str | Path, metadata: TokenizedMetadata, work: WorkDirectory
) -> None:
    """Write PARTS behind each other as PREFIX, and METADATA last.

    Everything is written inside WORK first: until the names are changed, what was at PREFIX
    stays as it is, and a build that is stopped here can be given again.
    """
    staged = work.path / "joined"
    for suffix, dtype in zip(COMPANIONS, dtypes(metadata.vocab_size), strict=True):
        concatenate([f"{p}{suffix}" for p in parts], f"{staged}{suffix}", dtype, overwrite=True)
    work.begin_commit()
    metadata_path(prefix).unlink(missing_ok=True)
    for suffix in COMPANIONS:
        files = zip(index_paths(f"{staged}{suffix}"), index_paths(f"{prefix}{suffix}"), strict=True)
        for source, target in files:
            source.replace(target)
    write_metadata(prefix, metadata)
