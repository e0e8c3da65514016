"""Compiles a Triton kernel for any architecture without a GPU, and reports what it would use.

Registers, spills and matrix loops are read from the machine code that would run. A kernel that
spills or asks for more shared memory than a block can have is named by `problems`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdar_kernels.sass import MatrixLoop, matrix_loops, read_sass
from sdar_kernels.triton_runtime import KernelSpec, interpreting

# Most shared memory (LDS on gfx942) that one block can have, in bytes.
SHARED_MEMORY_LIMITS = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
ARCHITECTURES = tuple(SHARED_MEMORY_LIMITS)
TENSOR_MEMORY_LIMIT = 512
_ALIGNED = [["tt.divisibility", 16]]
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SERIALIZED = re.compile(r"wgmma\S* instructions are serialized")


@dataclass(frozen=True)
class CompiledKernel:
    """What one compiled form of a kernel uses on one architecture.

    Attributes:
        name: that of the KernelSpec.
        arch: one of ARCHITECTURES.
        registers: per thread; on gfx942 vector registers, accumulation registers included.
        spill_bytes: per thread, of the instructions that store and load spilled registers, each
            counted once; on gfx942 four for each spilled vector register.
        shared_bytes: of shared memory per block.
        tensor_memory_columns: of the 512 of an sm_100 multiprocessor.
        serialized: ptxas could not overlap the asynchronous multiplications of sm_90.
        instructions: in the whole kernel; None on gfx942.
        loops: innermost loops that multiply matrices, in order; None on gfx942.
    """

    name: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    serialized: bool
    instructions: int | None
    loops: tuple[MatrixLoop, ...] | None

    @property
    def full_loop(self) -> int | None:
        """Instructions of the first matrix loop: the unmasked one of an attention kernel."""
        return self.loops[0].instructions if self.loops else None

    @property
    def masked_loop(self) -> int | None:
        """Instructions of the second matrix loop: the masked one of an attention kernel."""
        return self.loops[1].instructions if self.loops and len(self.loops) > 1 else None

    @property
    def masked_ratio(self) -> float | None:
        """How many times longer the masked loop is; None without two loops."""
        if self.full_loop is None or self.masked_loop is None:
            return None
        return self.masked_loop / self.full_loop


def problems(report: CompiledKernel) -> list[str]:
    """What keeps this kernel from being shipped, one sentence each; empty if nothing does."""
    limit = SHARED_MEMORY_LIMITS[report.arch]
    found = []
    if report.spill_bytes:
        found.append(f"spills {report.spill_bytes:,} bytes of registers")
    if report.shared_bytes > limit:
        found.append(f"needs {report.shared_bytes:,} bytes of shared memory, limit {limit:,}")
    if report.tensor_memory_columns > TENSOR_MEMORY_LIMIT:
        found.append(
            f"needs {report.tensor_memory_columns} columns of tensor memory, "
            f"limit {TENSOR_MEMORY_LIMIT}"
        )
    if report.serialized:
        found.append("ptxas serialized its wgmma instructions")
    return [f"{report.name} on {report.arch}: {what}" for what in found]


def compile_spec(spec: KernelSpec, arch: str) -> CompiledKernel:
    """Compile SPEC for ARCH, one of ARCHITECTURES; Triton's cache is used.

    Raises ValueError for an unknown architecture, a signature that does not fit the kernel, and
    in a process that interprets kernels. What Triton cannot compile raises its own errors.
    """
    if arch not in SHARED_MEMORY_LIMITS:
        raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    if interpreting():
        raise ValueError("kernels are interpreted here: unset TRITON_INTERPRET to compile them")
    binary = _compiled(spec, arch)
    if arch.startswith("gfx"):
        return _amd_report(spec.name, arch, binary)
    return _nvidia_report(spec.name, arch, binary)


def _compiled(spec: KernelSpec, arch: str) -> Any:
    names = spec.kernel.arg_names
    given = {*spec.signature, *spec.constexprs}
    if given != set(names) or not set(spec.aligned) <= set(spec.signature):
        raise ValueError(
            f"{spec.name}: the kernel's arguments are {sorted(names)}, "
            f"described are {sorted(given)}, aligned {sorted(spec.aligned)}"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=spec.kernel,
        signature={name: spec.signature.get(name, "constexpr") for name in names},
        constexprs=spec.constexprs,
        attrs={(names.index(name),): _ALIGNED for name in spec.aligned},
    )
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", _capability(arch), 32)
    # The default of enable_fp_fusion differs between Triton 3.9 and 3.10.
    options = {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=target, options=options)


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _nvidia_report(name: str, arch: str, binary: Any) -> CompiledKernel:
    from triton import knobs

    log = _ptxas_log(binary.asm["ptx"], _capability(arch))
    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory(prefix="sdar-kernel-") as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        usage = _output([tool, "-res-usage", str(cubin)])
        code = read_sass(_output([tool, "-sass", str(cubin)]))
    registers = int(_only(re.compile(r"REG:(\d+)"), usage)[1])
    logged = int(_only(_REGISTERS, log)[1])
    if registers != logged:
        raise RuntimeError(
            f"{name} on {arch}: the kernel has {registers} registers, a second run of ptxas "
            f"gave it {logged}: its spills are unknown"
        )
    return CompiledKernel(
        name=name,
        arch=arch,
        registers=registers,
        spill_bytes=sum(map(int, _only(_SPILLS, log).groups())),
        shared_bytes=binary.metadata.shared,
        tensor_memory_columns=binary.metadata.tmem_size,
        serialized=_SERIALIZED.search(log) is not None,
        instructions=len(code),
        loops=matrix_loops(code),
    )


def _ptxas_log(ptx: str, capability: int) -> str:
    """What ptxas says of PTX, run as Triton itself runs it: the log is not in Triton's cache."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory(prefix="sdar-kernel-") as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        return _output(
            [
                get_ptxas(capability).path,
                "-v",
                "--regAllocOptLevel=2",
                f"--gpu-name={sm_arch_from_capability(capability)}",
                str(source),
                "-o",
                str(source.with_suffix(".cubin")),
            ]
        )


def _amd_report(name: str, arch: str, binary: Any) -> CompiledKernel:
    text = binary.asm["amdgcn"]
    return CompiledKernel(
        name=name,
        arch=arch,
        registers=int(_only(re.compile(r"\.vgpr_count:\s*(\d+)"), text)[1]),
        spill_bytes=4 * int(_only(re.compile(r"\.vgpr_spill_count:\s*(\d+)"), text)[1]),
        shared_bytes=binary.metadata.shared,
        tensor_memory_columns=0,
        serialized=False,
        instructions=None,
        loops=None,
    )


def _only(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    """The one place where PATTERN occurs; RuntimeError if there is none, or several."""
    found = list(pattern.finditer(text))
    if len(found) != 1:
        raise RuntimeError(f"expected {pattern.pattern!r} once, found it {len(found)} times")
    return found[0]


def _output(command: list[str]) -> str:
    """Standard output and error of a tool; RuntimeError with them if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout
