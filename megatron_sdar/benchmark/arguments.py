"""Arguments of the benchmark's subcommands, one function each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from megatron_sdar.benchmark.attention import AttentionOptions
from megatron_sdar.benchmark.model_shapes import MODEL_CONFIGS
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.view_forms import ViewsOptions

_STEP_HELP = """\
One optimizer step of a 42 M parameter model, in turn and on the same documents:

  peer        transformers' Qwen3, rows [noisy | clean], dense mask, SDPA, torch's AdamW
  paper       this trainer on the same whole copies
  exact       this trainer on the blocks that the loss depends on, packed by what is left
  two views   exact with two complementary noisy copies behind one clean copy of each document,
              which the peer takes as two rows
  exact bf16  exact with bf16 activations over fp32 weights; left out where the CPU has no bf16
              units and would take 50 times as long
  floor       time of exact's matrix products at the rate of one large product beside the step

and the CPU time of TP2 with sequence parallelism, PP2 and FSDP2 over two gloo processes beside one
process. Losses are compared before anything is timed. Figures are ratios of neighbours in time;
what they are divided by is printed below the tables. The machine should have nothing else to do.
"""
_VIEWS_HELP = """\
Gradient variance against FLOPs of 1, 2 and 4 noisy views on one clean copy, drawn independently or
in complementary pairs. The model is trained a little first. Efficiency is variance times FLOPs of
one view over that of the form: above 1, the same compute leaves less variance.
"""
_SCHEDULES_HELP = """\
Gradient variance over noise against the squared mean gradient, for one t per document or
per block, drawn alone or stratified, clipped ranges of p, and flat weights. The model is trained a
little first.
"""
_CONVERT_HELP = """\
HF -> native -> HF of a model with random weights, every tensor compared bitwise, in turn with cp -r
of the same bytes; then loading it into tensor-parallel ranks, and saving a run. 4b and 8b are the
real sizes: 26 and 49 GB of disk, 2 and 5 minutes.
"""


def add_data(commands: Any) -> argparse.ArgumentParser:
    """`data`: the data path."""
    data: argparse.ArgumentParser = commands.add_parser(
        "data", help="tokenising, memory, packing, row assembly, waiting for rows"
    )
    data.add_argument("--input", type=Path, metavar="JSONL", help="default: generated problems")
    data.add_argument("--tokenizer", type=Path, metavar="DIR", help="needed with --input")
    data.add_argument("--rounds", type=int, default=2, help="of each ratio (default %(default)s)")
    data.add_argument(
        "--repeat", type=int, default=20, help="size of the large input (default %(default)sx)"
    )
    return data


def add_attention(commands: Any) -> argparse.ArgumentParser:
    """`attention`: attention's paths."""
    attention: argparse.ArgumentParser = commands.add_parser(
        "attention",
        help="our backends, dense and per-document SDPA and the FLOP limit, in turn; waste",
    )
    defaults = AttentionOptions()
    attention.add_argument(
        "--length",
        type=int,
        default=defaults.length,
        help="tokens of one copy, rows hold two (default %(default)s)",
    )
    attention.add_argument(
        "--documents",
        type=int,
        default=defaults.documents,
        help="how many share them in the packed row (default %(default)s)",
    )
    attention.add_argument(
        "--heads",
        type=int,
        nargs=3,
        metavar=("QUERY", "KEY", "DIM"),
        default=(defaults.num_heads, defaults.num_kv_heads, defaults.head_dim),
        help="query heads, key heads, head size (default 8 4 64; SDAR-8B: 32 8 128)",
    )
    attention.add_argument("--block-length", type=int, default=defaults.block_length)
    attention.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="(default %(default)s)",
    )
    attention.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: a GPU if there is one)",
    )
    attention.add_argument(
        "--threads",
        type=int,
        default=defaults.num_threads,
        help="of torch on a CPU (default %(default)s: the least disturbed)",
    )
    attention.add_argument(
        "--rounds", type=int, default=defaults.rounds, help="(default %(default)s)"
    )
    attention.add_argument("--plot", type=Path, metavar="PNG", help="bar chart of the times")
    return attention  # fmt: skip


def add_loss(commands: Any) -> argparse.ArgumentParser:
    """`loss`: the loss kernel."""
    loss: argparse.ArgumentParser = commands.add_parser(
        "loss", help="chunked linear cross-entropy against the plain form: time and peak memory"
    )
    loss.add_argument("--tokens", type=int, default=2048, help="masked (default %(default)s)")
    loss.add_argument("--hidden", type=int, default=512, help="size (default %(default)s)")
    loss.add_argument("--vocab", type=int, default=151_936, help="size (default %(default)s)")
    loss.add_argument("--rounds", type=int, default=2, help="(default %(default)s)")
    return loss


