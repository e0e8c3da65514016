"""The first module whose output is not finite is named, whatever kind of module it is."""

from __future__ import annotations

import math

import pytest
import torch
from distributed.layouts import Layout, build, make_steps, micro_batches

from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.parallel.sharding import local_tensor
from megatron_sdar.training.finite_outputs import OutputWatch, is_finite, not_finite_parameters
from megatron_sdar.training.nonfinite import not_finite_gradients
from megatron_sdar.training.step import NonFiniteStepError

pytestmark = pytest.mark.usefixtures("single_process")
LAST = "the last stage (final norm, head, loss)"
# The poisoned weight, and the module that must be named. Projections that
# are one step of autograd with others, and the last layer's attention, are no calls of modules.
CASES = {
    "model.layers.1.self_attn.k_proj.weight": "model.layers.1.self_attn",
    "model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp",
    "model.layers.2.mlp.down_proj.weight": "model.layers.2.mlp",
    "model.layers.2.self_attn.o_proj.weight": "model.layers.2.self_attn.o_proj",
    "model.layers.1.post_attention_layernorm.weight": "model.layers.1.post_attention_layernorm",
    "model.layers.3.self_attn.v_proj.weight": "model.layers.3",
    "lm_head.weight": LAST,
}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", CASES)
def test_the_first_module_is_named(name: str, recompute: str) -> None:
    step, _ = build(Layout("watch", recompute=recompute), build_mesh(torch.device("cpu"), 1, 1))
    rows = micro_batches(Layout("watch"), make_steps(False)[0], 0)
    watch = OutputWatch(step.stages)
    with watch.watching():
        step.backward(rows)
    assert watch.take() is None
    local_tensor(step.parameters[name]).detach().view(-1)[0] = math.nan
    assert not_finite_parameters(step.stages) == [name]
    with watch.watching(), pytest.raises(NonFiniteStepError):
        step.run(rows, 1e-3)
    found = watch.take()
    assert found is not None
    assert found.name == CASES[name]
    assert watch.take() is None, "it is asked once"
    assert name in not_finite_gradients(step)
    with pytest.raises(NonFiniteStepError):
        step.run(rows, 1e-3)
    assert watch.take() is None, "the hooks are gone"


def test_only_floating_point_is_judged() -> None:
    assert is_finite((torch.ones(2), torch.tensor([1]), None, "nan"))
    assert not is_finite((torch.ones(2), (torch.tensor([1.0, math.inf]),)))
