"""Ask a trained SDAR model: tools/generate.py --model DIR --prompt TEXT, or a file of prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sdar.generation.job import run_job
from megatron_sdar.generation.sampler_config import REMASKING
from megatron_sdar.generation.text import DTYPES, TextRequest
from megatron_sdar.parallel.launch import leave_together
from megatron_sdar.parallel.mesh import read_launch_info

DESCRIPTION = """\
Decode answers with a block-diffusion model, on one process or, under torchrun, on several.

The model is a Hugging Face directory (an export of this trainer, or a released SDAR model), a
checkpoint-N, a run's output_dir, which stands for its newest complete checkpoint, or a LoRA adapter
whose model lies where its adapter_config.json says. The answer to a single prompt is written to
standard output block by block; the number of tokens and forwards goes to standard error.
"""
EPILOG = """\
How a block is decoded: it starts as mask tokens; every forward predicts all of them at once, and
the most confident predictions are kept. With --block-length 4:
  --denoising-steps 4                     one token per forward, the most careful (default)
  --denoising-steps 2                     two tokens per forward
  --remasking dynamic                     every token above --confidence-threshold, at least one
Keys and values of finished blocks are cached. An answer does not depend on what else is decoded
with it: draws are keyed by --seed and the prompt's number.

A line of --input is a JSON object with the question as prompt, question or instruction (and
input), system beside it, or with messages in the openai layout, of which a last one of the
assistant is not shown. --output gets the same objects with generated, num_tokens, num_forwards
and stopped.

examples:
  python tools/generate.py --model output --prompt 'What is 27 + 45?'
  python tools/generate.py --model output/checkpoint-60 --prompt 'Why?' --remasking dynamic
  python tools/generate.py --model output --prompt 'Once upon a time' --raw --temperature 0.8 --top-p 0.9
  python tools/generate.py --model output --input test.jsonl --output answers.jsonl --batch-size 64
  torchrun --nproc_per_node 4 tools/generate.py --model output --prompt 'Why?' --tensor-parallel-size 2 --pipeline-parallel-size 2
Processes beyond tensor x pipeline parallelism share the prompts out.
"""  # noqa: E501


def parse_request(argv: Sequence[str] | None) -> TextRequest:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_prompt_options(parser)
    _add_sampler_options(parser)
    _add_machine_options(parser)
    args = vars(parser.parse_args(argv))
    return TextRequest(
        model_dir=args.pop("model"),
        prompts=tuple(args.pop("prompt")),
        input_file=args.pop("input"),
        output_file=args.pop("output"),
        **args,
    )


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    add, defaults = parser.add_argument, TextRequest(Path())
    add("--model", required=True, type=Path, metavar="DIR", help="what to decode with")
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a question, or with --raw any text; may be given several times",
    )
    add("--input", type=Path, metavar="FILE", help="JSONL with a prompt per line")
    add("--output", type=Path, metavar="FILE", help="JSONL for the answers; must not exist")
    add("--system", metavar="TEXT", help="system prompt (default: none, as in training)")
    add("--raw", action="store_true", help="continue the prompt as it is: no chat template")
    add(
        "--enable-thinking",
        action=argparse.BooleanOptionalAction,
        default=defaults.enable_thinking,
        help="let the model write its think block; --no-enable-thinking puts an empty one before "
        "the answer (default: %(default)s)",
    )


def _add_sampler_options(parser: argparse.ArgumentParser) -> None:
    add, defaults = parser.add_argument, TextRequest(Path())
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
    add(
        "--top-k",
        type=int,
        default=defaults.top_k,
        metavar="N",
        help="draw among so many most probable tokens; 0: all (default: %(default)s)",
    )
    add(
        "--top-p",
        type=float,
        default=defaults.top_p,
        metavar="P",
        help="draw among the most probable tokens that hold so much probability; 1: all "
        "(default: %(default)s)",
    )
    add("--seed", type=int, default=defaults.seed, metavar="N", help="of the draws (default: 0)")


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    add, defaults = parser.add_argument, TextRequest(Path())
    add(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        metavar="N",
        help="prompts decoded at the same time, by each data-parallel replica; the cache of keys "
        "and values grows with it (default: %(default)s)",
    )
    for kind in ("tensor", "pipeline"):
        add(
            f"--{kind}-parallel-size",
            type=int,
            default=1,
            metavar="N",
            help="under torchrun (default: 1)",
        )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of weights and activations; auto: bfloat16 on cuda, float32 on cpu",
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    request, launch = parse_request(argv), read_launch_info()
    try:
        report = run_job(request, launch, _write)
    except (ValueError, OSError) as error:
        if launch.world_size > 1:
            leave_together(str(error), launch)
        print(f"error: {error}", file=sys.stderr)
        return 1
    if launch.rank == 0:
        print(report.summary(), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
