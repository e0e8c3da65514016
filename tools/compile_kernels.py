"""Compile the shipped Triton kernels for every architecture, without a GPU: registers, spills."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sdar_kernels.ahead_of_time import ARCHITECTURES
from sdar_kernels.shipped_kernels import shipped_kernels

from megatron_sdar.benchmark.compiled_kernels import compile_kernels, show_kernels, write_kernels
from megatron_sdar.data.building.build_options import available_cores

_DESCRIPTION = """\
Compile every shipped form of every Triton kernel and show what the machine code uses: registers
of a thread, bytes of spilled registers, shared memory of a block, instructions in all and in the
innermost loops that multiply matrices. The first such loop of an attention kernel handles steps
without a mask, the second steps with one, which may be smaller. No GPU is needed; Triton keeps
what it compiled, so a second run is shorter.

Fails with exit code 1 if a kernel does not compile, spills, needs more shared memory than the
architecture has, or has wgmma instructions that ptxas had to serialize.
"""
_EXAMPLE = """\
examples:
  python tools/compile_kernels.py                                  # everything: some minutes
  python tools/compile_kernels.py --kernel attention --arch sm_90
  python tools/compile_kernels.py --kernel "attention_forward bf16 d128" --json kernels.json
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--arch",
        action="append",
        choices=ARCHITECTURES,
        help="compile for this one; may be repeated (default: all)",
    )
    add("--kernel", default="", metavar="SUBSTRING", help="only kernels with this in their name")
    add("--workers", type=int, default=available_cores(), metavar="N", help="default %(default)s")
    add("--json", type=Path, metavar="PATH", help="write the figures there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        outcomes = compile_kernels(
            shipped_kernels,
            args.arch or ARCHITECTURES,
            name_part=args.kernel,
            num_workers=args.workers,
        )
        if args.json is not None:
            write_kernels(outcomes, args.json)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0 if show_kernels(outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
