"""Say what becomes of every key of a LLaMA-Factory configuration, without running it.

Each key is supported, mapped to another, ignored (with the reason) or refused (with what to use
instead). Then come the keys that are not given although LLaMA-Factory's default is another, and the
configuration that results. Needs neither torch nor a GPU.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sdar.config_explanation import Explanation, explain

_EXAMPLE = """\
examples:
  python tools/explain_config.py examples/train_full_sdar/sdar_8b_full.yaml
  python tools/explain_config.py my.yaml cutoff_len=4096 tensor_model_parallel_size=2
  python tools/explain_config.py my.yaml --resolved > native.yaml

exit status: 0 when pretrain_sdar.py would accept the file, else 1.
"""
_PIPE_WIDTH = 160
_STYLES = {
    "supported": "green", "mapped": "cyan", "ignored": "dim", "refused": "red", "unknown": "red",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="the YAML or JSON file")
    add("overrides", nargs="*", metavar="key=value", help="as behind pretrain_sdar.py CONFIG")
    add("--json", action="store_true", help="print everything as JSON")
    add("--resolved", action="store_true", help="print only the resulting configuration, as YAML")
    add(
        "--allow-unknown",
        action="store_true",
        help="ignore unknown keys, as with ALLOW_EXTRA_ARGS=1",
    )
    add("--width", type=int, metavar="N", help="columns (default: the terminal's, else 160)")
    args = parser.parse_intermixed_args(argv)
    try:
        found = explain([args.config, *args.overrides], allow_unknown=args.allow_unknown)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(found.as_json())
    elif args.resolved and found.config is not None:
        print(found.resolved(), end="")
    else:
        # A pipe has no width; the terminal that shows it in the end mostly wraps by itself.
        width = args.width or (None if sys.stdout.isatty() else _PIPE_WIDTH)
        _show(found, Console(width=width, highlight=False))
    for problem in found.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found.problems else 0


def _show(found: Explanation, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("key", "value", "verdict", "what it becomes, or why not", "where"):
        table.add_column(name, overflow="fold", no_wrap=name in ("key", "verdict"))
    for key in found.keys:
        table.add_row(
            Text(key.key),
            Text(key.value),
            Text(key.kind, style=_STYLES[key.kind]),
            Text(key.text),
            Text(key.where, style="dim"),
        )
    console.print(table)
    if found.defaults:
        console.print("\nNot given, and LLaMA-Factory's default is another:")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("key", "here", "LLaMA-Factory", "what that changes"):
            table.add_column(name, overflow="fold", no_wrap=name == "key")
        for default in found.defaults:
            table.add_row(*map(Text, (default.key, default.value, default.theirs, default.change)))
        console.print(table)
    for note in found.notes:
        console.print(Text(f"\n{note}"))
    if found.config is not None:
        console.print(f"\n{found.resolved()}", markup=False, end="", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
