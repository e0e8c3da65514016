"""AdamW over local shards, with LLaMA-Factory's decay groups and checkpointable state.

The update is elementwise, so it runs on plain local tensors (about 4x faster than on DTensors)
and its moments have the parameters' layout. Invariant: moments exist from construction, so a
checkpoint can be loaded into them in place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_sdar.config import OptimConfig
from megatron_sdar.parallel.sharding import like_parameter, local_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
NO_DECAY = ("bias", "layernorm", "rmsnorm")


def takes_weight_decay(name: str) -> bool:
    """LLaMA-Factory's rule: no decay for names holding bias, layernorm or rmsnorm.

    As there, `q_norm`, `k_norm` and `model.norm` do decay.
    """
    return not any(word in name.lower() for word in NO_DECAY)


class ShardedAdamW:
    """torch's fused AdamW on the local shards of named parameters.

    Args:
        parameters: DTensor parameters by their global name; already materialised.
        config: learning rate, betas, epsilon, weight decay.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        self.parameters = dict(parameters)
        self.shards = {name: local_tensor(p).detach() for name, p in parameters.items()}
        decayed = [s for n, s in self.shards.items() if takes_weight_decay(n)]
        plain = [s for n, s in self.shards.items() if not takes_weight_decay(n)]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        filled = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(
            filled or [{"params": [torch.zeros(0)]}],  # a pipeline stage with nothing to train
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        for shard in self.shards.values():
            self.optimizer.state[shard] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                **{moment: torch.zeros_like(shard) for moment in MOMENTS},
            }

    def step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """Update all shards from their gradients (local shards by name)."""
        for name, shard in self.shards.items():
            current = local_tensor(self.parameters[name])
            assert current.data_ptr() == shard.data_ptr(), f"{name} moved since construction"
            shard.grad = gradients[name]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for shard in self.shards.values():
            shard.grad = None

    def zero_grad(self, keep: bool = False) -> None:
        """Drop the parameters' gradients.

        Args:
            keep: set them to zero instead, and make those that are missing. A gradient outlives
                the activations around it: made among them, it would end up in a hole that the
                next micro-batch's activations then do not fit. FSDP makes gradients itself.
        """
        for parameter in self.parameters.values():
            if not keep:
                parameter.grad = None
            elif parameter.grad is None:
                zeros = torch.zeros_like(local_tensor(parameter))
                parameter.grad = like_parameter(zeros, _distributed(parameter))
            else:
                local_tensor(parameter.grad).zero_()

    def moments(self) -> dict[str, DTensor]:
        """All moments as DTensors of the parameters' layout: '{name}.exp_avg' and so on."""
        return {
            f"{name}.{moment}": like_parameter(
                self.optimizer.state[shard][moment], _distributed(self.parameters[name])
            )
            for name, shard in self.shards.items()
            for moment in MOMENTS
        }

    def set_step_count(self, steps: int) -> None:
        """Tell the bias correction how many updates the loaded moments have seen."""
        for shard in self.shards.values():
            self.optimizer.state[shard]["step"].fill_(steps)


def _distributed(parameter: nn.Parameter) -> DTensor:
    assert isinstance(parameter, DTensor), "parameters are DTensors"
    return parameter
