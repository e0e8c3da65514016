"""The C++ kernels are built once, by one process, from what the machine has, or not used."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from sdar_kernels import native_attention, native_build
from sdar_kernels.attention_backend import choose_backend
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.native_build import NativeKernelsError, load_native_kernels
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
HEADS = HeadLayout(4, 2, 16)


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """A g++ that takes no time: it writes down its calls, and a library without functions."""
    try:
        load_native_kernels()
    except NativeKernelsError as error:
        pytest.skip(f"there is no native library to copy: {error}")
    library = next(native_build.default_folder().glob("attention-*.so"))
    script = tmp_path / "bin" / "g++"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "g++ for tests"; exit; fi\n'
        f'echo called >> "{tmp_path}/calls"\n'
        f'while [ "$1" != -o ]; do shift; done; sleep 0.2; cp "{library}" "$2"\n'
    )
    script.chmod(0o755)
    return str(script)


def _compiler(folder: Path, commands: str) -> str:
    """A g++ that answers --version with nothing, and else does this."""
    script = folder / "g++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\n{commands}\n')
    script.chmod(0o755)
    return str(script)


def _calls(tmp_path: Path) -> int:
    calls = tmp_path / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def _load(folder: Path, compiler: str | None) -> object:
    load = load_native_kernels.__wrapped__
    with mock.patch("shutil.which", return_value=compiler):
        return load(folder)


def test_a_second_start_builds_nothing(tmp_path: Path, compiler: str) -> None:
    for _ in range(2):
        _load(tmp_path / "kept", compiler)
    assert _calls(tmp_path) == 1
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    assert len(list((tmp_path / "kept").glob("attention-*.so"))) == 1


@pytest.mark.parametrize("what", ["source", "compiler", "cpu", "option"])
def test_what_decides_the_result_is_part_of_its_name(
    tmp_path: Path, compiler: str, what: str
) -> None:
    _load(tmp_path / "kept", compiler)
    if what == "source":
        changed = tmp_path / "native"
        changed.mkdir()
        for source in native_build._SOURCES.iterdir():
            (changed / source.name).write_bytes(source.read_bytes() + b"\n")
        change = mock.patch.object(native_build, "_SOURCES", changed)
    elif what == "compiler":
        script = Path(compiler)
        script.write_text(script.read_text().replace("for tests", "for other tests"))
        change = mock.patch.object(native_build, "_COMPILER", "g++")
    elif what == "cpu":
        change = mock.patch.object(native_build, "_cpu_flags", return_value="flags: fewer")
    else:
        change = mock.patch.object(native_build, "_OPTIONS", (*native_build._OPTIONS, "-g"))
    with change:
        _load(tmp_path / "kept", compiler)
    assert _calls(tmp_path) == 2
    assert len(list((tmp_path / "kept").glob("attention-*.so"))) == 2


_LOAD = """
import sys
sys.path[:0] = ["kernels"]
from pathlib import Path
from unittest import mock
from sdar_kernels.native_build import load_native_kernels
with mock.patch("shutil.which", return_value=sys.argv[2]):
    print(load_native_kernels(Path(sys.argv[1]))._name)
