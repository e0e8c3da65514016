"""Tools as users start them: each in a process of its own, forked so that it costs little.

A run that hangs is ended, its memory is limited, and what it left on both outputs comes back.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

SECONDS = 60
EXTRA_BYTES = 3 * 2**30  # of address space, which threads take by 64 MiB each
MODULES = {
    "pretrain": "pretrain_sdar",
    "doctor": "megatron_sdar.doctor.__main__",
    **{
        name: f"tools.{name}"
        for name in (
            "preprocess_data", "convert_checkpoint", "generate", "evaluate", "inspect_data",
            "merge_adapter", "explain_config", "replay_step",
        )
    },
}  # fmt: skip
_LONGEST_MESSAGE = 4000


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: exit code, or minus the signal that ended it.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def text(self) -> str:
        return f"{self.stdout}\n{self.stderr}"

    def problem(self, *words: str) -> str | None:
        """Why this is not a readable refusal that has one of the words; None: it is one."""
        if self.code == -signal.SIGALRM:
            return "hangs"
        if self.code not in (1, 2):
            return f"exit code {self.code}: {self.text[-1500:]}"
        if "Traceback (most recent call last)" in self.text:
            return f"traceback: {self.text[-1500:]}"
        if "MemoryError" in self.text:
            return f"out of memory: {self.text[-1500:]}"
        errors = re.findall(r"(?:rank \d+: )?error: .*", self.stderr) or [self.stdout]
        if any(words) and not any(re.search(word, self.text) for word in words):
            return f"says nothing of {words}: {errors}"
        if len(self.stderr) > _LONGEST_MESSAGE:
            return f"{len(self.stderr)} characters: {self.stderr[:500]}"
        return None


def run_tool(
    name: str,
    arguments: Sequence[str | Path],
    cwd: Path,
    extra_bytes: int = EXTRA_BYTES,
    seconds: int = SECONDS,
) -> Outcome:
    """Run main(ARGUMENTS) of a tool in a forked process."""
    module = importlib.import_module(MODULES[name])
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    outputs = [cwd / f".{name}.stdout", cwd / f".{name}.stderr"]
    if c10d.is_initialized():
        gc.collect()  # groups that tests left behind; the fork must not be the one to end them
    process = os.fork()
    if process == 0:
        code = 70
        try:
            _become_a_tool(outputs, cwd, extra_bytes, seconds)
            code = _call(module, [str(argument) for argument in arguments])
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in outputs]
    for path in outputs:
        path.unlink()
    return Outcome(os.waitstatus_to_exitcode(status), *texts, time.monotonic() - began)


def _become_a_tool(outputs: Sequence[Path], cwd: Path, extra_bytes: int, seconds: int) -> None:
    for number, path in enumerate(outputs, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    os.chdir(cwd)
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), line_buffering=True)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), line_buffering=True)  # noqa: SIM115
    gc.freeze()
    _forget_process_group()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def _forget_process_group() -> None:
    """That of the tests, if there is one; a tool starts its own.

    Nothing of it is ended here, nor is the tool's: threads did not come along with the fork, and
    os._exit is soon to come.
    """
    if not c10d.is_initialized():
        return
    _left.append(c10d._world)
    c10d._unregister_all_process_groups()
    c10d._world = c10d._World()
    c10d._update_default_pg(None)
    dist.destroy_process_group = lambda: None


_left: list[object] = []


def _call(module: object, arguments: list[str]) -> int:
    """What the interpreter would make of main's end."""
    try:
        code = module.main(arguments)  # type: ignore[attr-defined]
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 70
    return int(code or 0)
