"""Every configuration key: its section, type, default, help and admissible values.

One frozen dataclass per concern; the field name is the key of the flat YAML file. Names and
defaults are LLaMA-Factory's where the key is theirs and Megatron's for parallel sizes. What is
true of one value alone is declared beside its field and checked by `value_problem`; what
relates several values lives in config_rules.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field
from typing import Any

LR_SCHEDULER_TYPES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
)


def _key(help: str, default: Any = MISSING, *, factory: Any = MISSING, **limits: Any) -> Any:
    """One key. Limits: choices, advice (said when a choice is refused), minimum, maximum,
    above and below (both exclusive)."""
    return field(default=default, default_factory=factory, metadata={"help": help, **limits})


def value_problem(key: Field[Any], value: object) -> str | None:
    """Return why `value` is inadmissible for `key`, or None. Assumes the type is right.

    None always passes (only optional keys can hold it); the items of a tuple are checked one
    by one.
    """
    limits = key.metadata
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        choices = limits.get("choices")
        if choices is not None and item not in choices:
            words = " or ".join(_word(choice) for choice in choices)
            advice = f"; {limits['advice']}" if "advice" in limits else ""
            return f"{key.name}: {_word(item)} is not supported; use {words}{advice}"
        for name, holds, text in (
            ("minimum", lambda item, limit: item >= limit, "at least"),
            ("maximum", lambda item, limit: item <= limit, "at most"),
            ("above", lambda item, limit: item > limit, "greater than"),
            ("below", lambda item, limit: item < limit, "less than"),
        ):
            if name in limits and not holds(item, limits[name]):
                return f"{key.name}: {item} is out of range; it must be {text} {limits[name]}"
    return None


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained and how it starts."""

    model_name_or_path: str = _key("directory with config.json (and weights and tokenizer)")
    tokenizer_name_or_path: str | None = _key(
        "tokenizer directory; default: the model directory", None
    )
    train_from_scratch: bool = _key("start from random weights, not from the directory's", False)
    make_vocab_size_divisible_by: int = _key(
        "round the embedding's rows up to a multiple of this", 128, minimum=1
    )
    mask_token_init: str = _key(
        "first value of the <|MASK|> embedding row when the weights never trained it",
        "auto",
        choices=("auto", "mean", "mean_noise", "keep"),
    )
    attention_backend: str = _key(
        "attention implementation; auto: FlexAttention or our Triton kernels on a GPU, tiled on "
        "CPU, whichever first passes a numerical check when the run starts",
        "auto",
        choices=("auto", "flex", "triton", "tiled", "reference"),
    )
    attention_autotune: bool = _key(
        "time the Triton attention kernels' tile sizes when the run starts, and use the fastest",
        False,
    )
    fused_kernels: str = _key(
        "norms, rotary, SwiGLU and loss; auto: triton on a GPU where its self-check passes",
        "auto",
        choices=("auto", "torch", "triton"),
    )


