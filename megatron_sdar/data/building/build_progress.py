"""What a build shows while it runs: a bar on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = 30.0


class BuildProgress:
    """Progress over source bytes, with tokens per second once there are tokens.

    Args:
        shown: False shows nothing at all.
    """

    def __init__(self, shown: bool) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._shown = shown
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task: TaskID | None = None
        self._begin("", 0)

    def _begin(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._bytes = self._tokens = 0
        self._started = self._told = time.monotonic()

    def stage(self, name: str, total_bytes: int) -> None:
        """Start a stage called NAME over TOTAL_BYTES."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._begin(name, total_bytes)
        self._task = self._bar.add_task(name, total=total_bytes, rate="")

    def advance(self, num_bytes: int, num_tokens: int = 0) -> None:
        """Move on by NUM_BYTES of source, which gave NUM_TOKENS."""
        self._bytes += num_bytes
        self._tokens += num_tokens
        now = time.monotonic()
        rate = ""
        if self._tokens:
            rate = f"{self._tokens / max(now - self._started, 1e-3):,.0f} tokens/s"
        if self._task is not None:
            self._bar.update(self._task, completed=self._bytes, rate=rate)
        if self._shown and self._bar.disable and now - self._told >= _LINE_SECONDS:
            self._told = now
            share = 100 * self._bytes / max(self._total, 1)
            line = f"{self._name}: {share:.0f}%, {self._tokens:,} tokens, {rate}"
            self._console.print(line.rstrip(", "), soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
