"""Compare the losses of training runs: mean of the last steps, differences, one plot."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_sdar.training.run_comparison import (
    compare_runs,
    plot_comparison,
    read_losses,
    show_comparison,
)

_EXAMPLE = """\
example:
  python tools/compare_runs.py output/paper output/exact --last 100 --plot loss_curves.png
"""
_FILE_WIDTH = 120


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="output_dir of a run; first: base")
    add("--last", type=int, default=100, metavar="N", help="steps compared (default %(default)s)")
    add(
        "--window", type=int, default=20, metavar="N",
        help="logged losses in a running mean of the plot (default %(default)s)",
    )  # fmt: skip
    add("--plot", type=Path, metavar="PNG", help="draw all curves there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = _parser().parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    try:
        for name in ("last", "window"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1")
        runs = [read_losses(run) for run in args.runs]
        show_comparison(compare_runs(runs, args.last), console)
        if args.plot is not None:
            plot_comparison(runs, args.window, args.plot)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
