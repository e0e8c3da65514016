"""Ask a trained SDAR model one question: tools/generate.py --model DIR --prompt TEXT."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_sdar.generation.sampler import REMASKING
from megatron_sdar.generation.text import DTYPES, TextRequest, generate_text

DESCRIPTION = """\
Decode one answer with a block-diffusion model, in one process.

The model directory is a Hugging Face export of this trainer, or a released SDAR model:
config.json, safetensors weights and a tokenizer. The answer is written to standard output block
by block; the number of tokens and forwards goes to standard error.
"""
EPILOG = """\
How a block is decoded: it starts as mask tokens; every forward predicts all of them at once, and
the most confident predictions are kept. With --block-length 4:
  --denoising-steps 4                     one token per forward, the most careful (default)
  --denoising-steps 2                     two tokens per forward
  --remasking dynamic                     every token above --confidence-threshold, at least one

examples:
  python tools/generate.py --model output --prompt 'What is 27 + 45?'
  python tools/generate.py --model output --prompt 'Once upon a time' --raw --temperature 0.8
"""


def parse_request(argv: Sequence[str] | None) -> TextRequest:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    defaults = TextRequest(Path(), "")
    add("--model", required=True, type=Path, metavar="DIR", help="model directory")
    add("--prompt", required=True, metavar="TEXT", help="the question, or with --raw any text")
    add("--system", metavar="TEXT", help="system prompt (default: none, as in training)")
    add("--raw", action="store_true", help="continue the prompt as it is: no chat template")
    add(
        "--enable-thinking",
        action=argparse.BooleanOptionalAction,
        default=defaults.enable_thinking,
        help="let the model write its think block; --no-enable-thinking puts an empty one before "
        "the answer (default: %(default)s)",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=defaults.max_new_tokens,
        metavar="N",
        help="longest answer (default: %(default)s)",
    )
    add(
        "--block-length",
        type=int,
        metavar="N",
        help="tokens decoded together (default: block_size of config.json)",
    )
    add(
        "--denoising-steps",
        type=int,
        metavar="N",
        help="most forwards per block (default: the block length)",
    )
    add(
        "--remasking",
        choices=REMASKING,
        default=defaults.remasking,
        help="which predictions a forward keeps: a fixed number, or also all that are confident "
        "(default: %(default)s)",
    )
    add(
        "--confidence-threshold",
        type=float,
        default=defaults.confidence_threshold,
        metavar="P",
        help="probability above which 'dynamic' keeps a token (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="0: the most probable token; above 0: draw (default: %(default)s)",
    )
    add("--seed", type=int, default=defaults.seed, metavar="N", help="of the draws (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of weights and activations; auto: bfloat16 on cuda, float32 on cpu",
    )
    args = vars(parser.parse_args(argv))
    return TextRequest(model_dir=args.pop("model"), **args)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    request = parse_request(argv)
    start = time.monotonic()
    try:
        result = generate_text(request, _write)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    _write("\n")
    ended = "stop token" if result.stopped else "max_new_tokens reached"
    print(
        f"{len(result.ids)} tokens, {result.num_forwards} forwards, "
        f"{result.tokens_per_forward:.2f} tokens per forward, {seconds:.1f} s with loading; "
        f"ended by {ended}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
