"""Added floats: the part that is really a mask, and the structure of what is left.

    split(tree)     0 and a dominating fill, wherever they stand among other values, become a keep-mask
    describe(tree)  nothing | the same for all keys | ALiBi | of j - i only | of the key only | dense

What does not depend on the key adds the same number to a whole row of scores, which softmax does not see; the ALiBi
form is therefore read modulo such terms. `slope[h] * (j - i)` and `slope[h] * j` are the same bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from attnpass.masks.expr import (
    FALSE,
    ZERO,
    Atom,
    Bool,
    Const,
    Fn,
    If,
    Int,
    Leaf,
    Load,
    Poly,
    Sym,
    Tree,
    of,
    variables,
    walk,
)
from attnpass.masks.frame import Frame
from attnpass.masks.logic import either, is_bool, ite, leaves, negate
from attnpass.masks.substitute import substitute
from attnpass.site import dominates
from attnpass.spec import ASSUMED, BLURS

TAME = 1e3  # data below it are ordinary numbers, and stay such when they are slopes that distances are multiplied with

Kind = Literal["none", "row", "alibi", "relative", "key", "dense"]


@dataclass(frozen=True, kw_only=True)
class Alibi:
    """slope * distance, where the slope depends on the head alone and the distance is an exact integer."""

    slope: Tree
    distance: Tree  # linear in j, or -|i - j| and the like: a decision between linear parts
    dtype: str  # in which the product is rounded


@dataclass(frozen=True, kw_only=True)
class Bias:
    """An added tensor without its masking part."""

    value: Tree
    kind: Kind
    alibi: Alibi | None = None

    def droppable(self, factor: float) -> bool:
        """Softmax gives the same without it: one number, and no great one, is added to all scores of a row.

        Beside a great one (as it is, or times the `factor` of the sum) scores are lost, and all keys weigh the same.
        Data may hold one, or an infinite one, so data is never dropped; integers are as exact as scores are.
        """
        plain = all(
            isinstance(leaf, Int) or (isinstance(leaf, Const) and abs(leaf.value * factor) < -BLURS)
            for _, leaf in leaves(self.value)
        )
        return self.kind == "none" or (self.kind == "row" and plain and 1 / TAME < abs(factor) < TAME)


@dataclass(frozen=True, kw_only=True)
class Split:
    """A float tensor as a keep-mask and a bias."""

    keep: Bool
    bias: Tree
    fills: tuple[float, ...]  # the dominating values found, least first
    exact: bool  # the fills are these very numbers, nothing is added to them
    values: tuple[float, ...] | None  # all values the tensor takes, where that is a finite set


def split(tree: Tree, dtype: torch.dtype, factor: float = 1.0) -> Split:
    """Take the mask out of an added tensor that is multiplied by `factor` before it is added."""
    off: Bool = FALSE
    fills: set[float] = set()
    exact = True
    values: set[float] | None = set()
    for when, leaf in leaves(tree):
        fill = _fill(leaf, dtype, factor)
        if fill is not None:
            off = either(off, when)
            fills.add(fill)
            exact = exact and isinstance(leaf, Const)
        if values is not None and isinstance(leaf, Const):
            values.add(leaf.value * factor + 0.0)
        else:
            values = None
    keep = negate(off)
    bias = _without(tree, dtype, factor)
    return Split(
        keep=keep,
        bias=bias,
        fills=tuple(sorted(fills)),
        exact=exact,
        values=None if values is None else tuple(sorted(values)),
    )


def _fill(leaf: Leaf, dtype: torch.dtype, factor: float) -> float | None:
    """The dominating number that a leaf is, or that is added to something in it."""
    if isinstance(leaf, Const):
        value = leaf.value * factor
        return value if dominates(value, dtype) else None
    if not isinstance(leaf, Fn) or leaf.kind != "real" or leaf.name not in ("add", "sub", "to"):
        return None
    for at, arg in enumerate(leaf.args):
        fill = _fill(arg, dtype, factor)
        others = leaf.args[:at] + leaf.args[at + 1 :]
        # x - fill is no fill, and two infinities may give NaN
        if fill is not None and all(_tame(x, factor) for x in others) and not (leaf.name == "sub" and at > 0):
            return fill
    return None


def _tame(leaf: Leaf, factor: float) -> bool:
    """Holds no number that could outweigh a fill, or turn an infinite one into NaN."""
    return not any(isinstance(e, Const) and not abs(e.value * factor) < -ASSUMED for e in walk(leaf))


def _without(tree: Tree, dtype: torch.dtype, factor: float) -> Tree:
    """The tensor where it is kept; the filled leaves give way to their neighbours."""
    if not isinstance(tree, If):
        return Const(0.0) if _fill(tree, dtype, factor) is not None or _is_zero(tree) else tree
    if _filled(tree.a, dtype, factor):
        return _without(tree.b, dtype, factor)
    if _filled(tree.b, dtype, factor):
        return _without(tree.a, dtype, factor)
    value = ite(tree.cond, _without(tree.a, dtype, factor), _without(tree.b, dtype, factor))
    assert not is_bool(value)
    return value  # type: ignore[return-value]


def _filled(tree: Tree, dtype: torch.dtype, factor: float) -> bool:
    if isinstance(tree, If):
        return _filled(tree.a, dtype, factor) and _filled(tree.b, dtype, factor)
    return _fill(tree, dtype, factor) is not None


def _is_zero(leaf: Leaf) -> bool:
    return (isinstance(leaf, Const) and leaf.value == 0) or (isinstance(leaf, Int) and leaf.p == ZERO)


_ORDINARY = frozenset({"add", "sub", "mul", "neg", "abs", "minimum", "maximum", "rsub", "to"})


def ordinary(tree: Tree, tame: Callable[[Load], bool]) -> bool:
    """Proved to hold no infinity, no NaN, and nothing so low that a row of it would swallow its scores.

    Integers are far from that, and so is what a few products and sums make of them and of small numbers; but not in
    float16, which ends at 65504, and not what a quotient or a logarithm may be. Of floats that are read `tame` says
    whether they are all below TAME.
    """
    if isinstance(tree, If):
        return ordinary(tree.a, tame) and ordinary(tree.b, tame)
    if isinstance(tree, Int | Poly):
        return True
    if isinstance(tree, Load):
        return tree.kind != "real" or tame(tree)
    if isinstance(tree, Const):
        return abs(tree.value) < -ASSUMED
    if not isinstance(tree, Fn) or tree.dtype == "float16":
        return False
    if tree.name == "div":
        number = tree.args[1]
        return ordinary(tree.args[0], tame) and isinstance(number, Const) and abs(number.value) >= 1
    return tree.name in _ORDINARY and all(ordinary(arg, tame) for arg in tree.args)


# --- structure ---------------------------------------------------------------------------------------------------


def describe(tree: Tree, frame: Frame) -> Bias:
    """What a bias depends on."""
    if not isinstance(tree, If) and _is_zero(tree):
        return Bias(value=tree, kind="none")
    names = variables(tree)
    if "j" not in names:
        return Bias(value=tree, kind="row")
    alibi = _alibi(tree, frame)
    if alibi is not None:
        return Bias(value=tree, kind="alibi", alibi=alibi)
    if _relative(tree, frame):
        return Bias(value=tree, kind="relative")
    return Bias(value=tree, kind="key" if names <= {"b", "h", "j"} else "dense")


def _alibi(tree: Tree, frame: Frame) -> Alibi | None:
    if isinstance(tree, If) and variables(tree.cond) <= {"h"}:
        # slopes that are numbers of the code come as one decision after the other, by the head
        a, b = _alibi(tree.a, frame), _alibi(tree.b, frame)
        if a is None or b is None or a.distance != b.distance:
            return None
        slope = ite(tree.cond, a.slope, b.slope)
        assert not is_bool(slope)
        return Alibi(slope=slope, distance=a.distance, dtype=_shorter(a.dtype, b.dtype))  # type: ignore[arg-type]
    slopes: set[Leaf] = set()
    dtypes: set[str] = set()

    def distance(t: Tree) -> Tree | None:
        if isinstance(t, If):
            a, b = distance(t.a), distance(t.b)
            if a is None or b is None or not variables(t.cond) <= {"i", "j"}:
                return None
            return ite(t.cond, a, b)  # type: ignore[return-value]
        found = _product(t, frame)
        if found is None:
            return None
        slope, p, dtype = found
        if slope is not None:
            slopes.add(slope)
            dtypes.add(dtype)
        return p

    whole = distance(tree)
    if whole is None or len(slopes) != 1 or len(dtypes) != 1:
        return None
    parts = [leaf for _, leaf in leaves(whole)]
    if len(parts) == 1 and isinstance(parts[0], Poly) and frame.var("j") is not None:
        # modulo what is the same for a whole row
        linear = parts[0].split(frame.var("j"))  # type: ignore[arg-type]
        if linear is None or linear[0].value is None:
            return None
    elif len(parts) != 2 or not _relative(whole, frame):
        return None
    return Alibi(slope=slopes.pop(), distance=whole, dtype=dtypes.pop())


def _product(leaf: Leaf, frame: Frame) -> tuple[Leaf | None, Poly, str] | None:
    """(slope, p, dtype) of slope * p; without a slope where the product is zero."""
    if _is_zero(leaf):
        return None, ZERO, ""
    if not isinstance(leaf, Fn):
        return None
    if leaf.name == "neg":
        inner = _product(leaf.args[0], frame)
        return None if inner is None else (inner[0], -inner[1], inner[2])
    if leaf.name == "div" and isinstance(leaf.args[1], Const):
        inner = _product(leaf.args[0], frame)
        if inner is None or inner[0] is None:
            return None
        return Fn("div", (inner[0], leaf.args[1]), "real", leaf.dtype), inner[1], _shorter(inner[2], leaf.dtype)
    if leaf.name != "mul":
        return None
    for slope, p in (leaf.args, leaf.args[::-1]):
        if variables(slope) <= {"h"}:
            if isinstance(p, Const) and p.value == 0:
                return None, ZERO, ""
            if isinstance(p, Int) and "j" in variables(p) and variables(p) <= {"i", "j"}:
                if isinstance(slope, Fn) and slope.name == "neg":
                    return slope.args[0], -p.p, leaf.dtype
                return slope, p.p, leaf.dtype
    return None


def _shorter(a: str, b: str) -> str:
    """The less precise of two float dtypes."""
    return min(a, b, key=lambda name: torch.finfo(getattr(torch, name)).bits)


def _moved(frame: Frame) -> dict[Atom, Poly] | None:
    i, j = frame.var("i"), frame.var("j")
    if i is None or j is None:
        return None
    step = of(Sym("shift", None, None))
    return {i: of(i) + step, j: of(j) + step}


def _relative(tree: Tree, frame: Frame) -> bool:
    """The same expression when query and key move together; sizes and data stay where they are."""
    by = _moved(frame)
    return by is not None and substitute(tree, by) == tree
