"""torchrun in the background: what it and its ranks say, and signals to them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from distributed.command import ROOT

PATIENCE = 120.0


class TorchRun:
    """The entry script under torchrun, in a session of its own.

    Args:
        num_processes: on this host.
        config: keys and values.
        output: output_dir; the configuration and the output lie beside it.
        options: more of torchrun's.
        script: in place of pretrain_sdar.py.
        environment: on top of this process's.
        prefix: a command that runs torchrun.
    """

    def __init__(
        self,
        num_processes: int,
        config: Mapping[str, object],
        output: Path,
        options: Sequence[str] = ("--standalone",),
        *,
        script: Path = ROOT / "pretrain_sdar.py",
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.output = output
        path = output.with_suffix(".yaml")
        path.write_text(yaml.safe_dump({**config, "output_dir": str(output)}))
        self._text = output.with_suffix(f".{time.monotonic_ns()}.txt")
        launcher = [sys.executable, "-m", "torch.distributed.run", *options]
        arguments = ["--nproc_per_node", str(num_processes), str(script), str(path)]
        with self._text.open("w") as file:
            self.process = subprocess.Popen(
                [*prefix, *launcher, *arguments],
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
                    "OMP_NUM_THREADS": "1",
                    **(environment or {}),
                },
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """All that was said so far, by all processes."""
        return self._text.read_text()

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> re.Match[str]:
        """The first match in what is said; an error if it does not come in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if (found := re.search(pattern, self.text)) is not None:
                return found
            if ended:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in:\n{self.text}")

    def ranks(self) -> dict[int, int]:
        """Process id by rank, of the ranks that run now."""
        found = {}
        for pid in self._children(self.process.pid):
            try:
                environment = Path(f"/proc/{pid}/environ").read_text()
            except OSError:
                continue  # gone meanwhile
            if (rank := re.search(r"(?:^|\0)RANK=(\d+)\0", environment)) is not None:
                found[int(rank[1])] = pid
        return found

    def descendants(self) -> list[int]:
        """The ranks' processes and all of theirs."""
        found = list(self._children(self.process.pid))
        for pid in found:
            found += self._children(pid)
        return found

    @staticmethod
    def _children(pid: int) -> list[int]:
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            return [
                int(child) for task in tasks for child in (task / "children").read_text().split()
            ]
        except OSError:
            return []

    def end(self, seconds: float = PATIENCE) -> int:
        """The exit code, when it has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"it did not end:\n{self.text}") from error

    def kill(self) -> None:
        """SIGKILL to torchrun and all that it started, as when a host loses power."""
        if self.process.poll() is None:
            processes = [self.process.pid, *self.descendants()]
            for pid in processes:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self.process.wait()
