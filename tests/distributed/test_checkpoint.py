"""Checkpoints across layouts: what one layout saves, every other continues exactly.

One world of four ranks saves while it trains on (and resumes in its own layout), one of two and
this process resume elsewhere. Every comparison is against the run that was never interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed.layouts import (
    LR,
    MAX_GRAD_NORM,
    SEED,
    WEIGHT_DECAY,
    Layout,
    make_steps,
    micro_batches,
)
from distributed.world import run_world
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from unit.tiny_hf import make_config, read_model, resign, write_model

from megatron_sdar.architecture import load_architecture, padded_vocab_size
from megatron_sdar.checkpoint import dcp_storage
from megatron_sdar.checkpoint.async_save import AsyncSaver
from megatron_sdar.checkpoint.dcp_storage import ShardStorageReader, ShardStorageWriter
from megatron_sdar.checkpoint.hf_export import export_hf
from megatron_sdar.checkpoint.hf_import import load_hf_weights
from megatron_sdar.checkpoint.native import (
    CheckpointOrigin,
    load_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from megatron_sdar.checkpoint.native_import import import_hf
from megatron_sdar.checkpoint.run_directory import complete_checkpoints
from megatron_sdar.checkpoint.safetensors_files import full_ranges
from megatron_sdar.checkpoint.shards import ShardedTensors, write_shard
from megatron_sdar.checkpoint.snapshot import Snapshot, take_snapshot
from megatron_sdar.config import OptimConfig
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.launch import gather_from_all, run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh, mesh_for_thread
from megatron_sdar.parallel.sharding import local_ranges
from megatron_sdar.training.checkpoints import resume
from megatron_sdar.training.step import TrainingStep, named_parameters

pytestmark = pytest.mark.usefixtures("single_process")

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-6}
SAVED_AT, TOTAL = 2, 4
HOME = Layout("home", tp=2, pp=2, sequence_parallel=True)
REPLICATED = [
    Layout("tp2_dp2_no_shard", tp=2, dp=2, strategy="no_shard"),
    Layout("tp2_dp2_kv_heads_below_tp", tp=2, dp=2, kv_heads=1),
    Layout("tp2_pp2_tied", tp=2, pp=2, tied=True),
]
SAVERS = [
    HOME,
    Layout("tp2_dp2_zero3", tp=2, dp=2, strategy="optim_grads_params"),
    Layout("dp4_zero3", dp=4, strategy="optim_grads_params"),
    *REPLICATED,
]
ELSEWHERE = [
    Layout("one_process"),
    Layout("dp2_zero2", dp=2),
    Layout("dp2_zero3", dp=2, strategy="optim_grads_params"),
    Layout("tp2", tp=2, sequence_parallel=True),
    Layout("pp2_interleaved", pp=2, vpp=2),
]


def make_mesh(layout: Layout) -> ParallelMesh:
    replicate = layout.strategy == "no_shard"
    return build_mesh(torch.device("cpu"), layout.tp, layout.pp, replicate)


def make_model(layout: Layout, dtype: torch.dtype, mesh: ParallelMesh) -> list[SdarStage]:
    arch = layout.arch
    options = ModelOptions(
        padded_vocab_size(arch.vocab_size, 8), dtype, layout.sequence_parallel, False, "tiled"
    )
    stages = build_stages(arch, mesh, options, layout.vpp, None, layout.strategy)
    materialize(stages, mesh.device)
    return [stage for stage in stages if isinstance(stage, SdarStage)]


class Run:
    """A short training run of one layout on this rank."""

    def __init__(self, layout: Layout, precision: str) -> None:
        self.layout, self.precision = layout, precision
        dtype = DTYPES[precision]
        self.mesh = make_mesh(layout)
        self.stages = make_model(layout, dtype, self.mesh)
        initialize(self.stages, SEED)
        self.optimizer = ShardedAdamW(
            named_parameters(self.stages), OptimConfig(learning_rate=LR, weight_decay=WEIGHT_DECAY)
        )
        self.step = TrainingStep(
            layout.arch,
            self.mesh,
            self.stages,
            self.optimizer,
            sharding_strategy=layout.strategy,
            max_grad_norm=MAX_GRAD_NORM,
            activation_dtype=dtype,
        )

    def train(self, first: int, last: int) -> list[float]:
        steps = make_steps(False)
        return [
            self.step.run(
                micro_batches(self.layout, steps[index % len(steps)], self.mesh.dp_rank), LR
            ).loss
            for index in range(first, last)
        ]

    def save(self, output_dir: Path) -> Path:
        return save_checkpoint(
            output_dir,
            SAVED_AT,
            self.stages,
            self.optimizer,
            {"loader": {"position": 8}},
            make_config(output_dir),
            self.layout.arch,
            self.mesh,
            [output_dir.parent / "assets"],
        )

    def background(self, output_dir: Path) -> AsyncSaver:
        """A saver of this run's checkpoints; as for `save`, all of them say the same directory."""
        assets = [output_dir.parent / "assets"]
        origin = CheckpointOrigin(output_dir, make_config(output_dir), self.layout.arch, assets)
        own_mesh = mesh_for_thread(self.mesh)

        def write(snapshot: Snapshot) -> None:
            write_checkpoint(snapshot, origin, own_mesh)

        saver = AsyncSaver(self.snapshot(), write, self.mesh.device)
        self.step.before_update = saver.wait_until_copied
        return saver

    def snapshot(self) -> Snapshot:
        return take_snapshot(SAVED_AT, self.stages, self.optimizer, {"loader": {"position": 8}})

    def spoil(self) -> None:
        """Make sure that what is loaded was not there before."""
        for tensor in [*self.step.parameters.values(), *self.optimizer.moments().values()]:
            tensor._local_tensor.fill_(0.5)

    def gathered(self) -> dict[str, torch.Tensor]:
        tensors = {**self.step.parameters, **self.optimizer.moments()}
        return {name: t.detach().full_tensor().clone() for name, t in tensors.items()}

    def record(self, directory: Path, kind: str, content: object) -> None:
        """Keep `content` of one corner of each pipeline rank."""
        if self.mesh.tp_rank == 0 and self.mesh.dp_rank == 0:
            name = f"{kind}-{self.layout.name}-{self.precision}-{self.mesh.pp_rank}.pt"
            torch.save(content, directory / name)


