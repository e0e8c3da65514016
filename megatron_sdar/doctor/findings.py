"""One finding of the doctor, and showing all of them.

Every finding that is not ok says what to do. Only `missing` keeps a run from working; `slow` is
worth mending.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

OK, SLOW, MISSING = "ok", "slow", "missing"
_STYLES = {OK: "green", SLOW: "yellow", MISSING: "bold red"}


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        name: of the thing.
        state: OK, SLOW or MISSING.
        text: what was found.
        remedy: what to do; "" if and only if the state is OK.
    """

    name: str
    state: str
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert (self.state == OK) == (not self.remedy), f"{self.name}: a remedy for what is wrong"


def ok(name: str, text: str) -> Finding:
    return Finding(name, OK, text)


def slow(name: str, text: str, remedy: str) -> Finding:
    return Finding(name, SLOW, text, remedy)


def missing(name: str, text: str, remedy: str) -> Finding:
    return Finding(name, MISSING, text, remedy)


def is_ready(findings: Sequence[Finding]) -> bool:
    """Whether nothing that is needed is missing."""
    return all(finding.state != MISSING for finding in findings)


def as_json(findings: Sequence[Finding]) -> str:
    """{"ready": bool, "findings": [{name, state, text, remedy}]}"""
    content = {"ready": is_ready(findings), "findings": [asdict(each) for each in findings]}
    return json.dumps(content, indent=2, ensure_ascii=False)


def show(findings: Sequence[Finding], console: Console) -> None:
    """A line for each finding, its remedy below it, and a verdict."""
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.text)
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(Text(finding.state, style=_STYLES[finding.state]), finding.name, text)
    console.print(table)
    wrong = [finding.name for finding in findings if finding.state == MISSING]
    verdict = f"not ready: {', '.join(wrong)}" if wrong else "ready to train"
    console.print(Text(f"\n{verdict}", style="bold"))
