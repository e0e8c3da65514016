"""Keys of how model and batch are divided over the processes."""

from dataclasses import dataclass

from megatron_sdar.config_sections.key import key


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are divided over the processes."""

    tensor_model_parallel_size: int = key("processes that share every layer", 1, minimum=1)
    pipeline_model_parallel_size: int = key("pipeline stages", 1, minimum=1)
    virtual_pipeline_model_parallel_size: int = key(
        "model chunks per pipeline stage (interleaved schedule)", 1, minimum=1
    )
    context_parallel_size: int = key(
        "processes that share one row",
        1,
        choices=(1,),
        advice="context parallelism is not available yet, use tensor_model_parallel_size",
    )
    expert_model_parallel_size: int = key(
        "processes that share the experts",
        1,
        choices=(1,),
        advice="mixture-of-experts models are not available yet",
    )
    sequence_parallel: bool = key("shard norms over the sequence; ignored without tp", True)
    num_layers_per_pipeline_stage: tuple[int, ...] | None = key(
        "layers of each model chunk in order; default: as even as possible", None, minimum=1
    )
    data_parallel_sharding_strategy: str = key(
        "no_shard: DDP; optim_grads: shard optimizer state and reduced gradients (ZeRO-2 between "
        "steps, gradients are reduced once per step); optim_grads_params: parameters too and "
        "gradients after every micro-batch (ZeRO-3)",
        "optim_grads",
        choices=("no_shard", "optim_grads", "optim_grads_params"),
    )
    deepspeed: str | None = key(
        "LLaMA-Factory: its ZeRO stage sets data_parallel_sharding_strategy", None
    )
    ddp_timeout: int = key("seconds until a stalled collective fails", 1800, minimum=1)
    watchdog_timeout: int | None = key(
        "seconds without progress of a rank until all ranks write what they are doing to "
        "output_dir/stalled-..., the missing ranks are named and the run ends; 0: never; default: "
        "nine tenths of ddp_timeout, at most 1800",
        None,
        minimum=0,
    )
    ddp_backend: str | None = key(
        "default: nccl on cuda, gloo on cpu", None, choices=("gloo", "nccl")
    )
