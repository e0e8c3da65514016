"""What torch's flight recorder knows of this process's collectives.

It records them for gloo and NCCL without being asked (TORCH_FR_BUFFER_SIZE, the last 2000), but
no messages between two ranks on gloo.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch._C._distributed_c10d as c10d

_KNOWN_STATES = ("completed", "scheduled", "started")


@dataclass(frozen=True)
class Collectives:
    """Collectives of this process, in words.

    Attributes:
        last: the latest that was begun, None if there is no record.
        unfinished: those under way, oldest first.
        trace: the whole record as JSON, "" if there is none.
    """

    last: str | None
    unfinished: tuple[str, ...]
    trace: str


def recorded_collectives() -> Collectives:
    """The record of now. Reads memory of this process only; may be called from any thread."""
    dump = getattr(c10d, "_dump_fr_trace_json", None)
    if dump is None:  # a private function: another torch may lack it
        return Collectives(None, (), "")
    text = dump(True, False).decode("utf-8", errors="replace")
    entries = json.loads(text).get("entries", [])
    unfinished = [_in_words(entry) for entry in entries if not entry.get("retired", True)]
    last = _in_words(entries[-1]) if entries else None
    return Collectives(last, tuple(unfinished), text)


def _in_words(entry: Mapping[str, Any]) -> str:
    """For instance: gloo:all_reduce number 12 of group 3 (undefined), [4, 8] Float."""
    group, description = entry.get("process_group", ["?", "?"])
    number = entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id", "?")
    sizes = ", ".join(str(size) for size in entry.get("input_sizes", []))
    dtypes = ", ".join(sorted(set(entry.get("input_dtypes", []))))
    state = entry.get("state")
    began = f", {state}" if state in _KNOWN_STATES else ""
    return (
        f"{entry.get('profiling_name', '?')} number {number} of group {group} ({description}), "
        f"{sizes} {dtypes}{began}"
    )