def add_step(commands: Any) -> argparse.ArgumentParser:
    """`step`: the optimizer step."""
    step: argparse.ArgumentParser = commands.add_parser(
        "step",
        help="a whole optimizer step: published code, ours, the floor; parallel overhead",
        description=_STEP_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = StepOptions()
    step.add_argument("--input", type=Path, metavar="FILE", help="default: generated problems")
    step.add_argument("--tokenizer", type=Path, metavar="DIR", help="needed with --input")
    step.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="L",
        default=defaults.lengths,
        help="tokens of one copy, rows hold two (default 2048 4096)",
    )
    step.add_argument(
        "--rows",
        type=int,
        default=defaults.rows,
        help="published rows of a step; exact needs about 3/4 of them (default %(default)s)",
    )
    step.add_argument(
        "--rounds", type=int, default=defaults.rounds, help="of our forms (default %(default)s)"
    )
    step.add_argument(
        "--peer-rounds",
        type=int,
        default=defaults.peer_rounds,
        help="of the peer, which takes minutes a step at 4096 (default %(default)s)",
    )
    step.add_argument(
        "--parallel-rounds",
        type=int,
        default=defaults.parallel_rounds,
        help="of one process and the layouts; 0 leaves them out (default %(default)s)",
    )
    step.add_argument(
        "--threads",
        type=int,
        default=defaults.threads,
        help="of torch for all forms (default: all cores, %(default)s)",
    )
    step.add_argument(
        "--fused-kernels",
        choices=("auto", "torch", "inductor"),
        default=defaults.fused_kernels,
        help="norms, rotary and SwiGLU of our forms, as in training; auto: inductor where a C++ "
        "compiler is found, with --quick torch (default %(default)s)",
    )
    step.add_argument(
        "--attention-backend",
        choices=("auto", "native", "tiled"),
        default=defaults.attention_backend,
        help="attention of our forms, as in training; auto: native where a C++ compiler is found "
        "(default %(default)s)",
    )
    step.add_argument("--block-length", type=int, default=defaults.block_length)
    step.add_argument(
        "--quick", action="store_true", help="toy model and rows: shows that it runs, no more"
    )
    step.add_argument("--plot", type=Path, metavar="PNG", help="bar chart of answer tokens/s")
    return step


def add_views(commands: Any) -> argparse.ArgumentParser:
    """`views`: gradient variance of several noisy views."""
    views: argparse.ArgumentParser = commands.add_parser(
        "views",
        help="gradient variance and FLOPs of several noisy views on one clean copy",
        description=_VIEWS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_measurement(views)
    views.add_argument("--plot", type=Path, metavar="PNG", help="bar chart of the efficiencies")
    return views


def add_schedules(commands: Any) -> argparse.ArgumentParser:
    """`schedules`: gradient variance of noise schedules."""
    schedules: argparse.ArgumentParser = commands.add_parser(
        "schedules",
        help="gradient variance of noise schedules",
        description=_SCHEDULES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_measurement(schedules)
    return schedules


def _add_measurement(views: argparse.ArgumentParser) -> None:
    """What gradient variances are measured on."""
    defaults = ViewsOptions()
    views.add_argument("--input", type=Path, metavar="FILE", help="default: generated problems")
    views.add_argument("--tokenizer", type=Path, metavar="DIR", help="needed with --input")
    views.add_argument("--documents", type=int, help=f"of a step (default {defaults.documents})")
    views.add_argument(
        "--draws",
        type=int,
        help=f"of noise, each for other documents (default {defaults.draws})",
    )
    views.add_argument(
        "--warmup-steps",
        type=int,
        help=f"of training before, on other documents (default {defaults.warmup_steps})",
    )
    views.add_argument(
        "--noise-eps",
        type=float,
        default=defaults.noise_eps,
        help="least masking probability (default %(default)s)",
    )
    views.add_argument("--block-length", type=int, default=defaults.block_length)
    views.add_argument(
        "--seed", type=int, default=defaults.seed, help="of weights and noise (default %(default)s)"
    )
    views.add_argument(
        "--quick", action="store_true", help="toy model, few draws: shows that it runs, no more"
    )


def add_convert(commands: Any) -> argparse.ArgumentParser:
    """`convert`: conversion, loading and saving of models of real size."""
    convert: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="speed and memory of conversion beside cp -r, of loading and of saving",
        description=_CONVERT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument(
        "--shape",
        choices=tuple(MODEL_CONFIGS),
        default="tiny",
        help="of the model, with random bfloat16 weights (default %(default)s)",
    )
    convert.add_argument("--rounds", type=int, default=2, help="(default %(default)s)")
    convert.add_argument(
        "--ranks",
        type=int,
        default=4,
        help="processes that load it, tensor parallel; 0: none (default %(default)s)",
    )
    convert.add_argument(
        "--saves",
        type=int,
        default=5,
        help="saves at once and in the background, of a 42 M parameter run; 0: none "
        "(default %(default)s)",
    )
    convert.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where to write, three times the model's size (default: a temporary directory)",
    )
    return convert