def read_record(directory: Path, kind: str, layout: Layout, precision: str) -> list:
    return [
        torch.load(directory / f"{kind}-{layout.name}-{precision}-{rank}.pt", weights_only=True)
        for rank in range(layout.pp)
    ]


# Jobs: run on every rank of a world.


def job_save(layout: Layout, precision: str, directory: Path) -> None:
    """Two steps; save in the foreground, and in the background during two more steps.

    The background copies the weights as late as training lets it, and writes them later still.
    """
    run = Run(layout, precision)
    run.train(0, SAVED_AT)
    target = directory / f"{layout.name}-{precision}"
    path = run.save(target)
    saver = run.background(target)
    if run.mesh.is_main:
        path.rename(target / "foreground")
    trained = threading.Event()

    def patient(*arguments: object) -> object:
        assert trained.wait(300)
        return write_shard(*arguments)

    about_to_update = threading.Event()
    copy = saver._copies.fill

    def late(snapshot: Snapshot) -> Snapshot:
        assert about_to_update.wait(60), "a step changes weights without asking"
        return copy(snapshot)

    def before_update() -> None:
        about_to_update.set()
        saver.wait_until_copied()

    saver._copies.fill = late
    run.step.before_update = before_update
    dcp_storage.write_shard = patient
    saver.save(run.snapshot())
    run.record(directory, "saved", run.gathered())
    run.record(directory, "losses", run.train(SAVED_AT, TOTAL))
    assert not path.exists()
    trained.set()
    saver.close()
    dcp_storage.write_shard = write_shard
    run.record(directory, "final", run.gathered())


def job_resume(layout: Layout, precision: str, directory: Path) -> None:
    """Load what HOME saved into this layout and train on."""
    run = Run(layout, precision)
    run.spoil()
    checkpoint = directory / f"{HOME.name}-{precision}" / f"checkpoint-{SAVED_AT}"
    state = load_checkpoint(checkpoint, run.stages, run.optimizer)
    assert state == {"step": SAVED_AT, "loader": {"position": 8}}
    run.record(directory, "resumed-losses", run.train(SAVED_AT, TOTAL))
    run.record(directory, "resumed-final", run.gathered())


