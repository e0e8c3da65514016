"""Compiling kernels without a GPU: what is read from the machine code, and what is reported.

Kernels are compiled by tools/compile_kernels.py in processes of their own, in which nothing is
interpreted; here triton is not even imported.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sdar_kernels import ahead_of_time, shipped_kernels, triton_configs
from sdar_kernels.ahead_of_time import ARCHITECTURES, compile_spec
from sdar_kernels.triton_runtime import KernelSpec

from megatron_sdar.benchmark import compiled_kernels
from megatron_sdar.benchmark.compiled_kernels import compile_kernels

pytest.importorskip("triton", reason="triton is not installed: no kernel can be compiled")

ROOT = Path(__file__).resolve().parents[2]
NVIDIA = [arch for arch in ARCHITECTURES if arch.startswith("sm_")]
SAMPLES = """\
import sys
from tools import compile_kernels
from unit.sample_kernels import {kernels}
compile_kernels.shipped_kernels = {kernels}
sys.exit(compile_kernels.main(sys.argv[1:]))
"""
SPILLING_CODE = """\
import subprocess, sys
from triton import knobs
from sdar_kernels.ahead_of_time import _compiled
from unit.sample_kernels import spilling_spec
binary = _compiled(spilling_spec("sm_90"), "sm_90")
assert binary.metadata.enable_fp_fusion
with open(sys.argv[1], "wb") as file:
    file.write(binary.asm["cubin"])
