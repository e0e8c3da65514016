"""The project's C++ kernels for CPUs: built where they run, once, and kept on disk.

They are compiled for exactly this CPU, in some seconds, by the machine's g++; the file's name tells
the sources, the compiler and the CPU apart, so that homes which several machines share are safe.
They use the OpenMP runtime that torch brings: its threads, and no others.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

_SOURCES = Path(__file__).parent / "native"
_MAIN = "attention.cpp"
_COMPILER = "g++"
_OPTIONS = (
    "-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_SECONDS = 300


class NativeKernelsError(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why in one line."""


def default_folder() -> Path:
    """Where built kernels are kept.

    Raises:
        OSError: the user has no home.
    """
    try:
        return Path.home() / ".cache" / "megatron_sdar"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


@lru_cache(maxsize=4)
def load_native_kernels(folder: Path | None = None) -> ctypes.CDLL:
    """The library, built first if it is not there yet.

    Args:
        folder: where it is kept; default: `default_folder`. Where nothing can be kept it is built
            for this process alone.

    Raises:
        NativeKernelsError: no compiler, or it failed.
    """
    if platform.system() != "Linux":
        raise NativeKernelsError(f"it is compiled on Linux only, this is {platform.system()}")
    compiler = shutil.which(_COMPILER)
    if compiler is None:
        raise NativeKernelsError(f"it is compiled by {_COMPILER}, which is not installed")
    try:
        name = f"attention-{_fingerprint(compiler)}.so"
        try:
            folder = folder or default_folder()
            with _locked(folder):
                if not (folder / name).exists():
                    _build(compiler, folder / name)
                return _load(folder / name)
        except OSError:  # nothing can be kept there, or nothing that lies there be trusted
            with tempfile.TemporaryDirectory(prefix="sdar-native-") as own:
                _build(compiler, Path(own, name))
                return _load(Path(own, name))
    except OSError as error:
        raise NativeKernelsError(f"it cannot be built here: {str(error)[:200]}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process builds, the others of this machine wait for it.

    Raises:
        OSError: the folder cannot be written, or others than its owner can write to it: what is
            loaded from there would be theirs.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} belongs to, or can be written by, others")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(compiler: str, library: Path) -> None:
    """Compile to a name of this process, then rename: a killed build leaves nothing that loads."""
    unfinished = library.with_name(f".{library.name}.{platform.node()}.{os.getpid()}")
    command = [compiler, *_OPTIONS, str(_SOURCES / _MAIN), "-o", str(unfinished)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        unfinished.unlink(missing_ok=True)
        raise NativeKernelsError(f"{compiler} took more than {_SECONDS} s") from error
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        lines = (line for line in done.stderr.splitlines() if "error" in line)
        first = next(lines, f"exit status {done.returncode}")
        raise NativeKernelsError(f"{compiler} failed: {first[:200]}")
    unfinished.replace(library)


def _load(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeKernelsError(f"{library} does not load: {str(error)[:200]}") from error


def _fingerprint(compiler: str) -> str:
    """Of all that decides what is built."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout
    digest = hashlib.sha256()
    for part in (*_OPTIONS, version, platform.machine(), _cpu_flags()):
        digest.update(part.encode() + b"\0")
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    """What this CPU can do, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
