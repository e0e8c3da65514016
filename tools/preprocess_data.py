"""Turn documents into token files: PREFIX.bin/.idx, PREFIX.labels.*, PREFIX.turns.*, PREFIX.json.

Records are written in the chat template and tokenised on all cores; labels say what is trained
on. Rows are made later, so one set of token files serves every block_length and cutoff_len. A
build that was interrupted goes on where it stopped when the same command is given again.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_sdar.data.building.build_options import ON_ERROR_MODES, BuildOptions
from megatron_sdar.data.building.builder import build_dataset
from megatron_sdar.data.building.shards import merge_shards
from megatron_sdar.data.building.summary import BuildSummary, format_fill
from megatron_sdar.data.loading.packing import TRUNCATE_MODES, check_row_size
from megatron_sdar.data.sources.dataset_info import STAGES
from megatron_sdar.data.sources.datasets import (
    DatasetSpec,
    dataset_from_file,
    read_dataset_info,
)
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.templates.chat_template import load_chat_template, load_template_tokens
from megatron_sdar.data.templates.template import LLAMAFACTORY_VERSIONS, TEMPLATES, TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer

_EXAMPLE = """\
examples:
  # One file; its layout (messages, conversations, instruction/output, question/answer or
  # prompt/response) is recognised. Formats: .jsonl .json .csv .parquet .arrow .txt, and .gz or
  # .zst of the text formats.
  python tools/preprocess_data.py --input train.jsonl --tokenizer Qwen3-1.7B-Base \\
      --output-prefix tokens/train

  # Entries of a LLaMA-Factory dataset_info.json, and how full rows of 2048 and 4096 would be.
  python tools/preprocess_data.py --dataset gsm8k,open_r1_math --dataset-dir data \\
      --tokenizer Qwen3-1.7B-Base --output-prefix tokens/math \\
      --block-length 4 --cutoff-len 2048 4096

  # Plain text for continued pretraining, on two machines that share a disk, then put together.
  python tools/preprocess_data.py --stage pt --input corpus/*.jsonl.zst --shard 0/2 \\
      --tokenizer Qwen3-1.7B-Base --output-prefix tokens/corpus        # the other: --shard 1/2
  python tools/preprocess_data.py --merge 2 --output-prefix tokens/corpus

then train on it with  data_path: tokens/math  in the YAML.
"""
_THINKING = {"true": True, "false": False, "none": None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE", help="data files or folders of them")
    source.add_argument("--dataset", metavar="NAMES", help="names in dataset_info.json, a,b,c")
    source.add_argument(
        "--merge", type=int, metavar="N", help="put the N shards of OUTPUT_PREFIX together"
    )
    parser.add_argument("--output-prefix", required=True, help="path and name of the token files")
    parser.add_argument("--tokenizer", help="model directory, or a tokenizer.json file")
    parser.add_argument(
        "--dataset-dir", default="data", help="folder of dataset_info.json (default %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing token files")
    written = parser.add_argument_group("how documents are written")
    written.add_argument(
        "--stage",
        default="sft",
        choices=STAGES,
        help="sft: conversations, answers are trained; pt: plain text, all of it is",
    )
    written.add_argument(
        "--template",
        default="qwen3",
        choices=TEMPLATES,
        help="chat_template is the tokenizer's own (default %(default)s)",
    )
    written.add_argument(
        "--enable-thinking",
        default="true",
        choices=_THINKING,
        help="answers without a thought: true trains on an empty one, none puts it before the "
        "answer, false also removes the thoughts there are (default %(default)s)",
    )
    written.add_argument(
        "--mask-history", action="store_true", help="train on the last answer of a chat only"
    )
    written.add_argument("--train-on-prompt", action="store_true", help="train on prompts too")
    written.add_argument("--default-system", help="system prompt of records that have none")
    written.add_argument(
        "--llamafactory-version",
        default="0.9.4",
        choices=LLAMAFACTORY_VERSIONS,
        help="whose template behaviour: 0.9.4 is the SDAR fork's (default %(default)s)",
    )
    chosen = parser.add_argument_group("which records, and how the work is done")
    chosen.add_argument(
        "--max-samples", type=int, metavar="N", help="first N records of each dataset"
    )
    chosen.add_argument("--seed", type=int, default=42, help="of num_samples in dataset_info.json")
    chosen.add_argument(
        "--on-error",
        default="raise",
        choices=ON_ERROR_MODES,
        help="bad records: stop with file and line, or leave out and count (default %(default)s)",
    )
    chosen.add_argument("--num-workers", type=int, metavar="N", help="default: one per core")
    chosen.add_argument(
        "--shard", metavar="I/N", help="build the I-th of N shares only (I from 0), for --merge"
    )
    report = parser.add_argument_group("row report (the token files do not depend on it)")
    report.add_argument("--block-length", type=int, default=4, help="default %(default)s")
    report.add_argument("--cutoff-len", type=int, nargs="+", default=[], metavar="L")
    report.add_argument("--truncate-mode", default="cut", choices=TRUNCATE_MODES)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        for capacity in args.cutoff_len:
            check_row_size(capacity, args.block_length)
        summary = _run(args)
        print(summary.format())
        if args.cutoff_len:
            lengths = TokenizedDataset(summary.prefix).lengths
            print(format_fill(lengths, args.cutoff_len, args.block_length, args.truncate_mode))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> BuildSummary:
    if args.merge is not None:
        return merge_shards(args.output_prefix, args.merge, overwrite=args.overwrite)
    if args.tokenizer is None:
        raise ValueError("--tokenizer is needed: a model directory, or a tokenizer.json file")
    own: dict[str, str] = {}
    if args.template == "chat_template":
        own = {
            "chat_template": load_chat_template(args.tokenizer),
            **load_template_tokens(args.tokenizer),
        }
    template = TemplateOptions(
        template=args.template,
        enable_thinking=_THINKING[args.enable_thinking],
        mask_history=args.mask_history,
        train_on_prompt=args.train_on_prompt,
        default_system=args.default_system,
        llamafactory_version=args.llamafactory_version,
        **own,
    )
    options = BuildOptions(
        num_workers=args.num_workers,
        max_samples=args.max_samples,
        seed=args.seed,
        on_error=args.on_error,
        overwrite=args.overwrite,
        shard=_parse_shard(args.shard),
    )
    tokenizer = load_tokenizer(args.tokenizer)
    return build_dataset(_specs(args), args.output_prefix, tokenizer, template, options)


def _specs(args: argparse.Namespace) -> list[DatasetSpec]:
    if args.input:
        return [dataset_from_file(file, args.stage) for file in args.input]
    names = [name.strip() for name in args.dataset.split(",")]
    if not all(names):
        raise ValueError(f"--dataset {args.dataset!r}: give names with commas between, a,b,c")
    return read_dataset_info(args.dataset_dir, names, args.stage)


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal()):
        raise ValueError(f"--shard {text}: give I/N, such as 0/8 for the first of eight")
    return int(index), int(number)


if __name__ == "__main__":
    raise SystemExit(main())
