"""Keys of what a run does when numbers go wrong, and of how it looks for that."""

from dataclasses import dataclass

from megatron_sdar.config_sections.key import key


@dataclass(frozen=True)
class GuardConfig:
    """What happens to steps that are not finite, and checks that replicas and layouts agree."""

    max_skipped_steps: int = key(
        "steps whose loss or gradient is not finite that a run, its resumes included, may skip: "
        "weights and moments stay, schedule and data go on, output_dir/skipped_steps/step-N.json "
        "says which documents it was; one more ends the run (0: the first one)",
        3,
        minimum=0,
    )
    save_skipped_step: bool = key(
        "when max_skipped_steps ends the run, save its weights first as the checkpoint of that "
        "step, so that the next start goes on behind its rows; false: it meets them again",
        True,
    )
    check_weight_hash_interval: int = key(
        "steps between comparisons of all copies of parameters that several processes hold, bit "
        "for bit; a difference ends the run. 0: never",
        0,
        minimum=0,
    )
    check_parallel: bool = key(
        "before the first step compare loss and every parameter's gradient norm with those of "
        "one process without parallelism, on few micro-batches; a difference ends the run",
        False,
    )
    check_parallel_device: str = key(
        "where check_parallel's one process computes, which holds the whole model and its "
        "gradients beside rank 0's part of the run; auto: as device",
        "auto",
        choices=("auto", "cpu"),
    )
