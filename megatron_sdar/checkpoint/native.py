"""Native checkpoints: save and load a run's weights, moments and state in any layout.

output_dir/checkpoint-N/ holds model/ and optimizer/ (shards by global name and offset),
trainer_state.json, config.yaml and hf/ (config.json, tokenizer and whatever else an export
ships). It is built as checkpoint-N.tmp and renamed after its COMMITTED marker is on disk.
Invariant: a checkpoint-N either holds everything it names, or is recognised as incomplete.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.agreement import on_every_rank
from megatron_sdar.checkpoint.hf_assets import (
    CONFIG_NAME,
    collect_assets,
    config_json,
    copy_assets,
    read_json_object,
    write_json,
)
from megatron_sdar.checkpoint.run_directory import (
    HF_DIR,
    MODEL_DIR,
    OPTIMIZER_DIR,
    RESOLVED_CONFIG_NAME,
    STATE_NAME,
    commit,
    next_sequence,
    prune_checkpoints,
    put_in_place,
    read_marker,
    remove_leftovers,
)
from megatron_sdar.checkpoint.shards import (
    Chunk,
    ShardedTensors,
    shard_name,
    write_index,
    write_shard,
)
from megatron_sdar.checkpoint.tensor_names import (
    EMBEDDING,
    HEAD,
    VOCABULARY,
    differences,
    model_tensor_shapes,
)
from megatron_sdar.config import SdarConfig, dump_resolved
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.optim.adamw import MOMENTS, ShardedAdamW
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.parallel.sharding import fill_local, local_ranges

__all__ = ["load_checkpoint", "prune_checkpoints", "save_checkpoint"]


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    stages: Sequence[SdarStage],
    optimizer: ShardedAdamW | None,
    state: Mapping[str, Any],
    config: SdarConfig,
    arch: Architecture,
    mesh: ParallelMesh,
    assets: Sequence[str | Path],
) -> Path:
    """Write output_dir/checkpoint-{step} and return its path, on every rank.

    Args:
        optimizer: None leaves the moments out (save_only_model).
        state: JSON-able; `load_checkpoint` gives it back with `step` added. Numbers that are
            not finite become null, for JSON has none.
        assets: the model directory and the tokenizer's, for what an export ships.

    An existing checkpoint of this step is replaced. Leftovers of interrupted saves are removed.

    Raises:
        ValueError: on every rank, when any rank cannot write; nothing is left behind.

    Collectives: broadcast_object_list and all_reduce (world).
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    temporary = final.with_name(f"{final.name}.tmp")

    def prepare() -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(temporary.parent)
        for folder in (MODEL_DIR, OPTIMIZER_DIR, HF_DIR):
            if folder != OPTIMIZER_DIR or optimizer is not None:
                (temporary / folder).mkdir(parents=True)

    def write() -> bool:
        name = shard_name(mesh.device_mesh.get_rank())
        write_shard(temporary / MODEL_DIR / name, _chunks(_parameters(stages, arch)))
        if optimizer is not None:
            moments = {n: m for n, m in optimizer.moments().items() if not _is_tied(n, arch)}
            write_shard(temporary / OPTIMIZER_DIR / name, _chunks(moments))
        return True

    def finish() -> None:
        write_index(temporary / MODEL_DIR)
        if optimizer is not None:
            write_index(temporary / OPTIMIZER_DIR)
        write_json(temporary / STATE_NAME, _finite({**state, "step": step}))
        dump_resolved(config, temporary / RESOLVED_CONFIG_NAME)
        shipped = collect_assets(assets)
        copy_assets(shipped, temporary / HF_DIR)
        dtype = next(stages[0].parameters()).dtype
        write_json(temporary / HF_DIR / CONFIG_NAME, config_json(arch, shipped, dtype))
        layout = {"tp": mesh.tp_size, "pp": mesh.pp_size, "dp": mesh.dp_size}
        commit(
            temporary,
            step=step,
            sequence=next_sequence(final.parent),
            has_optimizer=optimizer is not None,
            tied=arch.tie_word_embeddings,
            layout=layout,
        )
        put_in_place(temporary, final)

    try:
        run_on_main(prepare)
        on_every_rank(write, f"write its part of {final}", stages)
        run_on_main(finish)
    except ValueError as error:
        if mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"cannot save {final}: {error}") from error
    return final


def _parameters(stages: Sequence[SdarStage], arch: Architecture) -> dict[str, torch.Tensor]:
    """This rank's parameters, without the copy that the last stage has of a tied embedding."""
    return {
        name: parameter
        for stage in stages
        for name, parameter in stage.named_parameters()
        if not _is_tied(name, arch)
    }


def _is_tied(name: str, arch: Architecture) -> bool:
    return arch.tie_word_embeddings and name.startswith(HEAD)


