"""Whether a configuration would start here: its keys, its files, its memory.

Goes the way of pretrain_sdar.py without a process group: load, resolve the model, validate, find
the data. What depends on something that is missing is left out, since it would only repeat it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sdar.architecture import Architecture, load_architecture, padded_vocab_size
from megatron_sdar.checkpoint.hf_source import HfModel
from megatron_sdar.checkpoint.safetensors_files import volume
from megatron_sdar.checkpoint.tensor_names import model_tensor_shapes
from megatron_sdar.config import SdarConfig, load_config, validate
from megatron_sdar.config_batch import with_global_batch
from megatron_sdar.data.sources.datasets import resolve_datasets
from megatron_sdar.data.sources.llamafactory_cache import is_llamafactory_cache
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer
from megatron_sdar.doctor.findings import Finding, missing, ok, slow
from megatron_sdar.doctor.storage import storage
from megatron_sdar.training.finetuning import resolve_finetuning
from megatron_sdar.training.memory_estimate import GIB, RESERVE, RankMemory, estimate_memory
from megatron_sdar.training.precision import precision
from megatron_sdar.training.setup import check_schedule, resolve_architecture
from megatron_sdar.training.token_files import tokenizer_path
from megatron_sdar.training.trackers import wanted_trackers

_RUN_IT = "python tools/explain_config.py CONFIG shows what each key means"


@dataclass(frozen=True)
class Place:
    """Where the run is to be.

    Attributes:
        device: where this machine would compute.
        processes: of the whole world; None: GPUs here, or else as few as the sizes allow.
        device_bytes: memory of a GPU elsewhere; None: what is here.
    """

    device: torch.device
    processes: int | None = None
    device_bytes: float | None = None


def run(arguments: Sequence[str], place: Place) -> Iterator[Finding]:
    """Findings about `CONFIG.yaml key=value ...`."""
    try:
        config = load_config(arguments)
    except ValueError as error:
        yield from _lines("config", str(error), _RUN_IT)
        return
    yield ok("config", "\n".join((f"{arguments[0]}: no error in any key", *config.warnings)))
    world = place.processes or _smallest_world(config, place.device)
    try:
        arch = resolve_architecture(config)
    except (ValueError, OSError) as error:
        yield from _lines("model", str(error), "mend what is named, or give another directory")
        return
    yield model(config, arch)
    yield tokenizer(config)
    yield data(config)
    yield from trackers(config)
    try:
        validate(config, arch, world)
        loaded, config = config, with_global_batch(config, world)
        check_schedule(config)
    except ValueError as error:
        yield from _lines("sizes", str(error), "change what is named")
        return
    later = config.warnings[len(loaded.warnings) :]
    yield ok("sizes", "\n".join((_layout(config, world), *later)))
    yield memory(config, estimate_memory(config, arch, world), world, place)
    yield storage(Path(config.training.output_dir), bytes_on_disk(config, arch))


def _lines(name: str, message: str, remedy: str) -> Iterator[Finding]:
    for line in message.splitlines():
        if not line.endswith(":"):  # a heading
            yield missing(name, line.strip(), remedy)


def _smallest_world(config: SdarConfig, device: torch.device) -> int:
    parallel = config.parallel
    group = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    here = torch.cuda.device_count() if device.type == "cuda" else 0
    return here if here and here % group == 0 else group


def _layout(config: SdarConfig, world: int) -> str:
    tp = config.parallel.tensor_model_parallel_size
    pp = config.parallel.pipeline_model_parallel_size
    dp = world // (tp * pp)
    rows = config.training.per_device_train_batch_size
    steps = config.training.gradient_accumulation_steps
    return (
        f"{world} processes = tensor {tp} x pipeline {pp} x data {dp}; "
        f"{rows * steps * dp} rows of {config.row_length} tokens, copies included, per step"
    )


def model(config: SdarConfig, arch: Architecture) -> Finding:
    """The model's weights, all of them and of the right shapes."""
    directory = config.model.model_name_or_path
    count = sum(volume(shape) for shape in model_tensor_shapes(arch).values())
    text = f"{directory}: {count / 1e9:.2f} billion parameters"
    if config.model.train_from_scratch:
        return ok("model", f"{text}, random at first")
    try:
        HfModel(directory, arch, config.model.mask_token_init)
    except (ValueError, OSError) as error:
        remedy = "download the whole model, or set train_from_scratch: true"
        return missing("model", " ".join(str(error).split()), remedy)
    return ok("model", f"{text}, weights complete ({load_architecture(directory).model_type})")


