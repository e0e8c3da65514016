"""Measure what this project claims, on this machine: ratios of things run in turn.

Each subcommand prints a table of figures beside the goals and writes them as JSON on request.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron_sdar.benchmark.arguments import (
    add_attention,
    add_convert,
    add_data,
    add_loss,
    add_schedules,
    add_step,
    add_views,
)
from megatron_sdar.benchmark.attention import AttentionOptions, measure_attention
from megatron_sdar.benchmark.attention_report import plot_attention, show_attention
from megatron_sdar.benchmark.convert import ConvertOptions, measure_convert
from megatron_sdar.benchmark.convert_report import show_convert
from megatron_sdar.benchmark.data import measure_data, show_figures
from megatron_sdar.benchmark.linear_cross_entropy import (
    LinearCrossEntropySize,
    measure_linear_cross_entropy,
    show_linear_cross_entropy,
)
from megatron_sdar.benchmark.schedules import measure_schedules, show_schedules
from megatron_sdar.benchmark.step import measure_step
from megatron_sdar.benchmark.step_data import Corpus, read_corpus
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.step_report import plot_step, show_step
from megatron_sdar.benchmark.view_forms import ViewsOptions
from megatron_sdar.benchmark.views import measure_views
from megatron_sdar.benchmark.views_report import plot_views, show_views
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
  python tools/benchmark.py views --input gsm8k/train.jsonl --tokenizer Qwen3-1.7B \\
      --json views.json --plot views.png              # ten minutes on 1 core
  python tools/benchmark.py schedules --input gsm8k/train.jsonl --tokenizer Qwen3-1.7B \
      --draws 32 --json schedules.json                # ten minutes on 1 core
  python tools/benchmark.py convert --shape 4b --json convert.json
"""
Say = Callable[[str], None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add, run in (
        (add_data, _data),
        (add_attention, _attention),
        (add_loss, _loss),
        (add_step, _step),
        (add_views, _views),
        (add_schedules, _schedules),
        (add_convert, _convert),
    ):
        command = add(commands)
        command.set_defaults(run=run)
        command.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    return parser


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
    for name, least in (("rows", 1), ("rounds", 1), ("peer_rounds", 1), ("threads", 1),
                        ("parallel_rounds", 0)):  # fmt: skip
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}")
    for length in args.lengths:
        check_row_size(length, args.block_length)
    options = StepOptions(
        lengths=tuple(args.lengths),
        rows=args.rows,
        rounds=args.rounds,
        peer_rounds=args.peer_rounds,
        parallel_rounds=args.parallel_rounds,
        threads=args.threads,
        fused_kernels=args.fused_kernels,
        attention_backend=args.attention_backend,
        block_length=args.block_length,
    )
    if args.quick:
        options = options.quick()
    corpus = _corpus(args, options)
    figures = measure_step(options, corpus, say, lambda known: _write(args.json, known.to_json()))
    show_step(figures)
    if args.plot is not None:
        plot_step(figures, args.plot)
        say(f"plot: {args.plot}")
    return figures.to_json()


def _views(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    options = _views_options(args)
    figures = measure_views(options, _corpus(args, options), say)
    show_views(figures)
    if args.plot is not None:
        plot_views(figures, args.plot)
        say(f"plot: {args.plot}")
    return figures.to_json()


def _schedules(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    options = _views_options(args)
    figures = measure_schedules(options, _corpus(args, options), say)
    show_schedules(figures)
    return figures.to_json()


def _views_options(args: argparse.Namespace) -> ViewsOptions:
    options = ViewsOptions(noise_eps=args.noise_eps, block_length=args.block_length, seed=args.seed)
    if args.quick:
        options = options.quick()
    chosen = ("documents", "draws", "warmup_steps")
    given = {name: getattr(args, name) for name in chosen if getattr(args, name) is not None}
    options = replace(options, **given)
    options.check()
    return options


def _convert(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    for name, least in (("rounds", 1), ("ranks", 0), ("saves", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}")
    options = ConvertOptions(args.shape, args.rounds, args.ranks, args.saves)
    with tempfile.TemporaryDirectory(prefix="sdar-benchmark-", dir=args.folder) as folder:
        figures = measure_convert(options, Path(folder), say)
    show_convert(figures)
    return figures.to_json()


def _corpus(args: argparse.Namespace, options: StepOptions | ViewsOptions) -> Corpus:
    """The documents of --input, or generated ones."""
    with tempfile.TemporaryDirectory(prefix="sdar-benchmark-") as folder:
        if args.input is None:
            make_demo_data(Path(folder))
            args.input, args.tokenizer = Path(folder, "train.jsonl"), Path(folder, "model")
        elif args.tokenizer is None:
            raise ValueError("--input needs --tokenizer: a model directory")
        return read_corpus(
            args.input,
            args.tokenizer,
            Path(folder),
            vocab_size=options.arch.vocab_size,
            block_length=options.block_length,
            seed=options.seed,
            max_documents=options.max_documents,
        )


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        figures = args.run(args, lambda line: print(line, file=sys.stderr, flush=True))
        _write(args.json, figures)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
