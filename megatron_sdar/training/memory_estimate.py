"""How much device memory a run needs on each pipeline rank, by arithmetic alone.

Counts what the trainer keeps: weights, moments, gradients, FSDP's gathered copies, activations of
the micro-batches in flight. Not counted: the CUDA context, NCCL's buffers, the allocator's holes;
RESERVE stands for them. The parts are exact where they are shapes (weights, moments) and upper
estimates where kernels decide (activations, transients): docs/parallelism.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from megatron_sdar.architecture import Architecture, padded_vocab_size
from megatron_sdar.checkpoint.safetensors_files import volume
from megatron_sdar.checkpoint.tensor_names import model_tensor_shapes
from megatron_sdar.config import SdarConfig
from megatron_sdar.model.finetuning import DOWN, UP, Finetuning
from megatron_sdar.model.partition import stage_ranges
from megatron_sdar.model.sdar import StageRange
from megatron_sdar.parallel.schedule import FORWARD, make_schedule
from megatron_sdar.training.finetuning import resolve_finetuning
from megatron_sdar.training.precision import precision

GIB = 2**30
# Share of a device left to what is not counted.
RESERVE = 0.1
# Logits of one chunk with their statistics and gradient (sdar_kernels.linear_cross_entropy).
_LOSS_CHUNK_BYTES = 128 * 2**20
_SPLIT_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_SPLIT_COLUMNS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one process of a pipeline rank (all of its tp and dp ranks need as much).

    Attributes:
        weights: this rank's shard of the parameters, float32.
        moments: AdamW's two, of what is trained.
        gradients: whole ones where they wait for the step's last backward, else reduced shards;
            and those that are being reduced.
        gathered: FSDP's copies of parameters in the dtype of the computation.
        activations: what the micro-batches in flight keep for their backward.
        transient: what one layer's backward and the loss need on top while they run.
    """

    weights: float
    moments: float
    gradients: float
    gathered: float
    activations: float
    transient: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def format(self) -> str:
        """One line in GiB."""
        parts = (f"{part.name} {getattr(self, part.name) / GIB:.1f}" for part in fields(self))
        return f"{self.total / GIB:.1f} GiB ({', '.join(parts)})"


def estimate_memory(config: SdarConfig, arch: Architecture, world_size: int) -> list[RankMemory]:
    """Memory by pipeline rank, first stage first.

    Args:
        config: validated for arch and world_size.
        arch: the model as it is trained (untied embeddings).
    """
    parallel = config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    ranges = stage_ranges(arch.num_hidden_layers, pp * vpp, parallel.num_layers_per_pipeline_stage)
    chunks = [[ranges[chunk * pp + rank] for chunk in range(vpp)] for rank in range(pp)]
    in_flight = _layers_in_flight(chunks, config.training.gradient_accumulation_steps)
    dp = world_size // (pp * parallel.tensor_model_parallel_size)
    return [
        _rank_memory(config, arch, stages, layers, dp)
        for stages, layers in zip(chunks, in_flight, strict=True)
    ]


def parameter_counts(
    config: SdarConfig, arch: Architecture, stages: Iterable[StageRange]
) -> Mapping[str, int]:
    """Local elements of every parameter that a tp rank of these stages holds, before dp."""
    tp = config.parallel.tensor_model_parallel_size
    rows = padded_vocab_size(arch.vocab_size, config.model.make_vocab_size_divisible_by)
    finetuning = resolve_finetuning(config.finetuning, arch.num_hidden_layers)
    shapes = finetuning.adapted(model_tensor_shapes(arch, rows))
    kept = list(stages)
    return {
        name: volume(shape) // _split(name, arch.num_key_value_heads, tp)
        for name, shape in shapes.items()
        if any(_holds(stage, name) for stage in kept)
    }


def _holds(stage: StageRange, name: str) -> bool:
    if name.startswith("model.layers."):
        return stage.start <= int(name.split(".")[2]) < stage.end
    return stage.is_first if name == "model.embed_tokens.weight" else stage.is_last


def _split(name: str, num_key_value_heads: int, tp: int) -> int:
    """Over how many tp ranks the parameter is divided; the rest hold copies."""
    parts = name.split(".")
    factor = parts[-2] if parts[-2] in (DOWN, UP) else None
    module = parts[-2] if factor is None else parts[-3]
    by_rows = module in _SPLIT_ROWS and factor != DOWN
    by_columns = module in _SPLIT_COLUMNS and factor != UP
    if not (by_rows or by_columns):
        return 1
    # Fewer heads than ranks: every rank holds all of them (parallel.layers).
    return 1 if module in ("k_proj", "v_proj") and num_key_value_heads % tp else tp


