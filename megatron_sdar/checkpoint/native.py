"""Native checkpoints: save and load a run's weights, moments and state in any layout.

output_dir/checkpoint-N/ holds model/ and optimizer/ (planned and resharded by DCP, stored by
dcp_storage), trainer_state.json, config.yaml and hf/ (config.json, tokenizer and whatever else
an export ships). It is built as checkpoint-N.tmp, renamed once its COMMITTED marker is on disk.
Invariant: a checkpoint-N either holds everything it names, or is recognised as incomplete; what
is loaded has the checksums it was saved with.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.adapter_config import adapter_config_json
from megatron_sdar.checkpoint.agreement import dcp_errors_as_value_errors, together
from megatron_sdar.checkpoint.base_model import write_base_model
from megatron_sdar.checkpoint.checksums import FileRecord
from megatron_sdar.checkpoint.dcp_storage import ShardStorageReader, ShardStorageWriter
from megatron_sdar.checkpoint.hf_assets import (
    ADAPTER_CONFIG_NAME,
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
    put_in_place,
    read_marker,
    remove_leftovers,
)
from megatron_sdar.checkpoint.run_mark import next_sequence
from megatron_sdar.checkpoint.snapshot import Snapshot, stored_parameters, take_snapshot
from megatron_sdar.checkpoint.stored_fit import (
    AdapterOrigin,
    check_adapter,
    check_moments,
    check_precision,
    check_resumable,
    check_tensors,
)
from megatron_sdar.checkpoint.tensor_names import EMBEDDING, HEAD
from megatron_sdar.checkpoint.verification import verify_files
from megatron_sdar.config import SdarConfig, dump_resolved
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class CheckpointOrigin:
    """What all checkpoints of a run have in common.

    Attributes:
        output_dir: where they are written.
        config, arch: of the run.
        assets: the model directory and the tokenizer's, for what an export ships.
        adapter: of a LoRA run.
    """

    output_dir: Path
    config: SdarConfig
    arch: Architecture
    assets: Sequence[str | Path]
    adapter: AdapterOrigin | None = None


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
    adapter: AdapterOrigin | None = None,
) -> Path:
    """Write output_dir/checkpoint-{step} and return its path, on every rank.

    `take_snapshot` and `CheckpointOrigin` describe the arguments, `write_checkpoint` the rest.
    """
    origin = CheckpointOrigin(Path(output_dir), config, arch, assets, adapter)
    write_checkpoint(take_snapshot(step, stages, optimizer, state), origin, mesh)
    return checkpoint_path(origin.output_dir, step)


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output_dir / f"checkpoint-{step}"


def write_checkpoint(snapshot: Snapshot, origin: CheckpointOrigin, mesh: ParallelMesh) -> int:
    """Write the snapshot's checkpoint; returns its size in bytes, on every rank.

    An existing checkpoint of this step is replaced. Leftovers of interrupted saves are removed.
    May run in a thread of its own, with `mesh_for_thread` and a snapshot that nobody changes.

    Raises:
        ValueError: on every rank, when any rank cannot write; nothing is left behind.

    Collectives: broadcast_object_list and those of dcp.save (mesh.control).
    """
    final = checkpoint_path(origin.output_dir, snapshot.step)
    temporary = final.with_name(f"{final.name}.tmp")
    records: dict[str, FileRecord] = {}

    def prepare() -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(temporary.parent)
        (temporary / HF_DIR).mkdir(parents=True)

    def write(folder: str, tensors: Mapping[str, torch.Tensor]) -> None:
        writer = ShardStorageWriter(temporary / folder)
        with dcp_errors_as_value_errors():
            dcp.save(
                _stored_names(tensors, origin.arch),
                storage_writer=writer,
                process_group=mesh.control,
            )
        records.update({f"{folder}/{name}": record for name, record in writer.records.items()})

    def finish() -> int:
        _write_small_files(temporary, snapshot, origin)
        size = commit(
            temporary,
            step=snapshot.step,
            sequence=next_sequence(final.parent),
            has_optimizer=snapshot.moments is not None,
            tied=origin.arch.tie_word_embeddings,
            layout={"tp": mesh.tp_size, "pp": mesh.pp_size, "dp": mesh.dp_size},
            known=records,
        )
        put_in_place(temporary, final)
        return size

    try:
        run_on_main(prepare, mesh)
        write(MODEL_DIR, snapshot.weights)
        if snapshot.moments is not None:
            write(OPTIMIZER_DIR, snapshot.moments)
        return run_on_main(finish, mesh)
    except ValueError as error:
        if mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(
            f"cannot save {final}: {error}; older checkpoints are as they were: mend this and "
            "start again, a run goes on from the newest complete one"
        ) from error


def _write_small_files(directory: Path, snapshot: Snapshot, origin: CheckpointOrigin) -> None:
    """Everything but the tensors (rank 0)."""
    write_json(directory / STATE_NAME, snapshot.state)
    dump_resolved(origin.config, directory / RESOLVED_CONFIG_NAME)
    shipped = collect_assets(origin.assets)
    copy_assets(shipped, directory / HF_DIR)
    dtype = next(iter(snapshot.weights.values())).dtype
    write_json(directory / HF_DIR / CONFIG_NAME, config_json(origin.arch, shipped, dtype))
    if origin.adapter is not None:
        content = adapter_config_json(origin.adapter.config)
        write_json(directory / HF_DIR / ADAPTER_CONFIG_NAME, content)
        write_base_model(directory, origin.adapter.base)


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


def load_checkpoint(
    path: str | Path,
    stages: Sequence[SdarStage],
    optimizer: ShardedAdamW | None,
    verify: bool = True,
    adapter: AdapterOrigin | None = None,
) -> dict[str, Any]:
    """Fill the stages, and the optimizer's moments and step count; returns the saved state.

    Any layout loads what any other saved. With an optimizer this is a resume and must be exact:
    a checkpoint in wider precision, or without moments after step 0, is refused. Call before
    the first forward, which may gather (and, under ZeRO-2, keep) the weights.

    Args:
        verify: read every file that is needed and compare its checksum before anything is used.
            Without it the files' sizes are compared.
        adapter: of a LoRA run: then the checkpoint fills what is trained, and must be of the same
            adapter and model.

    Raises:
        DamagedCheckpointError: on every rank the same, when the checkpoint is incomplete or a
            checksum differs; nothing has been filled.
        ValueError: on every rank, when any rank cannot read it, or its tensors are not exactly
            the model's.

    Collectives: all_gather_object and those of dcp.load (world).
    """
    directory = Path(path)
    arch, parameters = stages[0].arch, stored_parameters(stages)
    finetuning = stages[0].options.finetuning

    def begin() -> Marker:
        marker = read_marker(directory)
        if optimizer is not None:
            check_resumable(directory, marker)
        return marker

    def inspect() -> tuple[dict[str, Any], ShardStorageReader, ShardStorageReader | None]:
        check_adapter(directory, adapter)
        state = read_json_object(directory / STATE_NAME)
        model, moments = ShardStorageReader(directory / MODEL_DIR), None
        check_tensors(directory, model.stored, parameters, arch, finetuning)
        if optimizer is not None:
            check_precision(directory, model.stored, parameters)
            if marker.has_optimizer:
                moments = ShardStorageReader(directory / OPTIMIZER_DIR)
                check_moments(directory, moments.stored, model.stored, finetuning)
        return state, model, moments

    def read(reader: ShardStorageReader, tensors: Mapping[str, torch.Tensor]) -> None:
        with dcp_errors_as_value_errors():
            dcp.load(_stored_names(tensors, arch), storage_reader=reader)

    marker = together(begin)
    if verify:
        verify_files(directory, _needed(marker, optimizer is not None))
    state, model, moments = together(inspect)
    read(model, parameters)
    if optimizer is not None:
        if moments is not None:
            read(moments, optimizer.moments())
        else:
            for moment in optimizer.moments().values():
                moment._local_tensor.zero_()
        optimizer.set_step_count(marker.step)
    return {**state, "step": marker.step}


def _needed(marker: Marker, with_optimizer: bool) -> dict[str, FileRecord]:
    """The files that a load depends on, and the small ones with them."""
    return {
        name: record
        for name, record in marker.files.items()
        if with_optimizer or not name.startswith(f"{OPTIMIZER_DIR}/")
    }
