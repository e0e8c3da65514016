"""What a replayed step tells the user: a table, and what to make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sdar.training.step_replay import MicroBatchReport

_HEADER = ("micro-batch", "documents", "label tokens", "loss", "gradient norm", "finite", "module")
_SHOWN = 5


def format_reports(reports: Sequence[MicroBatchReport]) -> str:
    """The table and the conclusion."""
    rows = [_HEADER, *(_cells(report) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *_conclusion(reports)])


def _cells(report: MicroBatchReport) -> tuple[str, ...]:
    if report.module is not None:
        module = report.module
    elif report.parameters:
        module = f"forward is finite; gradients of {_some(report.parameters)} are not"
    else:
        module = "-"
    return (
        str(report.number),
        _some([_document(document) for document in report.documents]),
        f"{report.label_tokens:,}",
        f"{report.loss:.6g}",
        f"{report.grad_norm:.6g}",
        "yes" if report.is_finite else "no",
        module,
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _document(document: Mapping[str, Any]) -> str:
    piece = f".{document['piece']}" if document.get("piece") else ""
    return f"{str(document['dataset']).rpartition('/')[2]}:{document['document']}{piece}"


def _conclusion(reports: Sequence[MicroBatchReport]) -> list[str]:
    guilty = [report for report in reports if not report.is_finite]
    if not guilty:
        return [
            "every micro-batch is finite. If the weights are exactly those of the step, it was no "
            "fault of the",
            "data: suspect the device (the record lists the ranks), or an overflow in another "
            "layout or kernel.",
        ]
    lines = [f"not finite: micro-batch {', '.join(str(report.number) for report in guilty)}"]
    lines += [
        f"documents of micro-batch {report.number}: {', '.join(map(_document, report.documents))}"
        for report in guilty
    ]
    return lines
