"""Convert a model between Hugging Face format and this trainer's native checkpoints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sdar.checkpoint.conversion import ConversionRequest, convert
from megatron_sdar.checkpoint.hf_export import DEFAULT_SHARD_SIZE, EXPORT_DTYPES
from megatron_sdar.checkpoint.hf_source import MASK_TOKEN_INITS
from megatron_sdar.checkpoint.weight_files import THREADS

DESCRIPTION = """\
Convert a model between Hugging Face format and native checkpoints. Runs in one process without
a GPU and streams: memory stays below a GB whatever the model's size.

  SRC              is recognised: a Hugging Face directory (SDAR or Qwen3, dense or with experts),
                   a native checkpoint-N directory, or a run's output_dir (its newest complete
                   checkpoint). Checksums of native checkpoints are checked on the way.
  --format hf      DST can be served by SGLang, LMDeploy and JetEngine, and loaded by transformers
                   (trust_remote_code=True; the model code is added where SRC has none).
  --format native  DST is a checkpoint of step 0 that any parallel layout loads. Training needs no
                   such conversion: model_name_or_path reads Hugging Face directories itself.

DST appears when it is whole. A conversion that was killed goes on with the same command: finished
files are recognised by size and checksum.
"""
EPILOG = """\
examples:
  python tools/convert_checkpoint.py --from output --to SDAR-1.7B-mine --format hf \\
      --dtype bfloat16 --verify
  python tools/convert_checkpoint.py --from output/checkpoint-500 --to step500 --format hf
  python tools/convert_checkpoint.py --from Qwen3-1.7B-Base --to start --format native \\
      --block-size 4 --mask-token-init mean
  python tools/convert_checkpoint.py --from Qwen3-4B --to start --format native --dry-run
"""


def parse_request(argv: Sequence[str] | None) -> ConversionRequest:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, type=Path, metavar="SRC", help="what to convert")
    add("--to", dest="destination", required=True, type=Path, metavar="DST", help="new directory")
    add("--format", required=True, choices=("hf", "native"), help="format of DST")
    add("--dtype", choices=EXPORT_DTYPES, help="of the written weights (default: as stored)")
    add(
        "--max-shard-size",
        metavar="SIZE",
        help=f"largest weight file (default: {DEFAULT_SHARD_SIZE} for hf, 1GiB for native)",
    )
    add("--overwrite", action="store_true", help="replace DST if it is a model or a checkpoint")
    add(
        "--verify",
        action="store_true",
        help="before DST appears, check its format and compare every tensor on disk bitwise with "
        "SRC",
    )
    add("--dry-run", action="store_true", help="check SRC, DST and free disk; write nothing")
    add(
        "--threads",
        type=int,
        default=THREADS,
        metavar="N",
        help=f"files that are read and written at the same time (default: {THREADS})",
    )
    hf = parser.add_argument_group("SRC in Hugging Face format")
    hf.add_argument(
        "--mask-token-init",
        choices=MASK_TOKEN_INITS,
        help="first value of the <|MASK|> row: mean of the trained rows, the same plus noise, or "
        "kept (default: auto, which is mean for Qwen3 and keep for SDAR)",
    )
    hf.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="diffusion block, where config.json has none (default: 4)",
    )
    native = parser.add_argument_group("--format native")
    native.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="N",
        help="pad the vocabulary as the configuration that will load DST (default: 128)",
    )
    return ConversionRequest(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    request = parse_request(argv)
    try:
        convert(request)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
