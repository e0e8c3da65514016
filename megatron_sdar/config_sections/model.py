"""Keys of the model: which one, how it starts, how it is computed."""

from dataclasses import dataclass

from megatron_sdar.config_sections.key import key


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained and how it starts."""

    model_name_or_path: str = key("directory with config.json (and weights and tokenizer)")
    tokenizer_name_or_path: str | None = key(
        "tokenizer directory; default: the model directory", None
    )
    train_from_scratch: bool = key("start from random weights, not from the directory's", False)
    make_vocab_size_divisible_by: int = key(
        "round the embedding's rows up to a multiple of this", 128, minimum=1
    )
    mask_token_init: str = key(
        "first value of the <|MASK|> embedding row when the weights never trained it",
        "auto",
        choices=("auto", "mean", "mean_noise", "keep"),
    )
    attention_backend: str = key(
        "attention implementation; auto: FlexAttention or our Triton kernels on a GPU, native "
        "(C++, built once where g++ is installed) or tiled on a CPU, whichever first passes a "
        "numerical check when the run starts",
        "auto",
        choices=("auto", "flex", "triton", "native", "tiled", "reference"),
    )
    attention_autotune: bool = key(
        "time the Triton attention kernels' tile sizes when the run starts, and use the fastest",
        False,
    )
    fused_kernels: str = key(
        "norms, rotary, SwiGLU and loss; auto: triton on a GPU where its self-check passes; "
        "inductor: compiled for this CPU when the run starts, with the machine's C++ compiler",
        "auto",
        choices=("auto", "torch", "triton", "inductor"),
    )