def job_resume_own(layout: Layout, directory: Path) -> None:
    """Load what this layout saved and train on."""
    run = Run(layout, "fp64")
    run.spoil()
    path = directory / f"{layout.name}-fp64" / f"checkpoint-{SAVED_AT}"
    load_checkpoint(path, run.stages, run.optimizer)
    run.record(directory, "resumed-losses", run.train(SAVED_AT, TOTAL))
    run.record(directory, "resumed-final", run.gathered())


def job_import(layout: Layout, directory: Path) -> None:
    """Hugging Face directory -> shards -> native checkpoint."""
    mesh = make_mesh(layout)
    stages = make_model(layout, torch.float32, mesh)
    arch = load_architecture(directory / "hf")
    for name, mask_token_init in (("kept", "keep"), ("noisy", "mean_noise")):
        load_hf_weights(stages, arch, directory / "hf", mask_token_init, seed=5)
        save_checkpoint(
            directory / f"imported-{name}",
            1,
            stages,
            None,
            {},
            make_config(directory),
            arch,
            mesh,
            [directory / "hf"],
        )


def expect_value_error(function: Callable[[], object]) -> str:
    """The message; the barrier afterwards proves that no rank is stuck elsewhere."""
    try:
        function()
    except ValueError as error:
        dist.barrier()
        return str(error)
    raise AssertionError("no ValueError")


def job_failures(directory: Path) -> None:
    """Errors of one rank end every rank, at once and readably."""
    run = Run(HOME, "fp32")
    rank = run.mesh.device_mesh.get_rank()
    good = directory / f"{HOME.name}-fp32"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for failing in ([3], [1, 2]):
        target = directory / f"full-{len(failing)}"
        dcp_storage.write_shard = full if rank in failing else write_shard
        text = expect_value_error(lambda target=target: run.save(target))
        dcp_storage.write_shard = write_shard
        assert "No space left on device" in text, text
        assert ("2 processes failed" in text) == (len(failing) == 2), text
        if run.mesh.is_main:  # who removes what was written, and hears of the failure after that
            assert list(target.iterdir()) == []

    if rank == 0:
        (directory / "a_file").write_text("")
    dist.barrier()
    text = expect_value_error(lambda: run.save(directory / "a_file"))
    assert "cannot save" in text
    assert "a_file" in text
    assert run_on_main(lambda: text, run.mesh) == text, "every rank has rank 0's message"

    text = expect_value_error(
        lambda: load_checkpoint(directory / "nowhere", run.stages, run.optimizer)
    )
    assert "nowhere: not a complete checkpoint" in text

    # Only the stage with the embedding can see that padding differs; all must leave.
    options = ModelOptions(192, torch.float32, False, "none", "tiled")
    stages = build_stages(HOME.arch, run.mesh, options)
    materialize(stages, run.mesh.device)
    text = expect_value_error(
        lambda: load_checkpoint(good / f"checkpoint-{SAVED_AT}", list(stages), None)
    )
    assert "set make_vocab_size_divisible_by" in text

    # Only the ranks of one stage read this shard; the marker does not know of the damage.
    damaged = directory / "damaged"
    cut = damaged / "model/shard-00003.safetensors"
    if rank == 0:
        shutil.copytree(good / f"checkpoint-{SAVED_AT}", damaged)
        os.truncate(cut, cut.stat().st_size - 1)
        resign(damaged)
    dist.barrier()
    text = expect_value_error(lambda: load_checkpoint(damaged, run.stages, run.optimizer))
    assert text.startswith(f"{cut}: not a whole safetensors file"), text

    run.spoil()
    load_checkpoint(good / f"checkpoint-{SAVED_AT}", run.stages, run.optimizer)
    job_flipped_bit(run, directory)
    job_background_failure(run, directory)
    text = expect_value_error(lambda: load_hf_weights(run.stages, HOME.arch, directory / "nowhere"))
    assert "nowhere" in text


