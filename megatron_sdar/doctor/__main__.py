"""Check this machine, and a configuration if one is given, before a run is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from megatron_sdar.doctor.findings import as_json, is_ready, show
from megatron_sdar.doctor.machine import machine
from megatron_sdar.doctor.run import Place, run
from megatron_sdar.doctor.software import software
from megatron_sdar.doctor.storage import storage
from megatron_sdar.parallel.devices import device_type
from megatron_sdar.training.memory_estimate import GIB

_EXAMPLES = """\
examples:
  python -m megatron_sdar.doctor
  python -m megatron_sdar.doctor my.yaml tensor_model_parallel_size=2
  python -m megatron_sdar.doctor my.yaml --processes 32 --device-memory 80   (for another machine)

exit status: 0 when nothing that is needed is missing, else 1.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_sdar.doctor",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG", help="a YAML or JSON file to check too")
    add("overrides", nargs="*", metavar="key=value", help="as behind pretrain_sdar.py CONFIG")
    add("--processes", type=int, metavar="N", help="of the whole run (default: the GPUs here)")
    add("--device-memory", type=float, metavar="GIB", help="of a GPU (default: those here)")
    add("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_intermixed_args(argv)
    if args.processes is not None and args.processes < 1:
        parser.error(f"--processes {args.processes}: a run has at least one")
    if args.device_memory is not None and args.device_memory <= 0:
        parser.error(f"--device-memory {args.device_memory}: it must be above 0")
    device = torch.device(device_type("auto"))
    findings = [*software(device), *machine(device)]
    if args.config is None:
        findings.append(storage(Path.cwd(), 0))
    else:
        memory = None if args.device_memory is None else args.device_memory * GIB
        place = Place(device, args.processes, memory)
        findings += run([args.config, *args.overrides], place)
    if args.json:
        print(as_json(findings))
    else:
        show(findings, Console(highlight=False))
    return 0 if is_ready(findings) else 1


if __name__ == "__main__":
    raise SystemExit(main())
