"""Evaluate a model: the diffusion loss on held-out data, and generated answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megatron_sdar.config import DataConfig, EvaluationConfig
from megatron_sdar.generation.text import DTYPES
from megatron_sdar.parallel.launch import leave_together
from megatron_sdar.parallel.mesh import read_launch_info
from megatron_sdar.training.evaluation import SAMPLES_NAME
from megatron_sdar.training.model_evaluation import ModelEvaluationRequest, evaluate_model

DESCRIPTION = """\
Evaluate a Hugging Face directory, a checkpoint-N, a run (its newest complete checkpoint) or a LoRA
adapter whose model lies where its adapter_config.json says.

eval_loss bounds the negative log-likelihood per label token (nats): every document is masked once
in each of --noise-levels ranges of t, with noise that is the same for every model, and a masked
token counts 1/p. eval_loss_t0.5 is the range that begins at t = 0.5, eval_accuracy the share of
masked tokens that the model would fill in rightly. Numbers do not depend on the layout.
"""
EPILOG = """\
examples:
  python tools/evaluate.py --model output --dataset gsm8k_test --dataset-dir data --output-dir eval
  python tools/evaluate.py --model SDAR-1.7B-Chat --data-path data/test --generate-samples 50 \\
      --output-dir eval/sdar
  torchrun --standalone --nproc_per_node 4 tools/evaluate.py --model output/checkpoint-500 \\
      --tensor-parallel-size 2 --data-path data/test --output-dir eval/500
"""


def parse_request(argv: Sequence[str] | None) -> ModelEvaluationRequest:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    data, evaluation = DataConfig(), EvaluationConfig()
    add("--model", required=True, type=Path, help="what to evaluate")
    add("--output-dir", required=True, type=Path, help="eval_results.json, answers, token files")
    add("--data-path", nargs="+", default=[], metavar="PREFIX",
        help="token files that tools/preprocess_data.py wrote")  # fmt: skip
    add("--dataset", nargs="+", default=[], metavar="NAME",
        help="names in dataset_info.json, or .jsonl files")  # fmt: skip
    add("--dataset-dir", default=data.dataset_dir, help="where dataset_info.json lies")
    add("--template", default=data.template, help=f"of --dataset (default: {data.template})")
    add("--cutoff-len", type=int, default=data.cutoff_len, metavar="N",
        help=f"longest document in tokens (default: {data.cutoff_len})")  # fmt: skip
    add("--max-documents", type=int, metavar="N", help="first N of each set (default: all)")
    add("--block-length", type=int, metavar="B", help="default: config.json's block_size")
    add("--block-lengths", nargs="+", type=int, default=[], metavar="B",
        help="evaluate with each of these")  # fmt: skip
    add("--noise-levels", type=int, default=evaluation.eval_noise_levels, metavar="N",
        help=f"ranges of t (default: {evaluation.eval_noise_levels})")  # fmt: skip
    add("--generate-samples", type=int, default=0, metavar="N",
        help="documents of each set whose last answer is generated and compared")  # fmt: skip
    add("--max-new-tokens", type=int, default=evaluation.eval_generate_max_new_tokens, metavar="N",
        help=f"longest answer (default: {evaluation.eval_generate_max_new_tokens})")  # fmt: skip
    add("--batch-size", type=int, default=1, metavar="N", help="rows per forward (default: 1)")
    add("--tensor-parallel-size", type=int, default=1, metavar="N")
    add("--pipeline-parallel-size", type=int, default=1, metavar="N")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="auto: bfloat16 on cuda, float32 on the CPU")  # fmt: skip
    found = parser.parse_args(argv)
    if not (found.data_path or found.dataset):
        parser.error("give --data-path or --dataset")
    for name in ("cutoff_len", "max_documents", "block_length", "noise_levels", "max_new_tokens",
                 "batch_size"):  # fmt: skip
        value = getattr(found, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    return ModelEvaluationRequest(
        found.model,
        found.output_dir,
        DataConfig(
            dataset_dir=found.dataset_dir, template=found.template, cutoff_len=found.cutoff_len
        ),
        EvaluationConfig(
            eval_dataset=tuple(found.dataset),
            eval_data_path=tuple(found.data_path),
            eval_on_each_dataset=len(found.dataset) + len(found.data_path) > 1,
            eval_max_documents=found.max_documents,
            eval_noise_levels=found.noise_levels,
            eval_block_lengths=tuple(found.block_lengths),
            eval_generate_samples=found.generate_samples,
            eval_generate_max_new_tokens=found.max_new_tokens,
        ),
        found.block_length,
        found.batch_size,
        found.tensor_parallel_size,
        found.pipeline_parallel_size,
        found.device,
        found.dtype,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    request, launch = parse_request(argv), read_launch_info()
    is_main = launch.rank == 0
    console = Console(stderr=True)
    progress = Progress(console=console, disable=not (is_main and console.is_terminal))

    def say(text: str) -> None:
        if is_main:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    try:
        with progress:
            task = progress.add_task("evaluation", total=None)
            metrics = evaluate_model(
                request, launch, say, lambda rows: progress.advance(task, rows)
            )
    except (ValueError, OSError) as error:
        if launch.world_size > 1:
            leave_together(str(error), launch)
        print(f"error: {error}", file=sys.stderr)
        return 1
    if is_main:
        width = max(map(len, metrics))
        for name, value in metrics.items():
            print(f"{name:<{width}}  {value:.4f}")
        if request.evaluation.eval_generate_samples:
            print(f"answers: {request.output_dir / SAMPLES_NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
