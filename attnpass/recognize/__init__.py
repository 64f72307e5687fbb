"""Recognition: every softmax of a graph becomes a site or a miss.

    anchors (softmax.py) -> inwards to q.k (walk.py, scores.py, products.py) -> outwards to the values (weights.py)
    -> roles, places to read, spec (assemble.py, operands.py, meaning.py)

Axes are tracked exactly (axes.py, views.py), writes too (purity.py). Anything not understood raises Refuse, which
becomes a Miss that keeps how far the walk got.
"""

from attnpass.recognize.find import Finding, Lost, find
from attnpass.recognize.inner import Inner
from attnpass.recognize.walk import Found, Walker, register_rule

__all__ = ["Finding", "Found", "Inner", "Lost", "Walker", "find", "register_rule"]
