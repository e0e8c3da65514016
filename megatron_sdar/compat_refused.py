"""LLaMA-Factory and transformers keys that would change what is trained and are not available.

Each stands with the values that ask for nothing, besides null and false, and with what to do
instead. A pattern covers keys of one feature.
"""

from collections.abc import Mapping

_ADAMW = "AdamW is the optimizer; data_parallel_sharding_strategy saves its memory"
_STAGES = "only stage sft and pt are available, remove it"
_VOCABULARY = (
    "the vocabulary is the model's: add tokens to the model directory before training, remove it"
)
_LOSS = "the loss is that of block diffusion, remove it"

# Key or pattern -> (values that ask for nothing, besides null and false; what to do instead).
REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "adapter_folder": ((), "give the adapter's path as adapter_name_or_path"),
    "create_new_adapter": (
        (),
        "merge the old adapter with tools/merge_adapter.py and train on the result, remove it",
    ),
    "loraplus_lr_ratio": ((), "all adapters have one learning rate, remove it"),
    "use_dora": ((), "plain LoRA is what there is, or use_rslora; remove it"),
    "pissa_init": ((), "updates start at zero as in plain LoRA, remove it"),
    "use_llama_pro": ((), "blocks are not expanded, remove it"),
    "use_kt": ((), "use finetuning_type: lora, remove it"),
    "quantization_bit": ((), "weights are not quantised, remove it and set bf16: true"),
    "use_galore": ((), _ADAMW),
    "use_apollo": ((), _ADAMW),
    "use_badam": ((), _ADAMW),
    "use_muon": ((), "AdamW is the optimizer, remove it"),
    "use_adam_mini": ((), "AdamW is the optimizer, remove it"),
    "optim": (
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"),
        "AdamW is the optimizer, remove it",
    ),
    "adafactor": ((), "AdamW is the optimizer, remove it"),
    "fp16": ((), "use bf16: true"),
    "fp8": ((), "use bf16: true"),
    "shift_attn": ((), "attention is exact over whole rows, remove it"),
    "mixture_of_depths": ((), "every token passes every layer, remove it"),
    "rope_scaling": ((), "positions are the model's, up to max_position_embeddings; remove it"),
    "resize_vocab": ((), _VOCABULARY),
    "add_tokens": ((), _VOCABULARY),
    "add_special_tokens": ((), _VOCABULARY),
    "new_special_tokens_config": ((), _VOCABULARY),
    "split_special_tokens": ((), "special tokens are never split, remove it"),
    "neftune_noise_alpha": ((0,), "embedding noise is not available, remove it"),
    "label_smoothing_factor": ((0,), "label smoothing is not available, remove it"),
    "use_dft_loss": ((), _LOSS),
    "use_asft_loss": ((), _LOSS),
    "use_eaft_loss": ((), _LOSS),
    "use_distributed_optimizer": (
        (True,),
        "use data_parallel_sharding_strategy: no_shard | optim_grads | optim_grads_params",
    ),
    "use_mca": ((), "this trainer has Megatron's parallelism itself, remove it"),
    "use_hyper_parallel": ((), "use tensor_model_parallel_size and its like"),
    "sp_size": ((1,), "use tensor_model_parallel_size with sequence_parallel: true"),
    "auto_find_batch_size": ((), "set per_device_train_batch_size to what fits, remove it"),
    "push_to_hub": ((), "nothing is uploaded: upload output_dir when the run is done"),
    "enable_torch_profiler": ((), "tools/benchmark.py step measures a step, remove it"),
    "use_swanlab": ((), "write report_to: swanlab, with run_name and project_name"),
    "predict_with_generate": ((), "use tools/generate.py"),
    "do_predict": ((), "use tools/generate.py"),
    "eval_delay": ((0,), "evaluations begin at once, remove it"),
    "reward_model": ((), _STAGES),
    "reward_model_adapters": ((), _STAGES),
    "reward_model_quantization_bit": ((), _STAGES),
    "ref_model": ((), _STAGES),
    "ref_model_adapters": ((), _STAGES),
    "ref_model_quantization_bit": ((), _STAGES),
}