def _layers_in_flight(chunks: list[list[StageRange]], num_micro_batches: int) -> list[int]:
    """By pipeline rank: the most layers whose forward awaits its backward at one time."""
    most = []
    for rank, actions in enumerate(make_schedule(len(chunks), len(chunks[0]), num_micro_batches)):
        now = peak = 0
        for action in actions:
            stage = chunks[rank][action.chunk]
            now += (stage.end - stage.start) * (1 if action.kind == FORWARD else -1)
            peak = max(peak, now)
        most.append(peak)
    return most


def _rank_memory(
    config: SdarConfig, arch: Architecture, stages: list[StageRange], in_flight: int, dp: int
) -> RankMemory:
    dtypes = precision(config)
    stored, computed = dtypes.params.itemsize, dtypes.compute.itemsize
    strategy = config.parallel.data_parallel_sharding_strategy
    has_fsdp = dp > 1 or dtypes.params != dtypes.compute
    shards = 1 if strategy == "no_shard" else dp
    finetuning = resolve_finetuning(config.finetuning, arch.num_hidden_layers)
    counts = parameter_counts(config, arch, stages)
    held = sum(counts.values())
    trained = _trained(counts, finetuning)
    # FSDP's largest groups of parameters: what lies outside the layers, and a layer beside the
    # one that is fetched ahead.
    outside = {name: n for name, n in counts.items() if not name.startswith("model.layers.")}
    one_layer = {name: n for name, n in counts.items() if f".layers.{stages[0].start}." in name}
    frees = strategy == "optim_grads_params"
    waits = config.training.gradient_accumulation_steps > 1 and not frees
    gathered, gradients = 0.0, float(stored * trained)
    if has_fsdp:
        group = sum(outside.values()) + 2 * sum(one_layer.values())
        gathered = computed * (min(held, group) if frees else held)
        trained_group = _trained(outside, finetuning) + 2 * _trained(one_layer, finetuning)
        reducing = min(trained, trained_group)
        if waits:
            gradients += stored * reducing
        else:
            gradients = stored * trained / shards + (stored + computed) * reducing
    activations, transient = _activation_bytes(config, arch, stages[-1].is_last, in_flight)
    return RankMemory(
        weights=stored * held / shards,
        moments=2 * stored * trained / shards,
        gradients=gradients,
        gathered=gathered,
        activations=activations,
        transient=transient,
    )


def _trained(counts: Mapping[str, int], finetuning: Finetuning) -> int:
    return sum(count for name, count in counts.items() if finetuning.trains(name))


def _activation_bytes(
    config: SdarConfig, arch: Architecture, is_last: bool, in_flight: int
) -> tuple[float, float]:
    """(kept for backward, needed on top by a layer's backward and the loss)."""
    parallel, tp = config.parallel, config.parallel.tensor_model_parallel_size
    size = precision(config).compute.itemsize
    tokens = config.training.per_device_train_batch_size * config.row_length
    hidden = arch.hidden_size
    stream = hidden / (tp if parallel.sequence_parallel else 1)
    query = arch.num_attention_heads * arch.head_dim / tp
    key = max(arch.num_key_value_heads / tp, 1) * arch.head_dim
    inner = arch.intermediate_size / tp
    # Elements per token that a layer keeps: both residual streams and both normed ones; q, its
    # turned form and the attention's result; k, its turned form and v; gate and up.
    everything = 4 * stream + 3 * (query + key) + 2 * inner
    kept = {
        "none": everything,
        "selective": 2 * stream + 2 * (query + key + inner),
        "full": stream,
    }[config.training.recompute_granularity or "full"]
    # Of gate, up and their product the gradients, and the product once more.
    transient = 2 * hidden + max(4 * inner, 3 * query)
    if kept == stream:
        transient += everything  # the layer that is computed again
    loss = 0.0
    if is_last:
        # Masked tokens are at most the noisy half: their hidden state, its norm, their gradients.
        loss = 4 * hidden * (tokens / 2) * size + _LOSS_CHUNK_BYTES
    return in_flight * tokens * kept * size, max(tokens * transient * size, loss)
