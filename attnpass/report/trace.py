"""The report as an artifact of torch's structured trace, so that tlparse shows it beside the graphs it speaks of."""

from __future__ import annotations

from attnpass.ledger import Report

NAME = "attnpass_report"


def trace(report: Report) -> None:
    """Write the report to the trace of the compilation that is running; nothing happens where none is recorded."""
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": NAME, "encoding": "json"},
        payload_fn=lambda: report.to_json(indent=2),
    )