def _chunks(tensors: Mapping[str, torch.Tensor]) -> list[Chunk]:
    """The shards of which this rank holds the first copy."""
    chunks = []
    for name, tensor in tensors.items():
        assert isinstance(tensor, DTensor), f"{name} is not distributed"
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None, "a rank holds only its own tensors"
        if any(
            index > 0 and placement.is_replicate()
            for index, placement in zip(coordinate, tensor.placements, strict=True)
        ):
            continue
        offset = tuple(piece.start for piece in local_ranges(tensor))
        chunks.append(Chunk(name, tuple(tensor.shape), offset, tensor._local_tensor))
    return chunks


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_checkpoint(
    path: str | Path, stages: Sequence[SdarStage], optimizer: ShardedAdamW | None
) -> dict[str, Any]:
    """Fill the stages, and the optimizer's moments and step count; returns the saved state.

    Any layout loads what any other saved. With an optimizer this is a resume and must be exact:
    a checkpoint in wider precision, or without moments after step 0, is refused. Call before
    the first forward, which may gather (and, under ZeRO-2, keep) the weights.

    Raises:
        ValueError: on every rank, when any rank finds the checkpoint incomplete or damaged, or
            its tensors are not exactly the model's.

    Collective: all_reduce (world).
    """
    directory = Path(path)

    def load() -> dict[str, Any]:
        marker = read_marker(directory)
        model = ShardedTensors(directory / MODEL_DIR)
        parameters = {n: p for stage in stages for n, p in stage.named_parameters()}
        _check_tensors(directory, model, parameters, stages[0].arch)
        if optimizer is not None:
            _check_precision(directory, model, parameters)
        _fill(model, parameters, stages[0].arch)
        if optimizer is not None:
            moments = optimizer.moments()
            if marker.has_optimizer:
                stored = ShardedTensors(directory / OPTIMIZER_DIR)
                _check_moments(directory, stored, model)
                _fill(stored, moments, stages[0].arch)
            elif marker.step == 0:
                for moment in moments.values():
                    moment._local_tensor.zero_()
            else:
                raise ValueError(
                    f"{directory}: holds no optimizer state (save_only_model), so step "
                    f"{marker.step} cannot be resumed; to train on from its weights, export them "
                    "with tools/convert_checkpoint.py and name the result as model_name_or_path"
                )
            optimizer.set_step_count(marker.step)
        return {**read_json_object(directory / STATE_NAME), "step": marker.step}

    return on_every_rank(load, f"load {directory}", stages)


def _fill(source: ShardedTensors, targets: Mapping[str, torch.Tensor], arch: Architecture) -> None:
    for name, target in targets.items():
        assert isinstance(target, DTensor), f"{name} is not distributed"
        stored = name.replace(HEAD, EMBEDDING) if _is_tied(name, arch) else name
        fill_local(target, source.read(stored, local_ranges(target)))


def _check_tensors(
    directory: Path,
    model: ShardedTensors,
    parameters: Mapping[str, torch.Tensor],
    arch: Architecture,
) -> None:
    found = {name: info.shape for name, info in model.tensors.items()}
    saved_rows = found[EMBEDDING][0] if EMBEDDING in found else None
    rows = next((p.shape[0] for n, p in parameters.items() if n in VOCABULARY), saved_rows)
    problems = differences(model_tensor_shapes(arch, rows), found)
    if not problems:
        return
    text = f"{directory}: does not hold this model:\n  " + "\n  ".join(problems)
    if saved_rows not in (None, rows):
        text += (
            f"\nvocabulary: {saved_rows} rows were saved and this run pads {arch.vocab_size} to "
            f"{rows}; set make_vocab_size_divisible_by as in {directory / RESOLVED_CONFIG_NAME}"
        )
    raise ValueError(text)


def _check_precision(
    directory: Path, model: ShardedTensors, parameters: Mapping[str, torch.Tensor]
) -> None:
    narrowed = {
        (model.tensors[name].dtype, parameter.dtype)
        for name, parameter in parameters.items()
        if name in model.tensors
        and torch.promote_types(model.tensors[name].dtype, parameter.dtype) != parameter.dtype
    }
    for saved, wanted in sorted(narrowed, key=str):
        raise ValueError(
            f"{directory}: weights are {saved}, this run's are {wanted}, so resuming would round "
            "them; set fp64 as in its config.yaml"
        )


def _check_moments(directory: Path, stored: ShardedTensors, model: ShardedTensors) -> None:
    expected = {f"{n}.{m}": info.shape for n, info in model.tensors.items() for m in MOMENTS}
    problems = differences(expected, {name: info.shape for name, info in stored.tensors.items()})
    if problems:
        raise ValueError(
            f"{directory / OPTIMIZER_DIR}: does not fit the model beside it:\n  "
            + "\n  ".join(problems)
        )
