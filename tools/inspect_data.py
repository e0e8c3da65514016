"""Show packed rows as training sees them: tools/inspect_data.py PREFIX --tokenizer DIR."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_sdar.data.inspection import InspectRequest, inspect_dataset
from megatron_sdar.data.loading.packing import TRUNCATE_MODES

_DESCRIPTION = """\
Print rows of token files as they are trained: what is prompt, answer, masked and padding, and
where blocks end, for one seed and epoch. Then the lengths of all documents.
"""
_EXAMPLE = """\
examples:
  python tools/inspect_data.py tokens/math --tokenizer Qwen3-1.7B-Base
  python tools/inspect_data.py tokens/math --tokenizer Qwen3-1.7B-Base --document 17 --epoch 3
  python tools/inspect_data.py tokens/math --tokenizer Qwen3-1.7B-Base --rows 0 --plot lengths.png
"""


def _parser() -> argparse.ArgumentParser:
    defaults = InspectRequest((), "")
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prefixes", nargs="+", metavar="PREFIX", help="token files, packed together")
    add("--tokenizer", required=True, metavar="DIR", help="the one that the files were made with")
    add("--rows", type=int, default=defaults.rows, metavar="N", help="default %(default)s")
    add("--document", type=int, metavar="ID", help="show this document only")
    add("--epoch", type=int, default=defaults.epoch, metavar="N", help="default %(default)s")
    add("--seed", type=int, default=defaults.seed, metavar="N", help="default %(default)s")
    add("--cutoff-len", type=int, default=defaults.cutoff_len, metavar="L", help="%(default)s")
    add("--block-length", type=int, default=defaults.block_length, metavar="B", help="%(default)s")
    add("--noise-eps", type=float, default=defaults.noise_eps, metavar="E", help="%(default)s")
    add(
        "--truncate-mode",
        choices=TRUNCATE_MODES,
        help="documents longer than a row (default as in training: cut, plain text split)",
    )
    add("--plot", type=Path, metavar="FILE", help="also draw the lengths as an image (.png)")
    add("--width", type=int, metavar="N", help="columns (default: those of the terminal)")
    add("--no-color", action="store_true", help="brackets and marks only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = vars(_parser().parse_args(argv))
    console = Console(width=args.pop("width"), no_color=args.pop("no_color"), highlight=False)
    try:
        inspect_dataset(InspectRequest(**args), console)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
