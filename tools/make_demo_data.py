"""Make a small arithmetic data set with its tokenizer and a tiny model folder.

Nothing is downloaded; the same seed gives the same files byte for byte.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_sdar.data.demo import make_demo_data

_EXAMPLE = """\
example:
  python tools/make_demo_data.py --output-dir demo/data
  python tools/preprocess_data.py --input demo/data/train.jsonl --tokenizer demo/data/model \\
      --output-prefix demo/data/arithmetic

writes train.jsonl, test.jsonl, dataset_info.json (datasets arithmetic, arithmetic_test) and
model/ (config.json of a one-million-parameter SDAR, tokenizer, chat template).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", required=True, help="folder to write into")
    parser.add_argument(
        "--num-documents", type=int, default=2000, help="questions in all (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    args = parser.parse_args(argv)
    try:
        files = make_demo_data(args.output_dir, args.num_documents, args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"wrote {file}" for file in files))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
