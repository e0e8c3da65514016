"""Parallel layouts under test, the worker that runs one, and the comparison with the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from distributed import oracle
from torch.distributed.tensor import DTensor

from megatron_sdar.architecture import Architecture, padded_vocab_size
from megatron_sdar.config import OptimConfig
from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.diffusion.rows import (
    Row,
    RowDocument,
    build_row,
    concatenate_rows,
    full_copies,
)
from megatron_sdar.diffusion.savings import kept_copies
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh
from megatron_sdar.training.step import TrainingStep, named_parameters

BLOCK, ROW, MASK_ID, PAD_ID = 4, 64, 130, 0
LR, WEIGHT_DECAY, MAX_GRAD_NORM, STEPS, SEED = 1e-2, 0.1, 0.5, 3, 7
ROWS_PER_STEP = 4
FLOOR = 1e-11


@dataclass(frozen=True)
class Layout:
    """One way to run the same three steps."""

    name: str
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    strategy: str = "optim_grads"
    recompute: str = "none"
    tied: bool = False
    kv_heads: int = 2
    layers: tuple[int, ...] | None = None
    rows_per_micro_batch: int = 1
    silent_half: bool = False
    backend: str = "tiled"
    fused: str = "torch"
    ragged: bool = False
    bf16: bool = False
    trim: bool = True
    savings: bool = True
    views: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def arch(self) -> Architecture:
        return Architecture(
            vocab_size=131,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=5 if self.layers else 4,
            num_attention_heads=4,
            num_key_value_heads=self.kv_heads,
            head_dim=16,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            tie_word_embeddings=self.tied,
            max_position_embeddings=512,
            initializer_range=0.2,
            model_type="sdar",
            block_size=BLOCK,
            mask_token_id=MASK_ID,
        )


LAYOUTS = [
    Layout("one_process"),
    Layout("one_process_recompute", recompute="full"),
    Layout("one_process_selective", recompute="selective"),
    Layout("one_process_two_rows_per_micro_batch", rows_per_micro_batch=2),
    Layout("one_process_tied", tied=True),
    Layout("one_process_ragged_micro_batches", ragged=True),
    Layout("one_process_reference_attention", backend="reference"),
    Layout("one_process_paper", trim=False, savings=False),
    Layout("one_process_untrimmed", trim=False),
    Layout("one_process_full_copies", savings=False),
    Layout("one_process_two_views", views=2),
    Layout("tp2", tp=2),
    Layout("tp2_sp", tp=2, sequence_parallel=True),
    Layout("tp2_sp_recompute", tp=2, sequence_parallel=True, recompute="full"),
    Layout("tp2_sp_paper", tp=2, sequence_parallel=True, trim=False, savings=False),
    Layout("tp2_sp_two_views", tp=2, sequence_parallel=True, views=2),
    Layout("tp2_sp_rows_without_masks", tp=2, sequence_parallel=True, silent_half=True),
    Layout("tp2_selective", tp=2, recompute="selective"),
    Layout("tp2_sp_selective", tp=2, sequence_parallel=True, recompute="selective"),
    Layout("tp2_tied", tp=2, tied=True),
    Layout("tp2_sp_kv_heads_below_tp", tp=2, kv_heads=1, sequence_parallel=True),
    Layout("pp2", pp=2),
    Layout("pp2_recompute", pp=2, recompute="full"),
    Layout("pp2_paper", pp=2, trim=False, savings=False),
    Layout("pp2_two_views", pp=2, views=2),
    Layout("dp2_zero3_two_views", dp=2, strategy="optim_grads_params", views=2),
    Layout("pp2_tied", pp=2, tied=True),
    Layout("pp2_uneven", pp=2, layers=(3, 2)),
    Layout("pp2_ragged_micro_batches", pp=2, ragged=True),
    Layout("pp2_interleaved", pp=2, vpp=2),
    Layout("pp2_interleaved_ragged", pp=2, vpp=2, ragged=True),
    Layout("dp2_zero2", dp=2),
    Layout("dp2_zero2_recompute", dp=2, recompute="full"),
    Layout("dp2_zero3", dp=2, strategy="optim_grads_params"),
    Layout("dp2_zero3_selective", dp=2, strategy="optim_grads_params", recompute="selective"),
    Layout("dp2_no_shard", dp=2, strategy="no_shard"),
    Layout("dp2_one_rank_without_masks", dp=2, silent_half=True),
    Layout("dp2_zero3_tied", dp=2, strategy="optim_grads_params", tied=True),
    Layout("pp4", pp=4),
    Layout("tp4_kv_heads_below_tp", tp=4, sequence_parallel=True),
    Layout("tp2_pp2", tp=2, pp=2, sequence_parallel=True),
    Layout("tp2_pp2_tied", tp=2, pp=2, tied=True),
    Layout("tp2_dp2_zero3", tp=2, dp=2, sequence_parallel=True, strategy="optim_grads_params"),
    Layout("pp2_dp2_interleaved_recompute", pp=2, dp=2, vpp=2, recompute="full"),
    Layout("pp2_dp2_zero3", pp=2, dp=2, strategy="optim_grads_params"),
    Layout("pp2_dp2_one_rank_without_masks", pp=2, dp=2, silent_half=True),
]
# Attention in C++, what a CPU with a compiler trains with.
NATIVE = [
    Layout("one_process_native_two_views", backend="native", views=2),
    Layout(
        "tp2_sp_recompute_native", tp=2, sequence_parallel=True, recompute="full", backend="native"
    ),
    Layout("pp2_ragged_native", pp=2, ragged=True, backend="native"),
    Layout("dp2_zero3_native", dp=2, strategy="optim_grads_params", backend="native"),
]
# torch has no compiled FlexAttention backward on CPU; see unit.flex_on_cpu.
FLEX = [
    Layout("one_process_flex_recompute_tied", backend="flex", recompute="full", tied=True),
    Layout("tp2_sp_flex", tp=2, sequence_parallel=True, backend="flex"),
    Layout("pp2_ragged_flex", pp=2, ragged=True, backend="flex"),
]
# Attention and every fused kernel, in Triton's interpreter.
TRITON = [
    Layout("tp2_sp_triton", tp=2, sequence_parallel=True, backend="triton", fused="triton"),
]
# Elementwise operations compiled by Inductor.
INDUCTOR = [
    Layout("one_process_inductor", fused="inductor"),
    Layout(
        "tp2_sp_selective_inductor",
        tp=2,
        sequence_parallel=True,
        recompute="selective",
        fused="inductor",
    ),
    Layout("pp2_recompute_inductor", pp=2, recompute="full", fused="inductor"),
    Layout("dp2_zero3_inductor", dp=2, strategy="optim_grads_params", fused="inductor"),
]
# Every layout of the list with each backend: a proof of half an hour.
EVERY_NATIVE = [
    replace(layout, name=f"every_{layout.name}_native", backend="native") for layout in LAYOUTS
]
EVERY_FLEX = [
    replace(layout, name=f"every_{layout.name}_flex", backend="flex") for layout in LAYOUTS
]
EVERY_TRITON = [
    replace(layout, name=f"every_{layout.name}_triton", backend="triton", fused="triton")
    for layout in LAYOUTS
]
EIGHT = [
    Layout("tp2_pp2_dp2", tp=2, pp=2, dp=2, sequence_parallel=True),
    Layout(
        "tp2_pp2_dp2_zero3_recompute_tied",
        tp=2,
        pp=2,
        dp=2,
        sequence_parallel=True,
        strategy="optim_grads_params",
        recompute="full",
        tied=True,
    ),
]


@dataclass(frozen=True)
class Document:
    ids: np.ndarray
    labels: np.ndarray
    noise: NoiseDraw
    second_noise: NoiseDraw

    def noises(self, views: int) -> tuple[NoiseDraw, ...]:
        return (self.noise, self.second_noise)[:views]


@lru_cache(maxsize=4)
def make_steps(silent_half: bool) -> list[list[list[Document]]]:
    """steps x rows x documents. With silent_half, odd rows have no masked token."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(STEPS):
        rows = []
        for row in range(ROWS_PER_STEP):
            lengths = [4 * int(n) for n in rng.integers(1, 5, size=2)]
            rows.append([_document(rng, n, silent_half and row % 2 == 1) for n in lengths])
        steps.append(rows)
    return steps