"""


def test_processes_that_start_together_build_once(tmp_path: Path, compiler: str) -> None:
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "kept"), compiler]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    names = {rank.communicate()[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert len(names) == 1
    assert _calls(tmp_path) == 1


def _read_only(folder: Path) -> None:
    folder.write_text("a file where the folder should be")


def _writable_by_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize("spoil", [_read_only, _writable_by_others])
def test_where_nothing_can_be_kept_a_process_builds_for_itself(
    tmp_path: Path, compiler: str, spoil: Callable[[Path], None]
) -> None:
    spoil(tmp_path / "kept")
    for _ in range(2):
        assert str(tmp_path / "kept") not in _load(tmp_path / "kept", compiler)._name
    assert _calls(tmp_path) == 2


def test_a_user_without_a_home_builds_for_a_process(compiler: str) -> None:
    with mock.patch.object(Path, "home", side_effect=RuntimeError("no home")):
        assert "sdar-native-" in load_native_kernels.__wrapped__()._name


def test_a_library_that_others_could_have_put_there_is_not_loaded(
    tmp_path: Path, compiler: str
) -> None:
    _load(tmp_path / "kept", compiler)
    (library,) = (tmp_path / "kept").glob("attention-*.so")
    library.write_bytes(b"planted")
    (tmp_path / "kept").chmod(0o770)
    _load(tmp_path / "kept", compiler)
    assert library.read_bytes() == b"planted"
    assert _calls(tmp_path) == 2


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    says = 'echo "In file included:" >&2; echo "x.h:1: error: no such type" >&2; exit 1'
    compiler = _compiler(tmp_path, says)
    with pytest.raises(NativeKernelsError, match=r"failed: x\.h:1: error: no such type"):
        _load(tmp_path / "kept", compiler)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["lock"]


def test_a_compiler_that_hangs_is_stopped(tmp_path: Path) -> None:
    compiler = _compiler(tmp_path, "exec sleep 60")
    with (
        mock.patch.object(native_build, "_SECONDS", 0.2),
        pytest.raises(NativeKernelsError, match=r"took more than 0\.2 s"),
    ):
        _load(tmp_path / "kept", compiler)


def test_a_file_that_does_not_load_is_named(tmp_path: Path) -> None:
    compiler = _compiler(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo nothing > "$2"')
    with pytest.raises(NativeKernelsError, match=r"attention-.*\.so does not load"):
        _load(tmp_path / "kept", compiler)


@pytest.mark.parametrize("what", ["no_cpuinfo", "no_temporary_folder"])
def test_a_machine_that_cannot_build_is_told_in_one_line(
    tmp_path: Path, compiler: str, what: str
) -> None:
    """Not by an OSError, which would end a run that has a tiled path."""
    _read_only(tmp_path / "kept")
    full = OSError(28, "No space left on device")
    broken = (
        mock.patch.object(native_build, "_cpu_flags", side_effect=full)
        if what == "no_cpuinfo"
        else mock.patch("tempfile.TemporaryDirectory", side_effect=full)
    )
    with broken, pytest.raises(NativeKernelsError, match=r"cannot be built here: .*No space left"):
        _load(tmp_path / "kept", compiler)


def test_without_a_compiler_auto_takes_tiled_and_says_why() -> None:
    def refuse() -> None:
        raise NativeKernelsError("it is compiled by g++, which is not installed")

    with mock.patch.object(native_attention, "load_native_kernels", refuse):
        choice = choose_backend("auto", CPU, torch.float32, HEADS)
        assert (choice.name, choice.reason) == (
            "tiled",
            "native failed: it is compiled by g++, which is not installed; using tiled",
        )
        with pytest.raises(ValueError, match=r"native cannot be used here: it is compiled"):
            choose_backend("native", CPU, torch.float32, HEADS)
    with pytest.raises(NativeKernelsError, match=r"by g\+\+, which is not installed"):
        _load(Path("unused"), None)
    with (
        mock.patch("platform.system", return_value="Darwin"),
        pytest.raises(NativeKernelsError, match="on Linux only, this is Darwin"),
    ):
        _load(Path("unused"), "g++")


def test_a_library_that_computes_something_else_is_not_chosen(compiler: str) -> None:
    run = native_attention._run

    def wrong(way: str, plan: object, tensors: tuple[Tensor, ...]) -> None:
        run(way, plan, tensors)
        if way == "backward":
            tensors[-2].mul_(1.01)  # the gradient of k

    with mock.patch.object(native_attention, "_run", wrong):
        choice = choose_backend("auto", CPU, torch.float32, HEADS)
    assert choice.name == "tiled"
    assert choice.reason.startswith("native failed: key gradient is off by 1.0e-02")


@pytest.mark.backends
@pytest.mark.parametrize("cpu", ["x86-64", "haswell", "skylake-avx512"])
def test_forms_for_other_cpus(tmp_path: Path, cpu: str) -> None:
    """128, 256 and 512 bit vectors: each where this CPU can run it."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    flags = native_build._cpu_flags().split()
    needed = {"x86-64": "sse2", "haswell": "avx2", "skylake-avx512": "avx512f"}[cpu]
    if needed not in flags:
        pytest.skip(f"this CPU has no {needed}")
    options = [f"-march={cpu}" if o == "-march=native" else o for o in native_build._OPTIONS]
    with mock.patch.object(native_build, "_OPTIONS", tuple(options)):
        library = load_native_kernels.__wrapped__(tmp_path)
    with mock.patch.object(native_attention, "load_native_kernels", return_value=library):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for heads in (HEADS, HeadLayout(8, 2, 64), HeadLayout(3, 1, 33)):
                assert choose_backend("native", CPU, dtype, heads).name == "native"
