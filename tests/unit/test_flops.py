"""FLOPs of a step: against numbers worked out by hand, and against what torch says was run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import OptimConfig
from megatron_sdar.config_sections.finetuning import LORA_TARGETS
from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.diffusion.rows import Row, build_row, concatenate_rows, full_copies
from megatron_sdar.model.finetuning import EVERYTHING, Finetuning
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, initialize_factors, materialize
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.lora import LoraOptions
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.flops import RowWork, StepFlops, step_flops
from megatron_sdar.training.step import TrainingStep, trained_parameters

# Every size is another number, so that none can stand in for another.
ARCH = Architecture(
    vocab_size=52,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
    max_position_embeddings=64,
)
CPU = torch.device("cpu")


def _row(padding: int = 0) -> Row:
    """One document of 3 blocks of 4 with tokens 5, 8 and 9 masked, both copies whole."""
    ids = np.arange(12, dtype=np.int32)
    masked = np.isin(np.arange(12), (5, 8, 9))
    document = full_copies(ids, ids, 4, NoiseDraw(0.5, masked))
    return build_row([document], 24 + padding, 4, 51, 0)


def test_the_work_of_a_row_counted_by_hand() -> None:
    # Clean blocks see 4, 8 and 12 keys; noisy ones their own 4 and the clean ones before.
    pairs = 4 * (4 + 8 + 12) + 4 * (4 + 8 + 12)
    assert RowWork.of(_row()) == RowWork(24, pairs, 3, 8 + 12 + 12)
    assert RowWork.of(_row(padding=8)) == RowWork(32, pairs + 8, 3, 32)


def test_rows_on_one_axis_are_the_sum_of_rows() -> None:
    both = step_flops(ARCH, [RowWork.of(concatenate_rows([_row(), _row(8)]))], trimmed=True)
    assert both == step_flops(ARCH, [RowWork.of(_row()), RowWork.of(_row(8))], trimmed=True)


def test_flops_worked_out_by_hand() -> None:
    one = Architecture(**{**vars(ARCH), "num_hidden_layers": 1})
    # 10 tokens, 30 pairs, 2 masked tokens with 7 pairs.
    work = [RowWork(10, 30, 2, 7)]
    whole = step_flops(one, work, trimmed=False)
    # Forward: q and o 20 x 24, k and v 20 x 8; gate, up, down 20 x 28; head 20 x 52.
    assert whole == StepFlops(
        projections=3 * 10 * (2 * 2 * 20 * 24 + 2 * 2 * 20 * 8),
        attention=3 * 30 * (2 * 2 * 24),
        mlp=3 * 10 * (3 * 2 * 20 * 28),
        head=3 * 2 * (2 * 20 * 52),
    )
    trimmed = step_flops(one, work, trimmed=True)
    assert trimmed == StepFlops(
        projections=3 * (2 * 2 * 2 * 20 * 24 + 10 * 2 * 2 * 20 * 8),
        attention=3 * 7 * (2 * 2 * 24),
        mlp=3 * 2 * (3 * 2 * 20 * 28),
        head=whole.head,
    )
    two = step_flops(replace(one, num_hidden_layers=2), work, trimmed=True)
    assert two.attention == trimmed.attention + whole.attention
    assert two.mlp == trimmed.mlp + whole.mlp
    assert two.projections == trimmed.projections + whole.projections
    assert two.total == two.projections + two.attention + two.mlp + two.head


def test_a_step_without_rows_costs_nothing() -> None:
    assert step_flops(ARCH, [], trimmed=True).total == 0


def _added_product(total: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    """FLOPs of addmm_, which the head's gradient is summed with; torch counts addmm only."""
    return 2 * left[0] * left[1] * right[1]


def _batched_product(left: torch.Size, right: torch.Size, **_: object) -> int:
    """As torch counts, but for a norm's sums, which become products where its weight is frozen."""
    return 0 if right[2] == 1 else 2 * left[0] * left[1] * left[2] * right[2]


def _everyone_sees_everyone(row: Row) -> Row:
    """The same row under a mask without a hidden pair, as the dense reference computes any."""
    tokens = row.num_tokens
    intervals = np.tile(np.array([0, tokens, tokens, tokens], dtype=np.int32), (tokens, 1))
    return replace(row, key_intervals=intervals)


LORA = LoraOptions(5, 7.0, LORA_TARGETS)
TRAINED = {
    "everything": EVERYTHING,
    "lora": Finetuning(LORA, extra=frozenset()),
    "lora_on_some": Finetuning(
        replace(LORA, targets=("k_proj", "down_proj")), extra=frozenset({"lm_head"})
    ),
    "last_layer": Finetuning(layers=range(2, 3), extra=frozenset()),
    "attention_of_two": Finetuning(
        layers=range(1, 3), parts=frozenset({"self_attn"}), extra=frozenset()
    ),
    "mlp_of_one": Finetuning(layers=range(1), parts=frozenset({"mlp"}), extra=frozenset()),
    "norms": Finetuning(layers=range(0), extra=frozenset({"norm"})),
    "head": Finetuning(layers=range(0), extra=frozenset({"lm_head"})),
}


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_torch_counts_the_same(name: str, trimmed: bool, single_process: None) -> None:
    finetuning = TRAINED[name]
    mesh = build_mesh(CPU, 1, 1)
    options = ModelOptions(
        padded_vocab_size=ARCH.vocab_size,
        dtype=torch.float32,
        sequence_parallel=False,
        recompute="none",
        attention_backend="reference",
        trim_last_layer=trimmed,
        finetuning=finetuning,
    )
    modules = build_stages(ARCH, mesh, options)
    materialize(modules, CPU)
    initialize(modules, 0)
    initialize_factors(modules, 0)
    stages = [stage for stage in modules if isinstance(stage, SdarStage)]
    optimizer = ShardedAdamW(trained_parameters(stages), OptimConfig())
    step = TrainingStep(ARCH, mesh, stages, optimizer)
    rows = [_everyone_sees_everyone(_row(padding)) for padding in (0, 8)]
    counts = {torch.ops.aten.addmm_: _added_product, torch.ops.aten.bmm: _batched_product}
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        step.backward(rows)
    works = [RowWork.of(row) for row in rows]
    expected = step_flops(ARCH, works, trimmed=trimmed, finetuning=finetuning)
    assert counter.get_total_flops() == expected.total
