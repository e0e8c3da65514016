"""The evaluation's sums in every kind of layout against the oracle, and what training sees of it.

In float64, without files: one start of four processes runs all layouts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import oracle
from distributed.layouts import (
    BLOCK,
    LR,
    MASK_ID,
    PAD_ID,
    Layout,
    build,
    initial_weights,
    make_steps,
    micro_batches,
)
from distributed.world import run_world
from numpy.typing import NDArray
from unit.token_lists import TokenList, pack

from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.row_options import RowOptions
from megatron_sdar.data.loading.row_stream import RowPart, RowStream
from megatron_sdar.diffusion.evaluation_noise import evaluation_noises
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh
from megatron_sdar.parallel.sharding import local_tensor
from megatron_sdar.training.evaluation_data import EvaluationSet
from megatron_sdar.training.evaluation_loss import LossEvaluation, loss_metrics
from megatron_sdar.training.evaluation_rows import EvaluationRows
from megatron_sdar.training.step import named_parameters

LEVELS, CUTOFF, BLOCK_LENGTHS = 3, 32, (4, 8)
# Several turns, an empty prompt, a single label token; sets of unlike size.
TURNS = {
    "many": [[3, 5], [10, 7, 2, 4], [0, 6], [5, 1], [9, 13], [1, 30]],
    "few": [[4, 9], [2, 2]],
}
# Each with rows per micro-batch and tokens per row: longer and shorter than what a document takes.
ALONE = [
    (Layout("one_row"), 1, 64),
    (Layout("five_rows_untrimmed", trim=False), 5, 24),
    (Layout("two_rows_tied", tied=True), 2, 40),
]
SPREAD = [
    (Layout("tp2_pp2", tp=2, pp=2, sequence_parallel=True), 2, 64),
    (Layout("tp2_dp2_zero3", tp=2, dp=2, sequence_parallel=True,
            strategy="optim_grads_params"), 1, 41),
    (Layout("pp2_dp2_interleaved", pp=2, dp=2, vpp=2), 3, 64),
    (Layout("pp4_tied", pp=4, tied=True), 1, 24),
    (Layout("dp4_zero2_more_ranks_than_work", dp=4), 50, 64),
    (Layout("dp4_zero3", dp=4, strategy="optim_grads_params"), 1, 64),
    (Layout("dp4_no_shard", dp=4, strategy="no_shard"), 1, 64),
]  # fmt: skip
TRAINED = [
    Layout("dp4_zero2", dp=4),
    Layout("pp2_dp2_interleaved_zero3", pp=2, dp=2, vpp=2, strategy="optim_grads_params"),
    Layout("tp2_dp2_zero3_bf16", tp=2, dp=2, strategy="optim_grads_params", bf16=True),
]


class SmallTokens(TokenList):
    """Ids of the tests' small vocabulary."""

    def get(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        ids, labels = super().get(index)
        small = (1 + (ids * 37) % 128).astype(np.int32)
        return small, np.where(labels < 0, labels, small)


@lru_cache
def evaluation_sets() -> list[EvaluationSet]:
    options = RowOptions(CUTOFF, BLOCK, MASK_ID, PAD_ID, 1e-3, seed=1)
    sets = []
    for name, turns in TURNS.items():
        store = DocumentStore([SmallTokens(turns, name)])
        stream = RowStream([RowPart(store, pack(store, cutoff_len=CUTOFF))], options)
        sets.append(EvaluationSet(name, stream, tuple((i, 0) for i in range(len(turns)))))
    return sets


def evaluate(
    evaluation: LossEvaluation,
    layout: Layout,
    row_length: int,
    block_lengths: tuple[int, ...] = BLOCK_LENGTHS,
) -> tuple[dict[str, float], int]:
    """Metrics, and how many rows were said to be done."""
    split = layout.tp if layout.sequence_parallel else 1
    advanced: list[int] = []
    sums = {
        (each.name, length): evaluation.run(
            EvaluationRows(each, length, LEVELS, row_length, split), LEVELS, advanced.append
        )
        for each in evaluation_sets()
        for length in block_lengths
    }
    return loss_metrics(sums, block_lengths, each_set=True), sum(advanced)


def mesh_of(layout: Layout) -> ParallelMesh:
    replicates = layout.strategy == "no_shard"
    return build_mesh(torch.device("cpu"), layout.tp, layout.pp, replicate_data_parallel=replicates)


def run_layout(layout: Layout, rows: int, row_length: int, directory: Path) -> None:
    mesh = mesh_of(layout)
    step, _ = build(layout, mesh)
    evaluation = LossEvaluation(step.stages, mesh, rows)
    metrics, advanced = evaluate(evaluation, layout, row_length)
    assert advanced > 0
    again, _ = evaluate(evaluation, layout, row_length)
    assert again == metrics, "two evaluations of the same weights"
    assert all(stage.training for stage in step.stages)
    path = directory / f"{layout.name}.{torch.distributed.get_rank()}.json"
    path.write_text(json.dumps(metrics))


def train_beside(layout: Layout) -> None:
    """Two steps with evaluations before, between and after are two steps without, bit for bit."""
    mesh = mesh_of(layout)
    found = []
    for evaluates in (False, True):
        step, _ = build(layout, mesh)
        evaluation = LossEvaluation(step.stages, mesh, 2) if evaluates else None
        for rows in make_steps(False)[:2]:
            if evaluation is not None:
                evaluate(evaluation, layout, 64, (BLOCK,))
            step.run(micro_batches(layout, rows, mesh.dp_rank), LR)
        if evaluation is not None:
            evaluate(evaluation, layout, 64, (BLOCK,))
        # As a checkpoint finds them: shards, though a forward gathers whole weights.
        parameters = named_parameters(step.stages)
        found.append({name: local_tensor(p).clone() for name, p in parameters.items()})
    without, beside = found
    assert without.keys() == beside.keys()
    for name, tensor in without.items():
        assert torch.equal(tensor, beside[name]), f"{layout.name}: {name}"


def document_sums(
    layout: Layout, ids: NDArray[np.int32], labels: NDArray[np.int32], number: int, block: int
) -> NDArray[np.float64]:
    """The oracle's (CE / p, right ones, masked ones) of a document, float64 [3, levels]."""
    missing = -ids.size % block
    tokens = torch.from_numpy(np.pad(ids, (0, missing), constant_values=PAD_ID)).long()
    maskable = np.pad(labels, (0, missing), constant_values=PAD_ID) != -100
    weights = initial_weights(replace(layout, name="weights"))
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    sums = np.zeros((3, LEVELS))
    for level, noise in enumerate(evaluation_noises(number, 0, maskable, range(LEVELS), LEVELS)):
        masked = torch.from_numpy(noise.masked)
        length = tokens.numel()
        hidden = oracle.hidden_states(
            weights,
            layout.arch,
            torch.cat((torch.where(masked, MASK_ID, tokens), tokens)),
            torch.arange(length).repeat(2),
            oracle.published_mask(length, block),
        )
        log_probs = (hidden[:length] @ head.T).log_softmax(-1)[masked]
        true = tokens[masked]
        sums[0, level] = -log_probs.gather(1, true[:, None]).sum() / noise.mask_prob
        sums[1, level] = (log_probs.argmax(-1) == true).sum()
        sums[2, level] = masked.sum()
    return sums


@lru_cache
def expected(tied: bool) -> dict[str, float]:
    """Every metric, from single documents."""
    layout = Layout("expected", tied=tied)
    metrics: dict[str, float] = {}
    for block in BLOCK_LENGTHS:
        total, total_labels = np.zeros((3, LEVELS)), 0
        for name, turns in TURNS.items():
            data, own, own_labels = SmallTokens(turns), np.zeros((3, LEVELS)), 0
            for number in range(len(turns)):
                ids, labels = data.get(number)
                own += document_sums(layout, ids, labels, number, block)
                own_labels += int((labels != -100).sum()) + -ids.size % block
            if block == BLOCK_LENGTHS[0]:
                metrics[f"eval_{name}_loss"] = own[0].mean() / own_labels
                metrics[f"eval_{name}_accuracy"] = own[1].sum() / own[2].sum()
            total, total_labels = total + own, total_labels + own_labels
        metrics[f"eval_loss_b{block}"] = total[0].mean() / total_labels
        if block == BLOCK_LENGTHS[0]:
            metrics["eval_loss"] = metrics[f"eval_loss_b{block}"]
            metrics["eval_accuracy"] = total[1].sum() / total[2].sum()
            for level, edge in enumerate(("0", "0.333333", "0.666667")):
                metrics[f"eval_loss_t{edge}"] = total[0, level] / total_labels
                metrics[f"eval_accuracy_t{edge}"] = total[1, level] / total[2, level]
    return metrics


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluated")
    jobs = [(run_layout, (*each, directory)) for each in SPREAD]
    run_world(4, [*jobs, *((train_beside, (layout,)) for layout in TRAINED)], directory)
    return directory


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize(("layout", "rows", "length"), ALONE, ids=[e[0].name for e in ALONE])
def test_one_process_is_the_oracle(layout: Layout, rows: int, length: int, tmp_path: Path) -> None:
    run_layout(layout, rows, length, tmp_path)
    check(layout, tmp_path, 1)


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("layout", [e[0] for e in SPREAD], ids=lambda layout: layout.name)
def test_every_layout_is_the_oracle(layout: Layout, spread: Path) -> None:
    """Training beside evaluations was compared bit for bit in the same start."""
    check(layout, spread, 4)


def check(layout: Layout, directory: Path, world: int) -> None:
    correct = expected(layout.tied)
    assert len({round(value, 6) for name, value in correct.items() if "loss" in name}) == 7
    for rank in range(world):
        found = json.loads((directory / f"{layout.name}.{rank}.json").read_text())
        assert found == pytest.approx(correct, rel=1e-9, abs=0), rank
