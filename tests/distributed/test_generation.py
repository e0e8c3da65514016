"""Every layout decodes the tokens of the one-process reference sampler, also between steps."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.layouts import BLOCK, LR, MASK_ID, Layout, build, make_steps, micro_batches
from distributed.world import run_world

from megatron_sdar.generation.decoder import generate_batch, generate_over_data_parallel
from megatron_sdar.generation.reference_sampler import generate
from megatron_sdar.generation.sampler_config import GenerationResult, SamplerConfig
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel import inference
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh

LENGTHS = (6, 0, 9, 3, 21)
CONFIGS = [
    SamplerConfig(BLOCK, MASK_ID, (), 10, denoising_steps=3),
    SamplerConfig(2 * BLOCK, MASK_ID, (), 13, None, "dynamic", 0.1, 1.2, 20, 0.95, 3),
]
LAYOUTS = [
    Layout("tp2_untrimmed", tp=2, trim=False),
    Layout("tp2_pp2", tp=2, pp=2, sequence_parallel=True),
    Layout("tp2_dp2_zero3", tp=2, dp=2, sequence_parallel=True, strategy="optim_grads_params"),
    Layout("pp2_dp2_interleaved", pp=2, dp=2, vpp=2, recompute="full"),
    Layout("tp4_kv_heads_below_tp", tp=4, sequence_parallel=True),
    Layout("dp4_no_shard", dp=4, strategy="no_shard"),
]
# Every layout takes the whole world: ranks that tp and pp leave over are data-parallel.
LAYOUTS = [replace(layout, dp=4 // (layout.tp * layout.pp)) for layout in LAYOUTS]


def _mesh(layout: Layout) -> ParallelMesh:
    return build_mesh(torch.device("cpu"), layout.tp, layout.pp, layout.strategy == "no_shard")


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, MASK_ID, size=length).tolist() for length in LENGTHS]


def _stored(results: list[GenerationResult]) -> list[Any]:
    return [[list(result.ids), result.num_forwards, result.stopped] for result in results]


def _decode_everywhere(layout: Layout, directory: Path) -> None:
    """On every rank: each way to share the prompts out gives the reference's answers."""
    mesh = _mesh(layout)
    stages = list(build(layout, mesh)[0].stages)
    expected = json.loads((directory / "expected.json").read_text())
    prompts = _prompts()
    for config, answers in zip(CONFIGS, expected, strict=True):
        heard: dict[int, list[int]] = defaultdict(list)
        shared = generate_over_data_parallel(
            stages, mesh, prompts, config, lambda i, new, heard=heard: heard[i].extend(new)
        )
        assert _stored(shared) == answers, layout.name
        assert heard == {i: answers[i][0] for i in range(mesh.dp_rank, 5, mesh.dp_size)}
        # Replica r has r + 1 prompts; the last one of several has none.
        mine = list(range(mesh.dp_rank + 1))
        if mesh.dp_rank == mesh.dp_size - 1 > 0:
            mine = []
        own = generate_batch(stages, mesh, [prompts[i] for i in mine], config, request_ids=mine)
        assert _stored(own) == [answers[i] for i in mine], layout.name


def _train_with_and_without(layout: Layout) -> None:
    """Decoding between two steps changes no bit of the weights, and sees the new ones."""
    mesh = _mesh(layout)
    weights, answers = [], []
    for decodes in (False, True):
        step, _ = build(layout, mesh)
        for rows in make_steps(False)[:2]:
            step.run(micro_batches(layout, rows, mesh.dp_rank), LR)
            if decodes:
                shards = [p for stage in step.stages for p in stage.parameters()]
                results = generate_batch(list(step.stages), mesh, _prompts()[:2], CONFIGS[0])
                held = [p for stage in step.stages for p in stage.parameters()]
                assert all(a is b for a, b in zip(shards, held, strict=True)), "still gathered"
                answers.append([result.ids for result in results])
        weights.append({n: p._local_tensor.clone() for n, p in step.parameters.items()})
    assert answers[0] != answers[1]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def _one_replica_fails(layout: Layout) -> None:
    """A bad prompt of one replica ends the call of all with the same message."""
    mesh = _mesh(layout)
    stages = list(build(layout, mesh)[0].stages)
    prompt = [MASK_ID] if mesh.dp_rank == 1 else [3]
    with pytest.raises(ValueError, match="prompt token 0 is the mask token"):
        generate_batch(stages, mesh, [prompt], CONFIGS[0])


def _damaged_weights(layout: Layout) -> None:
    """What the last stage of one replica finds is known everywhere."""
    mesh = _mesh(layout)
    stages = list(build(layout, mesh)[0].stages)
    last = stages[-1]
    assert isinstance(last, SdarStage)
    if last.stage.is_last:
        with torch.no_grad():
            last.model.norm.weight._local_tensor.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        generate_batch(stages, mesh, [[3], [4, 5]], CONFIGS[0])


def _in_bfloat16(layout: Layout) -> None:
    """What travels between stages has the dtype of the activations, not of the weights."""
    mesh = _mesh(layout)
    stages = list(build(layout, mesh)[0].stages)
    results = generate_over_data_parallel(stages, mesh, _prompts(), CONFIGS[0])
    assert [len(result.ids) for result in results] == [10] * 5


def _with_own_logits_only(layout: Layout, directory: Path) -> None:
    """A mutant: a rank takes its own shard for the whole vocabulary. It must be noticed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            inference, "all_gather_tokens", lambda x, group: x.repeat(dist.get_world_size(group), 1)
        )
        with pytest.raises(AssertionError, match=layout.name):
            _decode_everywhere(layout, directory)


@pytest.mark.usefixtures("single_process")
def test_every_layout_decodes_the_references_tokens(tmp_path: Path) -> None:
    one = Layout("reference")
    (stage,) = build(one, build_mesh(torch.device("cpu"), 1, 1))[0].stages
    assert isinstance(stage, SdarStage)
    expected = [
        _stored([generate(stage, p, config, request_id=i) for i, p in enumerate(_prompts())])
        for config in CONFIGS
    ]
    assert len({tuple(answer[0]) for answers in expected for answer in answers}) == 10
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    tp2_dp2, pp2_dp2 = LAYOUTS[2], LAYOUTS[3]
    run_world(
        4,
        [
            *((_decode_everywhere, (layout, tmp_path)) for layout in LAYOUTS),
            (_train_with_and_without, (tp2_dp2,)),
            (_train_with_and_without, (pp2_dp2,)),
            (_one_replica_fails, (pp2_dp2,)),
            (_damaged_weights, (LAYOUTS[1],)),
            (_in_bfloat16, (replace(pp2_dp2, bf16=True),)),
            (_with_own_logits_only, (LAYOUTS[0], tmp_path)),
        ],
        tmp_path,
    )
