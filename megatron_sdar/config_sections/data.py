"""Keys of the data: which documents are read and how they become rows."""

from dataclasses import dataclass

from megatron_sdar.config_sections.key import key


@dataclass(frozen=True)
class DataConfig:
    """Which documents are read and how they become rows."""

    dataset: tuple[str, ...] = key(
        "names in DATASET_DIR/dataset_info.json, or .jsonl paths; exclusive with data_path", ()
    )
    dataset_dir: str = key("directory of dataset_info.json", "data")
    data_path: tuple[str, ...] = key("prefixes written by tools/preprocess_data.py", ())
    tokenized_path: str | None = key(
        "prefix that keeps what `dataset` tokenises to; default: under output_dir. A folder that "
        "LLaMA-Factory wrote is read in place of dataset",
        None,
    )
    overwrite_cache: bool = key("tokenise again even when tokenized_path is complete", False)
    template: str = key(
        "chat template; chat_template: the tokenizer's own",
        "qwen3",
        choices=("qwen3", "qwen3_nothink", "chat_template"),
    )
    llamafactory_version: str = key(
        "whose template behaviour: 0.9.4 is the SDAR fork's, 0.9.6 upstream's (thoughts without "
        "newlines are recognised)",
        "0.9.4",
        choices=("0.9.4", "0.9.6"),
    )
    cutoff_len: int = key("tokens of one packed row", 2048, minimum=1)
    block_length: int | None = key(
        "diffusion block; default: block_size of config.json", None, minimum=1
    )
    truncate_mode: str | None = key(
        "a document longer than a row: cut shortens its prompts and answers, drop leaves it out, "
        "split makes several of it; default: cut, for stage pt split",
        None,
        choices=("cut", "drop", "split"),
    )
    packing_algorithm: str = key(
        "exact_fill: as few rows as can be; llamafactory: the published rows, defects included",
        "exact_fill",
        choices=("exact_fill", "llamafactory"),
    )
    neat_packing: bool = key("several documents per row, isolated from each other", True)
    packing: bool | None = key("LLaMA-Factory's other name of neat_packing", None)
    enable_thinking: bool | None = key(
        "empty think block: true trains it, false puts it in the prompt, null adds it there only "
        "where an answer has none",
        True,
    )
    mask_history: bool = key("train on the last turn only", False)
    train_on_prompt: bool = key("train on prompts too", False)
    default_system: str | None = key("system prompt of documents that have none", None)
    max_samples: int | None = key("first N documents of each dataset", None, minimum=1)
    mix_strategy: str = key(
        "several datasets: concat; interleave_under: take turns until the first is used up; "
        "interleave_over: until all are, repeating the short ones; blend: rows in the proportions "
        "of blend_weights, each dataset in epochs of its own",
        "concat",
        choices=("concat", "interleave_under", "interleave_over", "blend"),
    )
    interleave_probs: str | None = key(
        "interleave: how likely each dataset is, such as 0.7,0.3; default: in turn", None
    )
    blend_weights: str | None = key(
        "blend: one weight per dataset, such as 0.7,0.3; they may change at a step: "
        "0.7,0.3; 0.5,0.5 @1000",
        None,
    )
    val_size: float = key(
        "documents held out of training: a number, or below 1 a fraction", 0.0, minimum=0
    )
    preprocessing_num_workers: int | None = key(
        "tokenising processes; default: one per core", None, minimum=1
    )
    dataloader_num_workers: int = key(
        "processes that build rows ahead; 0: a thread of the trainer does", 0, minimum=0
    )
    disable_shuffling: bool = key("keep the file order", False)
    on_data_error: str = key(
        "a malformed record stops the run, or is skipped, counted and reported",
        "raise",
        choices=("raise", "skip"),
    )