@dataclass(frozen=True)
class DataConfig:
    """Which documents are read and how they become rows."""

    dataset: tuple[str, ...] = _key(
        "names in DATASET_DIR/dataset_info.json, or .jsonl paths; exclusive with data_path", ()
    )
    dataset_dir: str = _key("directory of dataset_info.json", "data")
    data_path: tuple[str, ...] = _key("prefixes written by tools/preprocess_data.py", ())
    tokenized_path: str | None = _key(
        "prefix that keeps what `dataset` tokenises to; default: under output_dir", None
    )
    overwrite_cache: bool = _key("tokenise again even when tokenized_path is complete", False)
    template: str = _key(
        "chat template; chat_template: the tokenizer's own",
        "qwen3",
        choices=("qwen3", "qwen3_nothink", "chat_template"),
    )
    llamafactory_version: str = _key(
        "whose template behaviour: 0.9.4 is the SDAR fork's, 0.9.6 upstream's (thoughts without "
        "newlines are recognised)",
        "0.9.4",
        choices=("0.9.4", "0.9.6"),
    )
    cutoff_len: int = _key("tokens of one packed row", 2048, minimum=1)
    block_length: int | None = _key(
        "diffusion block; default: block_size of config.json", None, minimum=1
    )
    truncate_mode: str | None = _key(
        "a document longer than a row: cut shortens its prompts and answers, drop leaves it out, "
        "split makes several of it; default: cut, for stage pt split",
        None,
        choices=("cut", "drop", "split"),
    )
    packing_algorithm: str = _key(
        "exact_fill: as few rows as can be; llamafactory: the published rows, defects included",
        "exact_fill",
        choices=("exact_fill", "llamafactory"),
    )
    neat_packing: bool = _key("several documents per row, isolated from each other", True)
    packing: bool | None = _key("LLaMA-Factory's other name of neat_packing", None)
    enable_thinking: bool | None = _key(
        "empty think block: true trains it, false puts it in the prompt, null adds it there only "
        "where an answer has none",
        True,
    )
    mask_history: bool = _key("train on the last turn only", False)
    train_on_prompt: bool = _key("train on prompts too", False)
    default_system: str | None = _key("system prompt of documents that have none", None)
    max_samples: int | None = _key("first N documents of each dataset", None, minimum=1)
    mix_strategy: str = _key(
        "several datasets: concat; interleave_under: take turns until the first is used up; "
        "interleave_over: until all are, repeating the short ones; blend: rows in the proportions "
        "of blend_weights, each dataset in epochs of its own",
        "concat",
        choices=("concat", "interleave_under", "interleave_over", "blend"),
    )
    interleave_probs: str | None = _key(
        "interleave: how likely each dataset is, such as 0.7,0.3; default: in turn", None
    )
    blend_weights: str | None = _key(
        "blend: one weight per dataset, such as 0.7,0.3; they may change at a step: "
        "0.7,0.3; 0.5,0.5 @1000",
        None,
    )
    val_size: float = _key(
        "documents held out of training: a number, or below 1 a fraction", 0.0, minimum=0
    )
    preprocessing_num_workers: int | None = _key(
        "tokenising processes; default: one per core", None, minimum=1
    )
    dataloader_num_workers: int = _key(
        "processes that build rows ahead; 0: a thread of the trainer does", 0, minimum=0
    )
    disable_shuffling: bool = _key("keep the file order", False)
    on_data_error: str = _key(
        "a malformed record stops the run, or is skipped, counted and reported",
        "raise",
        choices=("raise", "skip"),
    )


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise, what of it is computed, and the denominator of the loss."""

    semantics: str = _key(
        "exact: what cannot change the gradient is left out (noisy blocks without a masked token, "
        "clean blocks after a document's last kept one, last-layer work beyond masked tokens) and "
        "rows are packed by what is left; paper: every document in two whole copies",
        "exact",
        choices=("exact", "paper"),
    )
    row_length: int | None = _key(
        "tokens of a row, copies and padding included; fewer take less memory. Default: "
        "(1 + noisy_views) * cutoff_len, what the longest document may need",
        None,
        minimum=1,
    )
    noisy_views: int = _key(
        "noisy copies of a document that share its clean copy; each counts as a sample",
        1,
        minimum=1,
    )
    complementary_views: bool = _key(
        "every second noisy view masks exactly what the view before it left", False
    )
    noise_eps: float = _key(
        "least masking probability: p = (1 - eps) t + eps", 1e-3, above=0, below=1
    )
    loss_normalization: str = _key(
        "one global token mean per step, or the published mean of means",
        "global",
        choices=("global", "llamafactory"),
    )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are divided over the processes."""

    tensor_model_parallel_size: int = _key("processes that share every layer", 1, minimum=1)
    pipeline_model_parallel_size: int = _key("pipeline stages", 1, minimum=1)
    virtual_pipeline_model_parallel_size: int = _key(
        "model chunks per pipeline stage (interleaved schedule)", 1, minimum=1
    )
    context_parallel_size: int = _key(
        "processes that share one row",
        1,
        choices=(1,),
        advice="context parallelism is not available yet, use tensor_model_parallel_size",
    )
    expert_model_parallel_size: int = _key(
        "processes that share the experts",
        1,
        choices=(1,),
        advice="mixture-of-experts models are not available yet",
    )
    sequence_parallel: bool = _key("shard norms over the sequence; ignored without tp", True)
    num_layers_per_pipeline_stage: tuple[int, ...] | None = _key(
        "layers of each model chunk in order; default: as even as possible", None, minimum=1
    )
    data_parallel_sharding_strategy: str = _key(
        "no_shard: DDP; optim_grads: shard optimizer state and reduced gradients (ZeRO-2 between "
        "steps, gradients are reduced once per step); optim_grads_params: parameters too and "
        "gradients after every micro-batch (ZeRO-3)",
        "optim_grads",
        choices=("no_shard", "optim_grads", "optim_grads_params"),
    )
    deepspeed: str | None = _key(
        "LLaMA-Factory: its ZeRO stage sets data_parallel_sharding_strategy", None
    )
    ddp_timeout: int = _key("seconds until a stalled collective fails", 1800, minimum=1)
    ddp_backend: str | None = _key(
        "default: nccl on cuda, gloo on cpu", None, choices=("gloo", "nccl")
    )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = _key("peak learning rate", 5e-5, above=0)
    lr_scheduler_type: str = _key("schedule", "linear", choices=LR_SCHEDULER_TYPES)
    lr_scheduler_kwargs: Mapping[str, Any] = _key("schedule arguments", factory=dict)
    warmup_ratio: float = _key("warm-up as a fraction of all steps", 0.0, minimum=0, maximum=1)
    warmup_steps: int = _key("warm-up steps; above 0 it replaces warmup_ratio", 0, minimum=0)
    weight_decay: float = _key("AdamW weight decay", 0.0, minimum=0)
    adam_beta1: float = _key("AdamW beta1", 0.9, minimum=0, below=1)
    adam_beta2: float = _key("AdamW beta2", 0.999, minimum=0, below=1)
    adam_epsilon: float = _key("AdamW epsilon", 1e-8, above=0)
    max_grad_norm: float = _key("clip the global gradient norm; 0 turns it off", 1.0, minimum=0)


