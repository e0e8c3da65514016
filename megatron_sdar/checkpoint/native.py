"""Native checkpoints: save and load a run's weights, moments and state in any layout.

output_dir/checkpoint-N/ holds model/ and optimizer/ (planned and resharded by DCP, stored by
dcp_storage), trainer_state.json, config.yaml and hf/ (config.json, tokenizer and whatever else
an export ships). It is built as checkpoint-N.tmp, renamed once its COMMITTED marker is on disk.
Invariant: a checkpoint-N either holds everything it names, or is recognised as incomplete.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.agreement import dcp_errors_as_value_errors, on_every_rank
from megatron_sdar.checkpoint.dcp_storage import ShardStorageReader, ShardStorageWriter
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
    Marker,
    commit,
    next_sequence,
    put_in_place,
    read_marker,
    remove_leftovers,
)
from megatron_sdar.checkpoint.shards import ShardedTensors
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

    Collectives: broadcast_object_list and those of dcp.save (world).
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    temporary = final.with_name(f"{final.name}.tmp")

    def prepare() -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(temporary.parent)
        (temporary / HF_DIR).mkdir(parents=True)

    def write(folder: str, tensors: Mapping[str, torch.Tensor]) -> None:
        writer = ShardStorageWriter(temporary / folder)
        with dcp_errors_as_value_errors():
            dcp.save(_stored_names(tensors, arch), storage_writer=writer)

    def finish() -> None:
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
        run_on_main(prepare, mesh)
        write(MODEL_DIR, _parameters(stages))
        if optimizer is not None:
            write(OPTIMIZER_DIR, optimizer.moments())
        run_on_main(finish, mesh)
    except ValueError as error:
        if mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"cannot save {final}: {error}") from error
    return final


def _parameters(stages: Sequence[SdarStage]) -> dict[str, torch.Tensor]:
    return {name: p for stage in stages for name, p in stage.named_parameters()}


def _stored_names(
    tensors: Mapping[str, torch.Tensor], arch: Architecture
) -> dict[str, torch.Tensor]:
    """The tensors by the names they are stored under.

    The last pipeline stage's copy of a tied embedding is one more replica of the first stage's,
    and like of any other DCP stores one and loads all.
    """
    stored = {
        name.replace(HEAD, EMBEDDING) if arch.tie_word_embeddings else name: tensor
        for name, tensor in tensors.items()
    }
    assert len(stored) == len(tensors), "a rank with both ends of a tied model has one parameter"
    return stored


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

    Collectives: all_reduce and those of dcp.load (world).
    """
    directory = Path(path)
    arch, parameters = stages[0].arch, _parameters(stages)

    def inspect() -> tuple[Marker, dict[str, Any], ShardStorageReader, ShardStorageReader | None]:
        marker = read_marker(directory)
        state = read_json_object(directory / STATE_NAME)
        model, moments = ShardStorageReader(directory / MODEL_DIR), None
        _check_tensors(directory, model.stored, parameters, arch)
        if optimizer is not None:
            _check_precision(directory, model.stored, parameters)
            if marker.has_optimizer:
                moments = ShardStorageReader(directory / OPTIMIZER_DIR)
                _check_moments(directory, moments.stored, model.stored)
            elif marker.step != 0:
                raise ValueError(
                    f"{directory}: holds no optimizer state (save_only_model), so step "
                    f"{marker.step} cannot be resumed; to train on from its weights, export them "
                    "with tools/convert_checkpoint.py and name the result as model_name_or_path"
                )
        return marker, state, model, moments

    def read(reader: ShardStorageReader, tensors: Mapping[str, torch.Tensor]) -> None:
        with dcp_errors_as_value_errors():
            dcp.load(_stored_names(tensors, arch), storage_reader=reader)

    marker, state, model, moments = on_every_rank(inspect, f"load {directory}", stages)
    read(model, parameters)
    if optimizer is not None:
        if moments is not None:
            read(moments, optimizer.moments())
        else:
            for moment in optimizer.moments().values():
                moment._local_tensor.zero_()
        optimizer.set_step_count(marker.step)
    return {**state, "step": marker.step}


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
