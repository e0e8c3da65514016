"""Write docs/configuration.md from the configuration's own definitions (`make docs`)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_sdar.config_description import reference_markdown

REFERENCE = Path(__file__).resolve().parents[1] / "docs/configuration.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/write_reference.py --check",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 when it is out of date"
    )
    check = parser.parse_args(argv).check
    text = reference_markdown()
    if check:
        is_current = REFERENCE.is_file() and REFERENCE.read_text(encoding="utf-8") == text
        print(f"{REFERENCE} is {'up to date' if is_current else 'out of date: run make docs'}")
        return 0 if is_current else 1
    REFERENCE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