def job_flipped_bit(run: Run, directory: Path) -> None:
    """One rank reads the damaged file; all name it, and all go on with the older checkpoint."""
    good = directory / f"{HOME.name}-fp32" / f"checkpoint-{SAVED_AT}"
    flipped = directory / "flipped"
    shard = flipped / "optimizer/shard-00002.safetensors"
    if run.mesh.is_main:
        shutil.copytree(good, flipped)
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 16
        shard.write_bytes(bytes(content))
    dist.barrier()
    text = expect_value_error(lambda: load_checkpoint(flipped, run.stages, run.optimizer))
    assert text.startswith(f"{shard}: damaged: its checksum is")
    assert set(gather_from_all(text, run.mesh)) == {text}
    said: list[str] = []
    training = make_config(directory).training
    resumed = resume([flipped, good], training, run.step, said.append)
    assert (resumed.path, resumed.damaged) == (good, (flipped,))
    assert resumed.state["step"] == SAVED_AT
    assert said == [f"passed over: {text}"]
    text = expect_value_error(lambda: resume([flipped], training, run.step, said.append))
    assert "none of its checkpoints can be resumed" in text
    assert str(shard) in text
    text = expect_value_error(
        lambda: resume(
            [flipped], replace(training, resume_from_checkpoint=str(flipped)), run.step, said.append
        )
    )
    assert text.startswith(f"resume_from_checkpoint: {shard}: damaged")


