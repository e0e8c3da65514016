"""What of the software a run needs is installed, and whether it works here.

Versions are compared with what pyproject.toml demands, since a library that is too old fails late
and unclearly.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import metadata
from importlib.util import find_spec

import torch
from sdar_kernels.ahead_of_time import ARCHITECTURES, compile_spec
from sdar_kernels.shipped_kernels import shipped_kernels
from sdar_kernels.triton_runtime import device_architecture, interpreting

from megatron_sdar.config_sections.reporting import ReportingConfig
from megatron_sdar.doctor.findings import Finding, missing, ok, slow
from megatron_sdar.training.trackers import wanted_trackers

# Distribution -> the lowest version that works; as in pyproject.toml.
NEEDED = {
    "torch": "2.13",
    "transformers": "5.0",
    "tokenizers": "0.21",
    "tiktoken": "0.12",
    "pyarrow": "17",
    "jinja2": "3.1.6",
    "safetensors": "0.5",
    "xxhash": "3.4",
    "numpy": "1.26",
    "pyyaml": "6.0",
    "rich": "13.7",
    "matplotlib": "3.8",
}
_PYTHON = (3, 11)
_COMPILERS = ("cc", "gcc", "clang")


def software(device: torch.device) -> Iterator[Finding]:
    """Python, libraries, Triton, optional trackers."""
    yield python_version(sys.version_info[:3])
    for name, lowest in NEEDED.items():
        yield library(name, lowest)
    yield triton(device)
    yield trackers()


def python_version(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if version < _PYTHON:
        return missing("python", text, "install Python 3.11 or newer and make the environment anew")
    return ok("python", text)


def library(name: str, lowest: str) -> Finding:
    """The installed version of a distribution, at least `lowest`."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return missing(name, "not installed", f"pip install '{name}>={lowest}'")
    if _numbers(found) < _numbers(lowest):
        return missing(name, f"{found} is too old", f"pip install '{name}>={lowest}'")
    return ok(name, found)


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); what follows a part without a number does not count."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def triton(device: torch.device) -> Finding:
    """Whether a shipped kernel compiles for this GPU (without one: for some GPU)."""
    has_gpu = device.type == "cuda"
    if find_spec("triton") is None:
        text = "not installed: norms, loss and attention are computed by torch"
        return slow("triton", text, "pip install triton") if has_gpu else ok("triton", text)
    version = metadata.version("triton")
    if interpreting():
        return slow(
            "triton", f"{version}, interpreted (TRITON_INTERPRET=1)", "unset TRITON_INTERPRET"
        )
    if has_gpu and not any(map(shutil.which, _COMPILERS)):
        return slow(
            "triton",
            f"{version}, but no C compiler, which it needs to start kernels",
            "install gcc or clang",
        )
    arch = device_architecture(device) if has_gpu else "sm_90"
    if arch not in ARCHITECTURES:
        return ok("triton", f"{version}; kernels were never compiled for {arch}, a check decides")
    spec = next(each for each in shipped_kernels(arch) if "swiglu" in each.name)
    try:
        compile_spec(spec, arch)
    except Exception as error:  # whatever a compiler raises
        return slow(
            "triton",
            f"{version} cannot compile for {arch}: {type(error).__name__}: {error}"[:300],
            "pip install --force-reinstall triton, or set fused_kernels: torch",
        )
    return ok("triton", f"{version}, compiles for {arch}")


def trackers() -> Finding:
    """Experiment trackers are optional."""
    (key,) = (each for each in fields(ReportingConfig) if each.name == "report_to")
    found = wanted_trackers(["all"])
    absent = [name for name in key.metadata["choices"] if name not in (*found, "all")]
    text = f"installed: {', '.join(found) or 'none'}"
    return ok("trackers", f"{text}; optional: {', '.join(absent)}" if absent else text)