print(subprocess.check_output([knobs.nvidia.cuobjdump.path, "-sass", sys.argv[1]], text=True))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python with this tree importable, no interpreter of kernels, the defaults of Triton 3.10."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"
    paths = [ROOT, ROOT / "kernels", ROOT / "tests"]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def kernels_of(result: subprocess.CompletedProcess[str], path: Path) -> dict[tuple[str, str], Any]:
    assert path.exists(), result.stderr
    return {(k["name"], k["arch"]): k for k in json.loads(path.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("good") / "kernels.json"
    result = run("-c", SAMPLES.format(kernels="sample_specs"), "--json", str(path))
    return result, kernels_of(result, path)


@pytest.fixture(scope="module")
def faulty_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("faulty") / "kernels.json"
    code = SAMPLES.format(kernels="faulty_specs")
    result = run("-c", code, "--arch", "sm_90", "--json", str(path))
    return result, kernels_of(result, path)


# Kernels whose code is known.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_kernel_compiles_for_every_architecture(good_run: Any, arch: str) -> None:
    _, kernels = good_run
    attention, copy = (kernels[f"{name} sample", arch]["report"] for name in ("attention", "copy"))
    assert 64 < attention["registers"] <= 256
    assert attention["shared_bytes"] >= 2 * 64 * 64 * 2
    assert copy["registers"] < 32
    assert copy["shared_bytes"] == 0
    assert attention["spill_bytes"] == copy["spill_bytes"] == 0
    assert (attention["tensor_memory_columns"] > 0) == (arch == "sm_100")


@pytest.mark.parametrize("arch", NVIDIA)
def test_the_two_loops_are_found(good_run: Any, arch: str) -> None:
    _, kernels = good_run
    full, masked = kernels["attention sample", arch]["report"]["loops"]
    assert full["multiplications"] == masked["multiplications"] > 0
    assert 1.2 < masked["instructions"] / full["instructions"] < 1.7
    size = kernels["attention sample", arch]["report"]["instructions"]
    assert full["instructions"] + masked["instructions"] < size
    assert kernels["copy sample", arch]["report"]["loops"] == []


def test_amd_code_is_not_read(good_run: Any) -> None:
    _, kernels = good_run
    report = kernels["attention sample", "gfx942"]["report"]
    assert report["loops"] is report["instructions"] is None


def test_a_good_run_says_so(good_run: Any) -> None:
    result, kernels = good_run
    assert result.returncode == 0
    last = result.stdout.splitlines()[-1]
    assert last == "14 configurations, 7 architectures: no spills, shared memory within limits"
    assert len(kernels) == 14
    report = kernels["attention sample", "sm_90"]["report"]
    full, masked = (loop["instructions"] for loop in report["loops"])
    row = next(line for line in result.stdout.splitlines() if "attention" in line and "_90" in line)
    assert [cell.strip() for cell in row.split("\u2502")[3:-1]] == [
        str(report["registers"]), "0", f"{report['shared_bytes']:,}",
        f"{report['instructions']:,}", str(full), str(masked), f"{masked / full:.2f}",
    ]  # fmt: skip


# Kernels that must not be shipped.


def test_every_fault_is_reported(faulty_run: Any) -> None:
    result, kernels = faulty_run
    assert result.returncode == 1
    told = {name: kernel["problems"] for (name, _), kernel in kernels.items()}
    spills = kernels["spilling sample", "sm_90"]["report"]["spill_bytes"]
    assert spills > 0
    assert told["spilling sample"] == [
        f"spilling sample on sm_90: spills {spills:,} bytes of registers",
        "spilling sample on sm_90: ptxas serialized its wgmma instructions",
    ]
    size = kernels["large sample", "sm_90"]["report"]["shared_bytes"]
    assert told["large sample"] == [
        f"large sample on sm_90: needs {size:,} bytes of shared memory, limit 232,448"
    ]
    (odd,) = told["odd sample"]
    assert "does not compile: CompilationError" in odd
    assert "arange's range must be a power of 2" in odd
    assert told["copy sample"] == []
    lines = result.stdout.splitlines()
    assert set(lines) > {*told["spilling sample"], *told["large sample"], odd}
    assert lines[-1] == "4 configurations, 1 architectures: 4 problems"


def test_spills_are_the_stores_and_loads_of_the_code(faulty_run: Any, tmp_path: Path) -> None:
    """Counted without ptxas: every STL and LDL, at its width."""
    _, kernels = faulty_run
    result = run("-c", SPILLING_CODE, str(tmp_path / "kernel.cubin"))
    moves = re.findall(r"\s(?:STL|LDL)(\S*)", result.stdout)
    counted = sum(16 if ".128" in kind else 8 if ".64" in kind else 4 for kind in moves)
    assert counted == kernels["spilling sample", "sm_90"]["report"]["spill_bytes"]


def test_spills_are_seen_on_amd(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    code = SAMPLES.format(kernels="faulty_specs")
    result = run("-c", code, "--arch", "gfx942", "--kernel", "spilling", "--json", str(path))
    report = kernels_of(result, path)["spilling sample", "gfx942"]["report"]
    assert report["spill_bytes"] > 0
    assert "spilling sample on gfx942: spills" in result.stdout
    assert result.returncode == 1


# What is shipped.


def test_the_kernels_for_sdar_can_be_shipped(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    result = run(
        "tools/compile_kernels.py", "--kernel", "bf16 d128 g4", "--json", str(path),
        *(f"--arch={arch}" for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "15 configurations, 5 architectures: no spills" in result.stdout
    for arch in ("sm_80", "sm_90", "sm_100", "sm_120"):
        report = kernels_of(result, path)["attention_forward bf16 d128 g4", arch]["report"]
        full, masked = report["loops"]
        assert masked["instructions"] <= 1.7 * full["instructions"], arch


def test_the_mask_costs_little_per_key(tmp_path: Path) -> None:
    """A step with the mask may be narrower, which hides what the mask adds: counted per key."""
    path = tmp_path / "kernels.json"
    result = run(
        "-c", SAMPLES.format(kernels="full_width_specs"), "--json", str(path),
        *(f"--arch={arch}" for arch in ("sm_80", "sm_90", "sm_100", "sm_120")),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    for (_, arch), kernel in kernels_of(result, path).items():
        launch = triton_configs.attention_config(arch, 128, torch.bfloat16, 4).forward
        masked_keys = launch.keys if arch in ("sm_90", "sm_100") else launch.masked
        full, masked = (loop["instructions"] for loop in kernel["report"]["loops"])
        assert masked / masked_keys <= 1.7 * full / launch.keys, arch


@pytest.mark.slow
def test_every_kernel_can_be_shipped() -> None:
    result = run("tools/compile_kernels.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(ARCHITECTURES)} architectures: no spills" in result.stdout


def test_the_tables_name_the_architectures_that_are_compiled_for() -> None:
    assert set(triton_configs.ARCHITECTURES) == set(ARCHITECTURES)


def test_two_kernels_of_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(shipped=lambda arch: [spec(f"one {arch}"), spec("two")])
    monkeypatch.setitem(sys.modules, "sdar_kernels.sample", module)
    monkeypatch.setattr(shipped_kernels, "KERNEL_MODULES", ("sample",))
    assert [s.name for s in shipped_kernels.shipped_kernels("sm_80")] == ["one sm_80", "two"]
    monkeypatch.setattr(shipped_kernels, "KERNEL_MODULES", ("sample", "sample"))
    with pytest.raises(ValueError, match=r"several shipped kernels for sm_80 .* one sm_80, two"):
        shipped_kernels.shipped_kernels("sm_80")


# Mistakes of the caller.


def spec(name: str, *arguments: str) -> KernelSpec:
    kernel = SimpleNamespace(arg_names=list(arguments))
    return KernelSpec(name, kernel, {"source": "*bf16"}, {"TILE": 64}, 4, 1, aligned=("source",))


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_of_time, "interpreting", lambda: False)
    monkeypatch.setattr(compiled_kernels, "interpreting", lambda: False)


def test_an_unknown_architecture() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture 'sm_75'; known: sm_80, .*gfx942"):
        compile_spec(spec("a", "source", "TILE"), "sm_75")


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("arguments", [("source",), ("source", "TILE", "size"), ("size", "TILE")])
def test_a_signature_that_does_not_fit(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"a: the kernel's arguments are .* described are"):
        compile_spec(spec("a", *arguments), "sm_80")


@pytest.mark.usefixtures("compiling")
def test_aligned_names_no_argument() -> None:
    wrong = replace(spec("a", "source", "TILE"), aligned=("TILE",))
    with pytest.raises(ValueError, match=r"aligned \['TILE'\]"):
        compile_spec(wrong, "sm_80")


def test_nothing_compiles_while_kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        compile_spec(spec("a", "source", "TILE"), "sm_80")
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        compile_kernels(lambda arch: [], ["sm_80"], name_part="", num_workers=1)


@pytest.mark.usefixtures("compiling")
def test_nothing_to_compile() -> None:
    def kernels(arch: str) -> list[KernelSpec]:
        return [] if arch == "sm_86" else [spec("forward"), spec("backward")]

    with pytest.raises(ValueError, match="name contains 'x'; names: forward, backward"):
        compile_kernels(kernels, ["sm_80"], name_part="x", num_workers=1)
    with pytest.raises(ValueError, match="no kernel is shipped for sm_86"):
        compile_kernels(kernels, ["sm_80", "sm_86"], name_part="", num_workers=1)
    with pytest.raises(ValueError, match="0 processes cannot compile"):
        compile_kernels(kernels, ["sm_80"], name_part="", num_workers=0)


def test_the_tool_tells_a_mistake_in_one_line() -> None:
    result = run("tools/compile_kernels.py", "--kernel", "no such kernel")
    assert result.returncode == 1
    assert result.stderr.startswith("error: no kernel's name contains 'no such kernel'")
    assert result.stderr.count("\n") == 1


def test_help_teaches() -> None:
    result = run("tools/compile_kernels.py", "--help")
    assert "python tools/compile_kernels.py --kernel attention --arch sm_90" in result.stdout
    assert result.stdout.isascii()


def test_what_a_tool_says_must_be_clear() -> None:
    with pytest.raises(RuntimeError, match="once, found it 2 times"):
        ahead_of_time._only(re.compile("REG:(\\d+)"), "REG:3 REG:4")
    with pytest.raises(RuntimeError, match="once, found it 0 times"):
        ahead_of_time._only(re.compile("REG:(\\d+)"), "")
    with pytest.raises(RuntimeError, match="failed:\nno"):
        ahead_of_time._output([sys.executable, "-c", "import sys; sys.exit('no')"])