def tokenizer(config: SdarConfig) -> Finding:
    """Whether documents are tokenised by the fast engine."""
    path = tokenizer_path(config)
    try:
        found = load_tokenizer(path).enable_fast()
    except (ValueError, OSError) as error:
        if config.data.data_path:
            return ok("tokenizer", "not needed: the data is tokenised")
        return missing("tokenizer", str(error), "give tokenizer_name_or_path")
    if "tiktoken" in found.split("(")[0]:
        return ok("tokenizer", found.removeprefix("tokenizer: "))
    return slow(
        "tokenizer",
        found.removeprefix("tokenizer: "),
        "nothing is wrong but its speed: tokenise once with tools/preprocess_data.py",
    )


def data(config: SdarConfig) -> Finding:
    """Token files that are whole, or datasets that can be found."""
    wanted = config.data
    cache = wanted.tokenized_path
    try:
        if wanted.data_path:
            documents = sum(len(TokenizedDataset(prefix)) for prefix in wanted.data_path)
            return ok("data", f"{documents:,} documents in {', '.join(wanted.data_path)}")
        if cache is not None and is_llamafactory_cache(cache):
            return ok("data", f"{cache}: documents of a LLaMA-Factory cache")
        specs = resolve_datasets(wanted.dataset, wanted.dataset_dir, config.training.stage)
    except (ValueError, OSError) as error:
        remedy = "mend dataset, dataset_dir or data_path (paths are relative to where you stand)"
        return missing("data", str(error), remedy)
    if not specs:
        return missing("data", "neither dataset nor data_path is given", "give one of them")
    files = sum(len(spec.files) for spec in specs)
    return ok(
        "data", f"{', '.join(spec.name for spec in specs)}: {files} files, tokenised at start"
    )


def trackers(config: SdarConfig) -> Iterator[Finding]:
    """Those that the configuration names."""
    if not config.reporting.report_to:
        return
    try:
        yield ok("report_to", ", ".join(wanted_trackers(config.reporting.report_to)) or "none")
    except ValueError as error:
        found, _, remedy = str(error).partition("; ")
        yield missing("report_to", found, remedy)


def memory(config: SdarConfig, ranks: Sequence[RankMemory], world: int, place: Place) -> Finding:
    """The estimate of the fullest rank against a GPU, or that of all ranks against this host."""
    largest = max(ranks, key=lambda rank: rank.total)
    text, needed = f"about {largest.format()} a process", largest.total
    if place.device_bytes is not None:
        available = place.device_bytes
        text += f"; a device has {available / GIB:.1f} GiB"
    elif place.device.type == "cuda" and config.training.device != "cpu":
        available = float(torch.cuda.get_device_properties(0).total_memory)
        text += f"; a device has {available / GIB:.1f} GiB"
    else:
        needed = sum(rank.total for rank in ranks) * world / len(ranks)
        available = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        text += f"; {world} on this host's CPU: {needed / GIB:.1f} of {available / GIB:.1f} GiB"
    if needed <= (1 - RESERVE) * available:
        return ok("memory", text)
    return missing("memory", text, f"it will not fit: {_how_to_shrink(config, largest)}")


def _how_to_shrink(config: SdarConfig, rank: RankMemory) -> str:
    """The cheapest change that attacks the largest part."""
    ways = []
    if rank.activations + rank.transient > rank.gradients:
        if config.training.recompute_granularity in ("none", "selective"):
            ways.append("recompute_granularity: full")
        if config.training.per_device_train_batch_size > 1:
            ways.append("per_device_train_batch_size: 1 with more gradient_accumulation_steps")
        ways.append("a smaller row_length or cutoff_len")
    elif config.parallel.data_parallel_sharding_strategy != "optim_grads_params":
        ways.append("data_parallel_sharding_strategy: optim_grads_params")
    ways.append("a larger tensor_model_parallel_size")
    ways.append("more processes")
    return ", or ".join(ways)


def bytes_on_disk(config: SdarConfig, arch: Architecture) -> int:
    """Checkpoints that are kept (one more while it is written) and the exported model, at most.

    Without save_total_limit the number of checkpoints is unknown: two are counted.
    """
    training = config.training
    rows = padded_vocab_size(arch.vocab_size, config.model.make_vocab_size_divisible_by)
    finetuning = resolve_finetuning(config.finetuning, arch.num_hidden_layers)
    shapes = finetuning.adapted(model_tensor_shapes(arch, rows))
    size = precision(config).params.itemsize
    stored = sum(volume(shape) for name, shape in shapes.items() if finetuning.stores(name))
    trained = sum(volume(shape) for name, shape in shapes.items() if finetuning.trains(name))
    checkpoint = size * (stored + (0 if training.save_only_model else 2 * trained))
    kept = 1 if training.save_strategy == "no" else (training.save_total_limit or 1) + 1
    return kept * checkpoint + (size * stored if training.export_hf else 0)