def _document(rng: np.random.Generator, length: int, silent: bool) -> Document:
    """Of 4 and 8 tokens with one p, of 12 with one per block, of 16 with flat weights."""
    ids = rng.integers(1, 129, size=length).astype(np.int32)
    labels = ids.copy()
    labels[: int(rng.integers(0, length))] = -100
    prob = float(rng.uniform(0.2, 0.9))
    masked = (labels != -100) & (rng.random(length) < prob) & (not silent)
    probs = np.array([prob, 1 - prob, 0.3 + prob / 2]) if length == 12 else prob
    flat = 0.55 if length == 16 else None
    # The second view is independent or, in every other document, the complement.
    other = rng.random(length) < 0.3
    if length % 8:
        second = NoiseDraw(1.0 - probs, (labels != -100) & ~masked & (not silent), flat)
    else:
        second = NoiseDraw(0.3, (labels != -100) & other & (not silent), flat)
    return Document(ids, labels, NoiseDraw(probs, masked, flat), second)


def divisors(noise: NoiseDraw) -> torch.Tensor:
    """What the oracle divides the loss of each token by, float64 [n]."""
    if noise.flat_prob is not None:
        return torch.full((noise.masked.size,), noise.flat_prob, dtype=torch.float64)
    tokens = noise.masked.size // np.size(noise.mask_prob)
    return torch.from_numpy(np.repeat(np.asarray(noise.mask_prob, dtype=np.float64), tokens))


