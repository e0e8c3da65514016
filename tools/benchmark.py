"""Measure what this project claims, on this machine: ratios of things run in turn.

Each subcommand prints a table of figures beside the goals and writes them as JSON on request.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_sdar.benchmark.attention import AttentionOptions, measure_attention
from megatron_sdar.benchmark.attention_report import plot_attention, show_attention
from megatron_sdar.benchmark.data import measure_data, show_figures
from megatron_sdar.benchmark.linear_cross_entropy import (
    LinearCrossEntropySize,
    measure_linear_cross_entropy,
    show_linear_cross_entropy,
)
from megatron_sdar.benchmark.step import measure_step
from megatron_sdar.benchmark.step_data import read_corpus
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.step_report import plot_step, show_step
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.data.loading.packing import check_row_size

_EXAMPLE = """\
examples:
  python tools/benchmark.py data                      # generated arithmetic problems
  python tools/benchmark.py data --input gsm8k/train.jsonl --tokenizer Qwen3-1.7B \\
      --json figures.json
  python tools/benchmark.py attention --plot attention.png
  python tools/benchmark.py attention --dtype bfloat16 --length 8192 --heads 32 8 128
  python tools/benchmark.py loss --vocab 151936
  python tools/benchmark.py step --quick              # does it run? 40 seconds
  python tools/benchmark.py step --input gsm8k/train.jsonl --tokenizer Qwen3-1.7B \\
      --json step.json --plot step.png                # half an hour on 2 cores
"""
_STEP_HELP = """\
One optimizer step of a 42 M parameter model, in turn and on the same documents:

  peer        transformers' Qwen3, rows [noisy | clean], dense mask, SDPA, torch's AdamW
  paper       this trainer on the same whole copies
  exact       this trainer on the blocks that the loss depends on, packed by what is left
  exact bf16  the same with bf16 activations over fp32 weights
  floor       time of exact's matrix products at the rate of one large product

and the CPU time of TP2 with sequence parallelism, PP2 and FSDP2 over two gloo processes beside one
process. Losses are compared before anything is timed. Figures are ratios of neighbours in time;
what they are divided by is printed below the tables. The machine should have nothing else to do.
"""

Say = Callable[[str], None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_data, _add_attention, _add_loss, _add_step):
        command = add(commands)
        command.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    return parser


def _add_data(commands: Any) -> argparse.ArgumentParser:
    data: argparse.ArgumentParser = commands.add_parser(
        "data", help="tokenising, memory, packing, row assembly, waiting for rows"
    )
    data.set_defaults(run=_data)
    data.add_argument("--input", type=Path, metavar="JSONL", help="default: generated problems")
    data.add_argument("--tokenizer", type=Path, metavar="DIR", help="needed with --input")
    data.add_argument("--rounds", type=int, default=2, help="of each ratio (default %(default)s)")
    data.add_argument(
        "--repeat", type=int, default=20, help="size of the large input (default %(default)sx)"
    )
    return data


def _add_attention(commands: Any) -> argparse.ArgumentParser:
    attention: argparse.ArgumentParser = commands.add_parser(
        "attention",
        help="our backends, dense and per-document SDPA and the FLOP limit, in turn; waste",
    )
    attention.set_defaults(run=_attention)
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


def _add_loss(commands: Any) -> argparse.ArgumentParser:
    loss: argparse.ArgumentParser = commands.add_parser(
        "loss", help="chunked linear cross-entropy against the plain form: time and peak memory"
    )
    loss.set_defaults(run=_loss)
    loss.add_argument("--tokens", type=int, default=2048, help="masked (default %(default)s)")
    loss.add_argument("--hidden", type=int, default=512, help="size (default %(default)s)")
    loss.add_argument("--vocab", type=int, default=151_936, help="size (default %(default)s)")
    loss.add_argument("--rounds", type=int, default=2, help="(default %(default)s)")
    return loss


def _add_step(commands: Any) -> argparse.ArgumentParser:
    step: argparse.ArgumentParser = commands.add_parser(
        "step",
        help="a whole optimizer step: published code, ours, the floor; parallel overhead",
        description=_STEP_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    step.set_defaults(run=_step)
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
        help="of one process and the layouts (default %(default)s)",
    )
    step.add_argument(
        "--threads",
        type=int,
        default=defaults.threads,
        help="of torch for all forms (default: all cores, %(default)s)",
    )
    step.add_argument("--block-length", type=int, default=defaults.block_length)
    step.add_argument(
        "--quick", action="store_true", help="toy model and rows: shows that it runs, no more"
    )
    step.add_argument("--plot", type=Path, metavar="PNG", help="bar chart of answer tokens/s")
    return step


def _data(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sdar-benchmark-") as folder:
        if args.input is None:
            make_demo_data(Path(folder))
            args.input, args.tokenizer = Path(folder, "train.jsonl"), Path(folder, "model")
        elif args.tokenizer is None:
            raise ValueError("--input needs --tokenizer: a model directory")
        figures = measure_data(
            args.input, args.tokenizer, rounds=args.rounds, repeat=args.repeat, say=say
        )
    show_figures(figures)
    return asdict(figures)


def _attention(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    num_heads, num_kv_heads, head_dim = args.heads
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no GPU here; use --device cpu")
    if num_heads % num_kv_heads:
        raise ValueError(f"--heads: {num_heads} query heads do not divide by {num_kv_heads}")
    options = AttentionOptions(
        length=args.length,
        documents=args.documents,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_length=args.block_length,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        num_threads=args.threads,
        rounds=args.rounds,
    )
    figures = measure_attention(options, say)
    show_attention(figures)
    if args.plot is not None:
        plot_attention(figures, args.plot)
        say(f"plot: {args.plot}")
    return asdict(figures)


def _loss(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    say(f"loss: {args.rounds} rounds, each form in turn")
    size = LinearCrossEntropySize(args.tokens, args.hidden, args.vocab)
    figures = measure_linear_cross_entropy(size, rounds=args.rounds)
    show_linear_cross_entropy(figures)
    return asdict(figures)


def _step(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    for name in ("rows", "rounds", "peer_rounds", "parallel_rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    for length in args.lengths:
        check_row_size(length, args.block_length)
    options = StepOptions(
        lengths=tuple(args.lengths),
        rows=args.rows,
        rounds=args.rounds,
        peer_rounds=args.peer_rounds,
        parallel_rounds=args.parallel_rounds,
        threads=args.threads,
        block_length=args.block_length,
    )
    if args.quick:
        options = options.quick()
    with tempfile.TemporaryDirectory(prefix="sdar-benchmark-") as folder:
        if args.input is None:
            make_demo_data(Path(folder))
            args.input, args.tokenizer = Path(folder, "train.jsonl"), Path(folder, "model")
        elif args.tokenizer is None:
            raise ValueError("--input needs --tokenizer: a model directory")
        corpus = read_corpus(
            args.input,
            args.tokenizer,
            Path(folder),
            vocab_size=options.arch.vocab_size,
            block_length=options.block_length,
            seed=options.seed,
            max_documents=options.max_documents,
        )
    figures = measure_step(options, corpus, say)
    show_step(figures)
    if args.plot is not None:
        plot_step(figures, args.plot)
        say(f"plot: {args.plot}")
    return figures.to_json()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        figures = args.run(args, lambda line: print(line, file=sys.stderr, flush=True))
        if args.json is not None:
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
