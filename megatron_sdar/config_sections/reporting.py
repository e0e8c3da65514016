"""Keys of what is reported of a run, and to whom."""

from dataclasses import dataclass

from megatron_sdar.config_sections.key import key


@dataclass(frozen=True)
class ReportingConfig:
    """What is reported of a run, beside trainer_log.jsonl, and to whom."""

    logging_first_step: bool = key("log the first step, too, whatever logging_steps says", False)
    report_to: tuple[str, ...] = key(
        "experiment trackers, each through its own library; all: those that are installed; none "
        "(or null): no tracker",
        (),
        choices=("tensorboard", "wandb", "swanlab", "mlflow", "all"),
        advice="or none",
    )
    run_name: str | None = key("the run's name in trackers; default: output_dir's", None)
    logging_dir: str | None = key(
        "where tensorboard's and swanlab's files lie; default: runs in output_dir", None
    )
    project_name: str | None = key(
        "project (mlflow: experiment) of the run; default: what the tracker's own settings say",
        None,
    )
    include_effective_tokens_per_second: bool = key(
        "write effective_tokens_per_sec, tokens of packed rows (pads included) per second and "
        "process, to train_results.json",
        False,
    )
    report_mfu: bool = key(
        "report model FLOPs per second over what matrix products reach here, measured once", True
    )
    slow_rank_factor: float = key(
        "at every log line compare the ranks, a few milliseconds, and name one that takes more "
        "than this many times the usual time: for its own work (and 0.05 s and 5 percent of a step "
        "more) at two lines in a row, or for matrix products at four. 0: never",
        2.0,
        minimum=0,
    )
    peak_tflops_per_device: float | None = key(
        "what MFU is relative to, in place of a measurement: a data sheet's TFLOP/s", None, above=0
    )
