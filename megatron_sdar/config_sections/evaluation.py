"""Keys of evaluation: on what, when, how, and what follows from it."""

from dataclasses import dataclass

from megatron_sdar.config_sections.key import key


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training: on what, when, how, and what follows from it."""

    eval_dataset: tuple[str, ...] = key(
        "names in dataset_info.json, or paths of .jsonl files, to evaluate on", ()
    )
    eval_data_path: tuple[str, ...] = key(
        "prefixes written by tools/preprocess_data.py to evaluate on", ()
    )
    do_eval: bool = key("evaluate when training is done; eval_strategy does so too", False)
    eval_strategy: str = key(
        "when to evaluate; epoch: eval_steps becomes an epoch's share of the run",
        "no",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: float | None = key(
        "steps between evaluations; below 1: fraction of all steps. Default: logging_steps",
        None,
        above=0,
    )
    eval_on_start: bool = key("evaluate before the first step, too", False)
    per_device_eval_batch_size: int | None = key(
        "rows per micro-batch, which changes no number. Default: per_device_train_batch_size, "
        "since what fits in training fits here",
        None,
        minimum=1,
    )
    eval_on_each_dataset: bool = key(
        "report every evaluation set apart (eval_<name>_loss), besides all together (eval_loss)",
        False,
    )
    eval_max_documents: int | None = key(
        "first N documents of each evaluation set; default: all", None, minimum=1
    )
    eval_noise_levels: int = key(
        "ranges that [0, 1) is divided into; each document is evaluated once at a noise level of "
        "each range, and each range is reported (eval_loss_t0.25: t from 0.25 to the next)",
        8,
        minimum=1,
        maximum=1000,
    )
    eval_block_lengths: tuple[int, ...] = key(
        "block lengths to evaluate with, each reported as eval_loss_b<length>; the first one's is "
        "eval_loss. Default: the model's own",
        (),
        minimum=1,
    )
    eval_generate_samples: int = key(
        "documents of each evaluation set whose last answer is generated and compared with the "
        "true one (eval_exact_match: the number after ####, in \\boxed{}, or the last); 0: none",
        0,
        minimum=0,
    )
    eval_generate_max_new_tokens: int = key("longest generated answer, in tokens", 256, minimum=1)
    eval_denoising_steps: int | None = key(
        "forwards per block when generating; default: one per token", None, minimum=1
    )
    eval_remasking: str = key(
        "static: a fixed share of tokens per forward; dynamic: all that the model is sure of",
        "static",
        choices=("static", "dynamic"),
    )
    load_best_model_at_end: bool = key(
        "export the checkpoint that evaluated best; it outlives save_total_limit", False
    )
    metric_for_best_model: str = key("which metric says what is best", "eval_loss")
    greater_is_better: bool | None = key(
        "direction of metric_for_best_model; default: less for losses, more for others", None
    )
    early_stopping_steps: int | None = key(
        "stop after this many evaluations in a row without a better one", None, minimum=1
    )
