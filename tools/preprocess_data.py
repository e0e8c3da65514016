"""Turn conversations into token files: PREFIX.bin/.idx, PREFIX.labels.bin/.idx, PREFIX.json.

Records are written in the chat template and tokenised; labels say what is trained on. Rows are
made later, so one set of token files serves every block_length and cutoff_len.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_sdar.data.builder import build_dataset
from megatron_sdar.data.packing import TRUNCATE_MODES
from megatron_sdar.data.sources import ON_ERROR_MODES, dataset_from_file, read_dataset_info
from megatron_sdar.data.summary import format_fill
from megatron_sdar.data.template import TEMPLATES, TemplateOptions
from megatron_sdar.data.tokenizer import load_tokenizer
from megatron_sdar.data.tokens import TokenizedDataset

_EXAMPLE = """\
examples:
  # One file; its layout (messages, conversations, instruction/output, question/answer or
  # prompt/response) is recognised.
  python tools/preprocess_data.py --input train.jsonl --tokenizer Qwen3-1.7B-Base \\
      --output-prefix tokens/train

  # Entries of a LLaMA-Factory dataset_info.json, and how full rows of 2048 and 4096 would be.
  python tools/preprocess_data.py --dataset gsm8k,open_r1_math --dataset-dir data \\
      --tokenizer Qwen3-1.7B-Base --output-prefix tokens/math \\
      --block-length 4 --cutoff-len 2048 4096

then train on it with  data_path: tokens/math  in the YAML.
"""
_THINKING = {"true": True, "false": False, "none": None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE", help=".jsonl or .json files")
    source.add_argument("--dataset", metavar="NAMES", help="names in dataset_info.json, a,b,c")
    parser.add_argument(
        "--dataset-dir", default="data", help="folder of dataset_info.json (default %(default)s)"
    )
    parser.add_argument(
        "--tokenizer", required=True, help="model directory, or a tokenizer.json file"
    )
    parser.add_argument("--output-prefix", required=True, help="path and name of the token files")
    parser.add_argument("--template", default="qwen3", choices=TEMPLATES)
    parser.add_argument(
        "--enable-thinking",
        default="true",
        choices=_THINKING,
        help="answers without a thought: true trains on an empty one, none puts it before the "
        "answer, false also removes the thoughts there are (default %(default)s)",
    )
    parser.add_argument(
        "--mask-history", action="store_true", help="train on the last answer of a chat only"
    )
    parser.add_argument("--train-on-prompt", action="store_true", help="train on prompts too")
    parser.add_argument("--default-system", help="system prompt of records that have none")
    parser.add_argument(
        "--max-samples", type=int, help="first records of each dataset (default all)"
    )
    parser.add_argument(
        "--on-error",
        default="raise",
        choices=ON_ERROR_MODES,
        help="bad records: stop with file and line, or leave out and count (default %(default)s)",
    )
    parser.add_argument("--num-workers", type=int, default=1, help="chunks tokenised at a time")
    parser.add_argument("--overwrite", action="store_true", help="replace existing token files")
    report = parser.add_argument_group("row report (the token files do not depend on it)")
    report.add_argument("--block-length", type=int, default=4, help="default %(default)s")
    report.add_argument("--cutoff-len", type=int, nargs="+", default=[], metavar="L")
    report.add_argument("--truncate-mode", default="cut", choices=TRUNCATE_MODES)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        options = TemplateOptions(
            template=args.template,
            enable_thinking=_THINKING[args.enable_thinking],
            mask_history=args.mask_history,
            train_on_prompt=args.train_on_prompt,
            default_system=args.default_system,
        )
        if args.input:
            specs = [dataset_from_file(file) for file in args.input]
        else:
            specs = read_dataset_info(args.dataset_dir, args.dataset.split(","))
        summary = build_dataset(
            specs,
            args.output_prefix,
            load_tokenizer(args.tokenizer),
            options,
            num_workers=args.num_workers,
            max_samples=args.max_samples,
            on_error=args.on_error,
            overwrite=args.overwrite,
        )
        print(summary.format())
        if args.cutoff_len:
            lengths = TokenizedDataset(args.output_prefix).lengths
            print(format_fill(lengths, args.cutoff_len, args.block_length, args.truncate_mode))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