def job_background_failure(run: Run, directory: Path) -> None:
    """One rank's disk is full: every rank hears of it at the next save, and can save again."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = directory / "background-full"
    saver = run.background(target)
    dcp_storage.write_shard = full if run.mesh.device_mesh.get_rank() == 1 else write_shard
    saver.save(run.snapshot())
    text = expect_value_error(lambda: saver.save(run.snapshot()))
    assert "No space left on device" in text
    if run.mesh.is_main:  # who removes what was written, and hears of the failure after that
        assert list(target.iterdir()) == []
    dist.barrier()  # before rank 0 begins to write there again
    dcp_storage.write_shard = write_shard
    saver.save(run.snapshot())
    saver.close()
    assert complete_checkpoints(target) == [target / f"checkpoint-{SAVED_AT}"]
    dist.barrier()


class Awkward(nn.Module):
    """Parameters with fewer rows than ranks, so that some shards are empty; and one of experts."""

    def __init__(self, tp: object) -> None:
        super().__init__()
        for name, rows in (("two", 2), ("six", 6), ("ten", 10)):
            values = torch.arange(rows * 3.0).reshape(rows, 3)
            self.register_parameter(name, nn.Parameter(distribute_tensor(values, tp, [Shard(0)])))
        experts = torch.arange(72.0).reshape(6, 4, 3)  # as native checkpoints hold them
        self.experts = nn.Parameter(distribute_tensor(experts, tp, [Shard(0)]))
        columns = torch.arange(12.0).reshape(1, 12)
        self.columns = nn.Parameter(distribute_tensor(columns, tp, [Shard(1)]))
        self.one = nn.Parameter(distribute_tensor(torch.ones(1), tp, [Replicate()]))


def job_empty_shards(directory: Path) -> None:
    """tp x fsdp with empty and uneven shards, saved and read back at every rank's ranges."""
    mesh = make_mesh(Layout("awkward", tp=2, dp=2))
    model = Awkward(mesh.tp)
    fully_shard(model, mesh=mesh.data_parallel_axes)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    target = directory / "awkward"
    dcp.save(tensors, storage_writer=ShardStorageWriter(target))
    again = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(again, storage_reader=ShardStorageReader(target))
    stored = ShardedTensors(target)
    empty = 0
    for name, tensor in tensors.items():
        assert isinstance(tensor, DTensor)
        values = stored.read(name, local_ranges(tensor))
        assert torch.equal(values, tensor._local_tensor), name
        assert torch.equal(again[name]._local_tensor, tensor._local_tensor), name
        empty += values.numel() == 0
        whole = stored.read(name, full_ranges(tuple(tensor.shape)))
        assert torch.equal(whole, tensor.full_tensor()), name
    assert (empty > 0) == (mesh.dp_rank == 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which a world of four has done all its jobs."""
    directory = tmp_path_factory.mktemp("checkpoints")
    write_model(directory / "hf")
    write_model(directory / "assets")
    run_world(
        4,
        [
            *((job_save, (layout, "fp64", directory)) for layout in SAVERS),
            (job_save, (HOME, "fp32", directory)),
            (job_resume, (HOME, "fp64", directory)),
            (job_resume, (HOME, "fp32", directory)),
            *((job_resume_own, (layout, directory)) for layout in REPLICATED),
            (job_import, (HOME, directory)),
            (job_failures, (directory,)),
            (job_empty_shards, (directory,)),
        ],
        directory,
    )
    return directory


@pytest.fixture(scope="module")
def resumed(saved: Path) -> Path:
    """The same directory after everybody else has resumed."""
    jobs = [
        (job_resume, (layout, precision, saved))
        for layout in ELSEWHERE
        for precision in DTYPES
        if layout.world == 2
    ]
    run_world(2, jobs, saved)
    for precision in DTYPES:
        job_resume(ELSEWHERE[0], precision, saved)
    return saved


@pytest.mark.parametrize("layout", SAVERS, ids=lambda layout: layout.name)
def test_every_element_is_in_the_files(saved: Path, layout: Layout) -> None:
    path = saved / f"{layout.name}-fp64" / f"checkpoint-{SAVED_AT}"
    model, moments = ShardedTensors(path / "model"), ShardedTensors(path / "optimizer")
    expected: dict[str, torch.Tensor] = {}
    for part in read_record(saved, "saved", layout, "fp64"):
        expected |= part
    for name in [name for name in expected if layout.tied and name.startswith("lm_head.weight")]:
        twin = name.replace("lm_head.weight", "model.embed_tokens.weight")
        assert torch.equal(expected.pop(name), expected[twin])
    assert set(expected) == {*model.tensors, *moments.tensors}
    assert len(moments.tensors) == 2 * len(model.tensors)
    for name, tensor in expected.items():
        source = model if name in model.tensors else moments
        assert torch.equal(source.read(name, full_ranges(tuple(tensor.shape))), tensor), name


@pytest.mark.parametrize(
    ("layout", "precision"),
    [*((layout, "fp64") for layout in SAVERS), (HOME, "fp32")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_save_in_the_background_writes_the_same_bytes(
    saved: Path, layout: Layout, precision: str
) -> None:
    """Though training went on before any of them was written."""
    run = saved / f"{layout.name}-{precision}"
    here, there = (
        {
            path.relative_to(checkpoint): path.read_bytes()
            for path in checkpoint.rglob("*")
            if path.is_file()
        }
        for checkpoint in (run / "foreground", run / f"checkpoint-{SAVED_AT}")
    )
    assert here == there
    assert Path("COMMITTED") in here


@pytest.mark.parametrize("layout", SAVERS, ids=lambda layout: layout.name)
def test_torch_reads_the_shards_of_any_layout(saved: Path, layout: Layout) -> None:
    path = saved / f"{layout.name}-fp64" / f"checkpoint-{SAVED_AT}" / "model"
    model = ShardedTensors(path)
    target = {n: torch.full(i.shape, -1, dtype=i.dtype) for n, i in model.tensors.items()}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    for name, tensor in target.items():
        assert torch.equal(tensor, model.read(name, full_ranges(tuple(tensor.shape)))), name


def test_replicas_are_written_once(saved: Path) -> None:
    sizes = {}
    for layout in SAVERS:
        path = saved / f"{layout.name}-fp64" / f"checkpoint-{SAVED_AT}" / "model"
        tensors = ShardedTensors(path).tensors.values()
        payload = sum(info.num_bytes for info in tensors)
        on_disk = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        sizes[layout.name] = on_disk - payload
    assert all(0 < overhead < 100_000 for overhead in sizes.values()), sizes


@pytest.mark.parametrize("precision", DTYPES)
def test_same_layout_resumes_bitwise(saved: Path, precision: str) -> None:
    assert read_record(saved, "resumed-losses", HOME, precision) == read_record(
        saved, "losses", HOME, precision
    )
    assert_bitwise(saved, HOME, precision)


@pytest.mark.parametrize("layout", REPLICATED, ids=lambda layout: layout.name)
def test_replicas_resume_bitwise(saved: Path, layout: Layout) -> None:
    """Stored once, loaded by every rank that holds a copy."""
    assert read_record(saved, "resumed-losses", layout, "fp64") == read_record(
        saved, "losses", layout, "fp64"
    )
    assert_bitwise(saved, layout, "fp64")


def assert_bitwise(directory: Path, layout: Layout, precision: str) -> None:
    before = read_record(directory, "final", layout, precision)
    after = read_record(directory, "resumed-final", layout, precision)
    for mine, theirs in zip(after, before, strict=True):
        assert set(mine) == set(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("layout", ELSEWHERE, ids=lambda layout: layout.name)
def test_other_layouts_continue_the_same_run(resumed: Path, layout: Layout, precision: str) -> None:
    uninterrupted = read_record(resumed, "losses", HOME, precision)[0]
    losses = read_record(resumed, "resumed-losses", layout, precision)
    assert len(uninterrupted) == TOTAL - SAVED_AT
    for rank in losses:
        assert rank == pytest.approx(uninterrupted, rel=TOLERANCE[precision], abs=0)
    expected, found = (
        {name: tensor for part in parts for name, tensor in part.items()}
        for parts in (
            read_record(resumed, "final", HOME, precision),
            read_record(resumed, "resumed-final", layout, precision),
        )
    )
    assert set(found) == set(expected)
    if precision == "fp64":
        for name, tensor in expected.items():
            scale = float(tensor.abs().max())
            assert float((found[name] - tensor).abs().max()) <= 1e-8 * scale, name


def test_a_resume_without_moments_would_be_noticed(saved: Path) -> None:
    """The comparison above is not blind: fresh moments give other losses."""
    run = Run(ELSEWHERE[0], "fp64")
    checkpoint = saved / f"{HOME.name}-fp64" / f"checkpoint-{SAVED_AT}"
    load_checkpoint(checkpoint, run.stages, None)
    losses = run.train(SAVED_AT, TOTAL)
    uninterrupted = read_record(saved, "losses", HOME, "fp64")[0]
    assert losses[0] == pytest.approx(uninterrupted[0], rel=1e-9)
    assert losses[1] != pytest.approx(uninterrupted[1], rel=1e-6)


def test_hugging_face_round_trip_through_four_ranks_is_bitwise(saved: Path, tmp_path: Path) -> None:
    export_hf(saved / "imported-kept/checkpoint-1", tmp_path / "export", max_shard_size="50KB")
    before, after = read_model(saved / "hf"), read_model(tmp_path / "export")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    source = json.loads((saved / "hf/config.json").read_text())
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert {key: config[key] for key in source} == source


def test_mask_row_is_the_same_at_every_layout(saved: Path, tmp_path: Path) -> None:
    import_hf(
        saved / "hf",
        tmp_path / "one",
        mask_token_init="mean_noise",
        make_vocab_size_divisible_by=8,
        seed=5,
    )
    one = ShardedTensors(tmp_path / "one/model")
    four = ShardedTensors(saved / "imported-noisy/checkpoint-1/model")
    assert one.tensors == four.tensors
    for name, info in one.tensors.items():
        ranges = full_ranges(info.shape)
        assert torch.equal(one.read(name, ranges), four.read(name, ranges)), name


def test_transformers_loads_the_export_and_agrees(tmp_path: Path) -> None:
    """A model that transformers wrote goes through native and back with equal logits."""
    # Imported here: every spawned rank imports this file, and transformers takes seconds.
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_theta=1e4,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        block_size=4,
        mask_token_id=130,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "hf")
    mesh = build_mesh(torch.device("cpu"), 1, 1)
    arch = replace(load_architecture(tmp_path / "hf"), tie_word_embeddings=False)
    options = ModelOptions(136, torch.float32, False, "none", "tiled")
    stages = [s for s in build_stages(arch, mesh, options) if isinstance(s, SdarStage)]
    materialize(stages, mesh.device)
    load_hf_weights(stages, arch, tmp_path / "hf", "keep")
    output = make_config(tmp_path)
    path = save_checkpoint(
        tmp_path / "run", 1, stages, None, {}, output, arch, mesh, [tmp_path / "hf"]
    )
    export_hf(path, tmp_path / "export")
    shutil.copytree(tmp_path / "export", tmp_path / "as_qwen3")
    text = (tmp_path / "export/config.json").read_text()
    as_qwen3 = json.loads(text) | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "as_qwen3/config.json").write_text(json.dumps(as_qwen3))
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    after, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "as_qwen3", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not after.config.tie_word_embeddings
    ids = torch.randint(0, 131, (2, 20))
    with torch.no_grad():
        assert torch.equal(after.eval()(ids).logits, before(ids).logits)