def micro_batches(layout: Layout, rows: list[list[Document]], dp_rank: int) -> list[Row]:
    """Deal a step's rows to this data-parallel rank, row r to rank r % dp."""
    mine = [
        build_row(
            [_copies(d, layout) for d in documents],
            ROW // 2 * (1 + layout.views),
            BLOCK,
            MASK_ID,
            PAD_ID,
        )
        for documents in rows[dp_rank :: layout.dp]
    ]
    if layout.ragged:  # 3 micro-batches of 1, 2 and 1 rows
        return [mine[0], concatenate_rows(mine[1:3]), mine[3]]
    size = layout.rows_per_micro_batch
    return [concatenate_rows(mine[i : i + size]) for i in range(0, len(mine), size)]


def _copies(document: Document, layout: Layout) -> RowDocument:
    if layout.savings:
        noises = document.noises(layout.views)
        return kept_copies(document.ids, document.labels, BLOCK, noises)
    return full_copies(document.ids, document.labels, BLOCK, document.noise)


def build(layout: Layout, mesh: ParallelMesh) -> tuple[TrainingStep, ShardedAdamW]:
    arch = layout.arch
    params = torch.float32 if layout.bf16 else torch.float64
    compute = torch.bfloat16 if layout.bf16 else torch.float64
    options = ModelOptions(
        padded_vocab_size=padded_vocab_size(arch.vocab_size, 8),
        dtype=params,
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
        attention_backend=layout.backend,
        fused_kernels=layout.fused,
        trim_last_layer=layout.trim,
    )
    stages = build_stages(arch, mesh, options, layout.vpp, layout.layers, layout.strategy, compute)
    materialize(stages, mesh.device)
    initialize(stages, SEED)
    optimizer = ShardedAdamW(
        named_parameters(stages), OptimConfig(learning_rate=LR, weight_decay=WEIGHT_DECAY)
    )
    step = TrainingStep(
        arch,
        mesh,
        list(stages),
        optimizer,
        sharding_strategy=layout.strategy,
        max_grad_norm=MAX_GRAD_NORM,
        activation_dtype=compute,
    )
    return step, optimizer


def run_layout(layout: Layout, directory: Path) -> None:
    """Run on every rank of the world; each pipeline rank's corner saves what it owns."""
    mesh = build_mesh(
        torch.device("cpu"),
        layout.tp,
        layout.pp,
        replicate_data_parallel=layout.strategy == "no_shard",
    )
    step, _ = build(layout, mesh)
    initial = _full({name: p.detach() for name, p in step.parameters.items()})
    losses, norms, gradients = [], [], {}
    for index, rows in enumerate(make_steps(layout.silent_half)):
        batches = micro_batches(layout, rows, mesh.dp_rank)
        if index == 0:
            step.backward(batches)
            gradients = _full({name: p.grad for name, p in step.parameters.items()})
        result = step.run(batches, LR)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = _full({name: p.detach() for name, p in step.parameters.items()})
    if mesh.tp_rank == 0 and mesh.dp_rank == 0:
        torch.save(
            {
                "losses": losses,
                "norms": norms,
                "gradients": gradients,
                "weights": weights,
                "initial": initial,
            },
            directory / f"{layout.name}.{mesh.pp_rank}.pt",
        )


