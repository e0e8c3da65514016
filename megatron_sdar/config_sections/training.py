"""Keys of the run: where it writes, how long it goes, what it keeps."""

from dataclasses import dataclass

from megatron_sdar.config_sections.key import key


@dataclass(frozen=True)
class TrainingConfig:
    """The run: where it writes, how long it goes, what it keeps."""

    output_dir: str = key("directory of checkpoints, metrics and the final model")
    overwrite_output_dir: bool = key(
        "start afresh in a directory that holds a run (torchrun's restarts go on, see job_id)",
        False,
    )
    stage: str = key(
        "sft: answers are trained; pt: continued pretraining on plain text",
        "sft",
        choices=("sft", "pt"),
        advice="reward models and preference training are not available",
    )
    do_train: bool = key("must stay true", True, choices=(True,), advice="this program only trains")
    trust_remote_code: bool = key("accepted, unused: no code of a model directory runs", False)
    num_train_epochs: float = key("passes over the data", 3.0, above=0)
    max_steps: int = key("optimizer steps; above 0 it replaces num_train_epochs", -1, minimum=-1)
    per_device_train_batch_size: int = key("rows per micro-batch", 8, minimum=1)
    gradient_accumulation_steps: int = key("micro-batches per optimizer step", 1, minimum=1)
    global_batch_size: int | None = key(
        "rows of an optimizer step over all processes; gradient_accumulation_steps follows from it "
        "and from the number of processes, so the batch stays when that changes",
        None,
        minimum=1,
    )
    seed: int = key("seed of weights, order and noise", 42, minimum=0, maximum=2**63 - 1)
    bf16: bool = key("compute in bfloat16 over float32 weights", False)
    fp64: bool = key("compute in float64, to verify numerics", False)
    recompute_granularity: str | None = key(
        "what the backward pass computes again: full: whole layers (least memory, a third more "
        "work); selective: norms and rotations only (nearly free); none. Default: full",
        None,
        choices=("full", "selective", "none"),
    )
    disable_gradient_checkpointing: bool = key("LLaMA-Factory's recompute_granularity: none", False)
    gradient_checkpointing: bool | None = key("false: recompute_granularity: none", None)
    logging_steps: float = key("steps between metrics; below 1: fraction of all steps", 10, above=0)
    save_steps: float = key("steps between checkpoints; below 1: fraction", 500, above=0)
    save_strategy: str = key(
        "when checkpoints are written, beside the last one; epoch: save_steps becomes an epoch's "
        "share of the run; best: after each evaluation that is better than all before it",
        "steps",
        choices=("steps", "epoch", "best", "no"),
    )
    save_total_limit: int | None = key("checkpoints kept; default: all", None, minimum=1)
    save_only_model: bool = key("leave out the optimizer: smaller, cannot be resumed", False)
    async_save: bool = key(
        "save while training goes on; costs host memory for a copy of what each process saves (12 "
        "bytes per parameter that it holds, 4 with save_only_model, twice that with fp64)",
        True,
    )
    resume_from_checkpoint: bool | str | None = key(
        "true: the newest that is not damaged, or a path", None
    )
    job_id: str | None = key(
        "a job that begins again goes on from what it saved itself, whatever overwrite_output_dir "
        "and resume_from_checkpoint say; such as Slurm's job id. Default: one launch of torchrun, "
        "its restarts included",
        None,
    )
    verify_checkpoints: bool = key(
        "read every file of a checkpoint once and compare its checksum before it is resumed; "
        "false: compare sizes only",
        True,
    )
    plot_loss: bool = key("write training_loss.png", False)
    export_hf: bool = key("write Hugging Face safetensors at the end", True)
    device: str = key("where to compute", "auto", choices=("auto", "cpu", "cuda"))
