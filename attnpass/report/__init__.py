"""What people and programs read of a report: text, terminal, JSON, one HTML page, a tlparse artifact.

    Report ── group.py (equal sites together) ── words.py (a spec in words) ──┬─ text.py  print(report), terminals
           │                                                                  └─ html.py  one self-contained page
           └─ json.py  the stable form, version 1 ── trace.py  the same for tlparse

Nothing is analysed here: whatever is shown was recorded when the decision was made. Every function takes a
:class:`~attnpass.ledger.Report` and imports what it needs itself, so this package costs nothing until it is used.
"""
