"""Conversions that are killed; run as a script by test_killed_conversions.

Imports once and forks a converter per line of stdin: a JSON list of seconds after which it gets
SIGKILL (null: it may finish) and the tool's arguments. Answers with a JSON line: the exit status
(negative: killed) and the seconds it lived.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from tools.convert_checkpoint import main as convert


def trial(seconds: float | None, arguments: list[str]) -> tuple[int, float]:
    """Exit status and seconds of one conversion."""
    started = time.monotonic()
    converter = os.fork()
    if converter == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(convert(arguments))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(converter, signal.SIGKILL)
    _, status = os.waitpid(converter, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def main() -> None:
    for line in sys.stdin:
        seconds, arguments = json.loads(line)
        print(json.dumps(trial(seconds, arguments)), flush=True)


if __name__ == "__main__":
    main()
