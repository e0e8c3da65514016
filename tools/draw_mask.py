"""Draw the attention mask of a small row, its key intervals and its tiles (DESIGN.md shows it)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_sdar.benchmark.mask_picture import draw_mask_picture


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python tools/draw_mask.py --output docs/mask.png"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/mask.png"), metavar="PNG",
        help="where to (default %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_mask_picture(args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
