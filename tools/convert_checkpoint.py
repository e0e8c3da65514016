"""Convert a model between Hugging Face format and this trainer's native checkpoints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sdar.checkpoint.conversion import ConversionRequest, convert
from megatron_sdar.checkpoint.hf_export import EXPORT_DTYPES
from megatron_sdar.checkpoint.hf_source import MASK_TOKEN_INITS

DESCRIPTION = """\
Convert a model between Hugging Face format and native checkpoints. Runs in one process without
a GPU and streams: memory stays below a few hundred MB whatever the model's size.

  --format hf      SRC is a checkpoint-N directory, or a run's output_dir (its newest complete
                   checkpoint is taken). DST can be served by SGLang, LMDeploy and JetEngine.
  --format native  SRC is a Hugging Face directory of SDAR or Qwen3. DST is a checkpoint of step
                   0 that any parallel layout loads. Training needs no such conversion:
                   model_name_or_path reads Hugging Face directories itself.
"""
EPILOG = """\
examples:
  python tools/convert_checkpoint.py --from output --to SDAR-1.7B-mine --format hf \\
      --dtype bfloat16
  python tools/convert_checkpoint.py --from output/checkpoint-500 --to step500 --format hf
  python tools/convert_checkpoint.py --from Qwen3-1.7B-Base --to start --format native \\
      --block-size 4 --mask-token-init mean
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
    add("--overwrite", action="store_true", help="replace DST if it is a model or a checkpoint")
    hf = parser.add_argument_group("--format hf")
    hf.add_argument("--max-shard-size", metavar="SIZE", help="largest weight file (default: 5GB)")
    native = parser.add_argument_group("--format native")
    native.add_argument(
        "--mask-token-init",
        choices=MASK_TOKEN_INITS,
        help="first value of the <|MASK|> row: mean of the trained rows, the same plus noise, or "
        "kept (default: auto, which is mean for Qwen3 and keep for SDAR)",
    )
    native.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="diffusion block, where config.json has none (default: 4)",
    )
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
        print(convert(request))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