@dataclass(frozen=True)
class TrainingConfig:
    """The run: where it writes, how long it goes, what it keeps."""

    output_dir: str = _key("directory of checkpoints, metrics and the final model")
    overwrite_output_dir: bool = _key("start afresh in a directory that holds a run", False)
    stage: str = _key(
        "sft: answers are trained; pt: continued pretraining on plain text",
        "sft",
        choices=("sft", "pt"),
        advice="reward models and preference training are not available",
    )
    do_train: bool = _key(
        "must stay true", True, choices=(True,), advice="this program only trains"
    )
    finetuning_type: str = _key(
        "which weights are trained",
        "full",
        choices=("full",),
        advice="every weight is trained, set finetuning_type: full",
    )
    trust_remote_code: bool = _key("accepted, unused: no code of a model directory runs", False)
    num_train_epochs: float = _key("passes over the data", 3.0, above=0)
    max_steps: int = _key("optimizer steps; above 0 it replaces num_train_epochs", -1, minimum=-1)
    per_device_train_batch_size: int = _key("rows per micro-batch", 8, minimum=1)
    gradient_accumulation_steps: int = _key("micro-batches per optimizer step", 1, minimum=1)
    seed: int = _key("seed of weights, order and noise", 42, minimum=0, maximum=2**63 - 1)
    bf16: bool = _key("compute in bfloat16 over float32 weights", False)
    fp64: bool = _key("compute in float64, to verify numerics", False)
    recompute_granularity: str | None = _key(
        "what the backward pass computes again: full: whole layers (least memory, a third more "
        "work); selective: norms, rotations and SwiGLU only (nearly free); none. Default: full",
        None,
        choices=("full", "selective", "none"),
    )
    disable_gradient_checkpointing: bool = _key(
        "LLaMA-Factory's recompute_granularity: none", False
    )
    gradient_checkpointing: bool | None = _key("false: recompute_granularity: none", None)
    logging_steps: float = _key(
        "steps between metrics; below 1: fraction of all steps", 10, above=0
    )
    save_steps: float = _key("steps between checkpoints; below 1: fraction", 500, above=0)
    save_strategy: str = _key("when checkpoints are written", "steps", choices=("steps", "no"))
    save_total_limit: int | None = _key("checkpoints kept; default: all", None, minimum=1)
    save_only_model: bool = _key("leave out the optimizer: smaller, cannot be resumed", False)
    resume_from_checkpoint: bool | str | None = _key("true: the newest, or a path", None)
    plot_loss: bool = _key("write training_loss.png", False)
    report_to: str = _key(
        "experiment tracker",
        "none",
        choices=("none",),
        advice="trackers are not available yet; the metrics files are in output_dir",
    )
    export_hf: bool = _key("write Hugging Face safetensors at the end", True)
    device: str = _key("where to compute", "auto", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class SdarConfig:
    """The whole configuration. Functions receive the section they need, not this.

    `warnings` are the lines that loading wants the user to see; they are not part of the
    configuration's identity.
    """

    model: ModelConfig
    data: DataConfig
    diffusion: DiffusionConfig
    parallel: ParallelConfig
    optim: OptimConfig
    training: TrainingConfig
    warnings: tuple[str, ...] = field(default=(), compare=False)


SECTION_TYPES: Mapping[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "diffusion": DiffusionConfig,
    "parallel": ParallelConfig,
    "optim": OptimConfig,
    "training": TrainingConfig,
}
