"""Telling the user, without ever getting in his way.

The report holds everything; what must not wait until somebody reads it is a warning. Of what goes wrong inside the
pass there is one in a process, however many sites and graphs it concerns. Where warnings are errors none is raised:
the pass works inside torch's compiler, which takes an exception for its own.
"""

from __future__ import annotations

import contextlib
import threading
import warnings

from attnpass.ledger import Report

_lock = threading.Lock()
_told = False


def warned(text: str) -> None:
    """A warning that is none of the caller's business: it never raises."""
    with contextlib.suppress(Warning):
        warnings.warn(f"attnpass: {text}", RuntimeWarning, stacklevel=2)


def of_failures(report: Report) -> None:
    """The first defect that shows in this process."""
    defect = next((failure for failure in report.failures if not failure.known), None)
    if defect is not None:
        once(
            f"{defect.part or defect.graph}, {defect.stage}: {defect.line}. A bug of attnpass; what it concerns was "
            "left as it was and the model runs as before. Please report it with the traceback in attnpass.report(). "
            "This is said once; later failures are in the report only"
        )


def once(text: str) -> None:
    """The first of these texts in this process."""
    global _told
    with _lock:
        first, _told = not _told, True
    if first:
        warned(text)
