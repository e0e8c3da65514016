"""Measure what this project claims, on this machine: ratios of things run in turn.

Each subcommand prints a table of figures beside the goals and writes them as JSON on request.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_sdar.benchmark.data import measure_data, show_figures
from megatron_sdar.data.demo import make_demo_data

_EXAMPLE = """\
examples:
  python tools/benchmark.py data                      # generated arithmetic problems
  python tools/benchmark.py data --input gsm8k/train.jsonl --tokenizer Qwen3-1.7B \\
      --json figures.json
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser(
        "data", help="tokenising, memory, packing, row assembly, waiting for rows"
    )
    data.add_argument("--input", type=Path, metavar="JSONL", help="default: generated problems")
    data.add_argument("--tokenizer", type=Path, metavar="DIR", help="needed with --input")
    data.add_argument("--rounds", type=int, default=2, help="of each ratio (default %(default)s)")
    data.add_argument(
        "--repeat", type=int, default=20, help="size of the large input (default %(default)sx)"
    )
    data.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="sdar-benchmark-") as folder:
            if args.input is None:
                make_demo_data(Path(folder))
                args.input, args.tokenizer = Path(folder, "train.jsonl"), Path(folder, "model")
            elif args.tokenizer is None:
                raise ValueError("--input needs --tokenizer: a model directory")
            figures = measure_data(
                args.input,
                args.tokenizer,
                rounds=args.rounds,
                repeat=args.repeat,
                say=lambda line: print(line, file=sys.stderr, flush=True),
            )
        show_figures(figures)
        if args.json is not None:
            args.json.write_text(json.dumps(asdict(figures), indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
