"""How a build goes about it, and what it is a build of.

Owns the options that callers choose and the recipe that is stored with the files: everything
that decides their tokens, the contents of the source files included.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from megatron_sdar.data.building.plan import choose_part_bytes
from megatron_sdar.data.sources.datasets import DatasetSpec
from megatron_sdar.data.storage.metadata import Recipe, hash_file
from megatron_sdar.data.templates.template import TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer

ON_ERROR_MODES = ("raise", "skip")


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


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def source_bytes(specs: Sequence[DatasetSpec]) -> int:
    """Bytes of all files of SPECS."""
    return sum(file.stat().st_size for spec in specs for file in spec.files)


def make_recipe(
    specs: Sequence[DatasetSpec],
    tokenizer: SdarTokenizer,
    template: TemplateOptions,
    options: BuildOptions,
    on_bytes: Callable[[int], None],
) -> Recipe:
    """What a build of SPECS is made of. Reads every file once; ON_BYTES hears how far it is."""
    files = [file for spec in specs for file in spec.files]
    with ThreadPoolExecutor() as executor:
        # The digest releases the interpreter lock, and so do the reads before it.
        hashes = dict(
            zip(files, executor.map(lambda f: hash_file(f, on_bytes), files), strict=True)
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
        shard=None
        if options.shard is None
        else [*options.shard, options.part_bytes or choose_part_bytes(specs)],
    )
