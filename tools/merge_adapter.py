"""Add a LoRA adapter's updates to the weights of its model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sdar.checkpoint.conversion import MergeRequest, merge
from megatron_sdar.checkpoint.hf_export import DEFAULT_SHARD_SIZE, EXPORT_DTYPES
from megatron_sdar.checkpoint.weight_files import THREADS

DESCRIPTION = """\
Add a LoRA adapter's updates to the weights of the model it was trained on (LLaMA-Factory's export
command). Streams tensor by tensor in one process without a GPU; sums are made in float32 and
rounded once. DST is a Hugging Face directory as tools/convert_checkpoint.py writes it.
"""
EPILOG = """\
examples:
  python tools/merge_adapter.py --model SDAR-1.7B-Chat --adapter output --to SDAR-1.7B-mine --verify
  python tools/convert_checkpoint.py --from output/checkpoint-500 --to adapter-500 --format hf
  python tools/merge_adapter.py --model SDAR-1.7B-Chat --adapter adapter-500 --to step500
"""


def parse_request(argv: Sequence[str] | None) -> MergeRequest:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="merge_adapter.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, help="the model: a Hugging Face directory")
    add("--adapter", required=True, type=Path, help="a PEFT adapter, or a LoRA run's output_dir")
    add("--to", dest="destination", required=True, type=Path, metavar="DST", help="new directory")
    add("--dtype", choices=EXPORT_DTYPES, help="of the written weights (default: the model's)")
    add(
        "--max-shard-size",
        metavar="SIZE",
        help=f"largest weight file (default: {DEFAULT_SHARD_SIZE})",
    )
    add(
        "--block-size",
        type=int,
        metavar="N",
        help="diffusion block, where config.json has none (default: 4)",
    )
    add("--overwrite", action="store_true", help="replace DST if it is a model or a checkpoint")
    add(
        "--verify",
        action="store_true",
        help="merge again and compare with what is on disk, bitwise",
    )
    add("--dry-run", action="store_true", help="check model, adapter, DST and free disk only")
    add(
        "--threads",
        type=int,
        default=THREADS,
        metavar="N",
        help=f"files that are read and written at the same time (default: {THREADS})",
    )
    return MergeRequest(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    request = parse_request(argv)
    try:
        merge(request)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
