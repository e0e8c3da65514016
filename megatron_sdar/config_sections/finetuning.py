"""Keys of which weights are trained: all of them, low-rank updates beside them, or some layers."""

from dataclasses import dataclass

from megatron_sdar.config_sections.key import key

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXTRA_MODULES = ("embed_tokens", "lm_head", "norm")
LAYER_MODULES = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class FinetuningConfig:
    """Which weights are trained."""

    finetuning_type: str = key(
        "full: every weight; lora: low-rank updates beside frozen weights; freeze: some layers. "
        "LLaMA-Factory's default is lora",
        "full",
        choices=("full", "lora", "freeze"),
        advice="orthogonal finetuning (oft) is not available",
    )
    lora_rank: int = key("lora: rank of the updates", 8, minimum=1)
    lora_alpha: int | None = key(
        "lora: updates are scaled by lora_alpha / lora_rank; default: 2 * lora_rank",
        None,
        minimum=1,
    )
    lora_dropout: float = key(
        "lora: probability that an update does not see an element of its input; which ones follows "
        "from seed and micro-batch, not from the layout",
        0.0,
        minimum=0,
        below=1,
    )
    lora_target: tuple[str, ...] = key(
        "lora: linear layers that get updates; all: every one but lm_head",
        ("all",),
        choices=("all", *LORA_TARGETS),
    )
    additional_target: tuple[str, ...] = key(
        "lora: modules trained as a whole beside the updates and saved in the adapter; norm is "
        "every norm, as in PEFT",
        (),
        choices=EXTRA_MODULES,
    )
    use_rslora: bool = key("lora: scale by lora_alpha / sqrt(lora_rank)", False)
    adapter_name_or_path: str | None = key(
        "lora: directory of a PEFT adapter whose training goes on; its rank, alpha and targets "
        "must be those given here",
        None,
    )
    freeze_trainable_layers: int = key(
        "freeze: how many decoder layers are trained: the last ones, or the first if negative", 2
    )
    freeze_trainable_modules: tuple[str, ...] = key(
        "freeze: what of these layers is trained; all: everything",
        ("all",),
        choices=("all", *LAYER_MODULES),
    )
    freeze_extra_modules: tuple[str, ...] = key(
        "freeze: modules outside the layers that are trained too; norm is every norm, as in "
        "LLaMA-Factory",
        (),
        choices=EXTRA_MODULES,
    )