def _full(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    full = {}
    for name, tensor in tensors.items():
        assert isinstance(tensor, DTensor)
        full[name] = tensor.full_tensor().clone()
    return full


def read_result(layout: Layout, directory: Path) -> dict[str, object]:
    parts = [
        torch.load(directory / f"{layout.name}.{rank}.pt", weights_only=True)
        for rank in range(layout.pp)
    ]
    merged = dict(parts[0])
    for key in ("gradients", "weights", "initial"):
        merged[key] = {}
        for part in parts:
            for name, tensor in part[key].items():
                if name in merged[key]:
                    raise AssertionError(f"{name} is owned twice")
                merged[key][name] = tensor[:131] if tensor.shape[0] == 136 else tensor
    return merged


@lru_cache(maxsize=16)
def reference(arch: Architecture, silent_half: bool, views: int = 1) -> dict[str, object]:
    """The oracle's three steps from the product's own initial weights."""
    one = Layout("reference", tied=arch.tie_word_embeddings, kv_heads=arch.num_key_value_heads)
    if arch.num_hidden_layers == 5:
        one = replace(one, layers=(5,))
    weights = initial_weights(one)
    steps = [
        [
            oracle.NoisyDocument(
                torch.from_numpy(d.ids).long(),
                torch.from_numpy(d.labels).long(),
                torch.from_numpy(noise.masked),
                divisors(noise),
            )
            for row in rows
            for d in row
            for noise in d.noises(views)
        ]
        for rows in make_steps(silent_half)
    ]
    result = oracle.train(
        weights,
        arch,
        steps,
        BLOCK,
        MASK_ID,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
    )
    return {**result, "initial": weights}


_initial: dict[Layout, dict[str, torch.Tensor]] = {}


def initial_weights(layout: Layout) -> dict[str, torch.Tensor]:
    """Initial weights of the model as one process makes them (needs a process group)."""
    if layout not in _initial:
        step, _ = build(layout, build_mesh(torch.device("cpu"), 1, 1))
        _initial[layout] = {
            n: (t[:131] if t.shape[0] == 136 else t)
            for n, t in _full({k: p.detach() for k, p in step.parameters.items()}).items()
        }
    return _initial[layout]


def mismatches(
    result: dict[str, object], expected: dict[str, object], rtol: float = 1e-9
) -> list[str]:
    """Everything in which a run differs from the oracle; empty when equal.

    Every element of a tensor must agree to rtol of its own size, plus FLOOR of the tensor's
    largest element, which is what cancellation leaves of an element near zero (measured over
    all layouts: gradients 6e-15, weights after three steps 5e-12).
    """
    found: list[str] = []
    for key in ("losses", "norms"):
        if not np.allclose(result[key], expected[key], rtol=rtol, atol=0):
            found.append(f"{key}: {result[key]} != {expected[key]}")
    for key in ("initial", "gradients", "weights"):
        ours, theirs = result[key], expected[key]
        tied_names = {"lm_head.weight"} - set(theirs)
        missing = set(theirs) - set(ours)
        extra = set(ours) - set(theirs) - tied_names
        if missing or extra:
            found.append(f"{key}: missing {sorted(missing)}, extra {sorted(extra)}")
        for name in sorted(set(ours) & set(theirs)):
            scale = theirs[name].abs().max().clamp(min=1e-12)
            allowed = rtol * theirs[name].abs() + FLOOR * scale
            excess = ((ours[name] - theirs[name]).abs() / allowed).max().item()
            if not excess <= 1.0:
                found.append(f"{key} {name}: {excess:.2e} times the allowed error")
        for name in tied_names & set(ours):
            twin = ours["model.embed_tokens.weight"]
            if not torch.equal(ours[name], twin):
                found.append(f"{key} {name}: differs from its tied twin")
    return found
