"""Products of two tensors that contract one axis, in every spelling: matmul, bmm, baddbmm, einsum, mul + sum.

A :class:`Product` says what each dimension of both operands is, in the atoms of the result; the contracted axis is a
new atom. Which operand is which (queries or keys, probabilities or values) is decided by atoms, by the caller: the
operands may come either way round and either transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from attnpass.errors import Refuse
from attnpass.graph import is_one, same, tensor
from attnpass.recognize.axes import Axes
from attnpass.recognize.ops import bound, op_name
from attnpass.recognize.views import shape_of
from attnpass.site import Dim, Layout


@dataclass(frozen=True)
class Product:
    """``result[layout] = alpha * sum over contracted of a[a_layout] * b[b_layout]  (+ beta * extra)``."""

    node: Node
    a: Node
    b: Node
    a_layout: Layout
    b_layout: Layout
    contracted: Dim
    alpha: Any = 1
    beta: Any = 0
    extra: Node | None = None
    inner: Node = field(default=None)  # type: ignore[assignment]  # the node that reads a and b (the mul of mul + sum)

    def __post_init__(self) -> None:
        if self.inner is None:
            object.__setattr__(self, "inner", self.node)


def _contracted(axes: Axes, left: Any, right: Any, node: Node) -> Dim:
    if not same(left, right):
        raise Refuse("axes_mixed", node, op=op_name(node), detail=f"{left} against {right}")
    return axes.new(left)


def _matmul(node: Node, layout: Layout, axes: Axes) -> Product:
    args = bound(node)
    names = list(args)
    a, b = args[names[0]], args[names[1]]
    sa, sb = shape_of(a), shape_of(b)
    if len(sa) < 2 or len(sb) < 2:
        raise Refuse("unknown_arguments", node, op=op_name(node), detail="a vector operand")
    out = shape_of(node)
    width = _contracted(axes, sa[-1], sb[-2], node)
    batch, rows, cols = layout[:-2], layout[-2], layout[-1]
    left = axes.align(batch, sa[:-2], out[:-2])
    right = axes.align(batch, sb[:-2], out[:-2])
    return Product(node, a, b, (*left, rows, width), (*right, width, cols), width)


def _baddbmm(node: Node, layout: Layout, axes: Axes) -> Product:
    args = bound(node)
    a, b, extra = args["batch1"], args["batch2"], args["self"]
    width = _contracted(axes, shape_of(a)[-1], shape_of(b)[-2], node)
    batch, rows, cols = layout
    beta = args["beta"]
    ignored = isinstance(beta, int | float) and beta == 0  # documented: with beta 0 the input is not even read
    return Product(
        node,
        a,
        b,
        (batch, rows, width),
        (batch, width, cols),
        width,
        alpha=args["alpha"],
        beta=beta,
        extra=None if ignored else extra,
    )


def _einsum(node: Node, layout: Layout, axes: Axes) -> Product:
    args = bound(node)
    equation, operands = args["equation"], args["tensors"]
    if args.get("path") is not None or len(operands) != 2:
        raise Refuse("unknown_arguments", node, op="einsum", detail=f"{len(operands)} operands")
    terms, out = einsum_letters(equation, [len(shape_of(x)) for x in operands], node)
    result = dict(zip(out, layout, strict=True))
    dims: dict[str, Dim] = {}
    sizes: dict[str, Any] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, size in zip(term, shape_of(operand), strict=True):
            if letter in sizes and not same(sizes[letter], size) and not (is_one(size) or is_one(sizes[letter])):
                raise Refuse("axes_mixed", node, op="einsum", detail=f"{letter} is {sizes[letter]} and {size}")
            if letter not in sizes or is_one(sizes[letter]):
                sizes[letter] = size
    summed = [letter for letter in sizes if letter not in result]
    for letter, size in sizes.items():
        dims[letter] = result[letter] if letter in result else axes.new(size)
    if any(letter not in terms[0] or letter not in terms[1] for letter in summed):
        raise Refuse("unknown_arguments", node, op="einsum", detail="an index of one operand only is summed")
    layouts = [
        tuple(() if is_one(size) else dims[letter] for letter, size in zip(term, shape_of(operand), strict=True))
        for term, operand in zip(terms, operands, strict=True)
    ]
    for letter in summed:
        if any(
            not same(shape_of(operand)[term.index(letter)], sizes[letter])
            for term, operand in zip(terms, operands, strict=True)
        ):
            raise Refuse("unknown_arguments", node, op="einsum", detail="a summed index is broadcast")
    width: Dim = tuple(atom for letter in summed for atom in dims[letter])
    return Product(node, operands[0], operands[1], layouts[0], layouts[1], width)


def einsum_letters(equation: str, ranks: list[int], node: Node) -> tuple[list[list[str]], list[str]]:
    """The letters of each operand and of the result; an ellipsis becomes numbered letters, aligned at the right."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    inputs = left.split(",")
    if len(inputs) != len(ranks):
        raise Refuse("unknown_arguments", node, op="einsum", detail=equation)
    terms: list[list[str]] = []
    widest = 0
    for term, rank in zip(inputs, ranks, strict=True):
        extra = rank - len(term.replace("...", ""))
        if "..." in term:
            widest = max(widest, extra)
        letters = _spread(term, extra if "..." in term else 0, extra if "..." in term else 0)
        if len(letters) != rank or len(set(letters)) != rank:  # a repeated letter takes a diagonal
            raise Refuse("unknown_arguments", node, op="einsum", detail=equation)
        terms.append(letters)
    if arrow:
        out = _spread(right, widest, widest)
    else:  # implicit form: ellipsis first, then the letters that occur once, in alphabetical order
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        out = [f"#{i}" for i in range(widest, 0, -1)] + once
    if len(set(out)) != len(out) or any(all(letter not in term for term in terms) for letter in out):
        raise Refuse("unknown_arguments", node, op="einsum", detail=equation)
    return terms, out


def _spread(term: str, count: int, first: int) -> list[str]:
    before, dots, after = term.partition("...")
    middle = [f"#{first - i}" for i in range(count)] if dots else []
    return [*before, *middle, *after]


def _mul_sum(node: Node, layout: Layout, axes: Axes) -> Product:
    args = bound(node)
    mul = args["self"]
    if not isinstance(mul, Node) or op_name(mul) != "mul" or args.get("dtype") is not None:
        raise Refuse("no_product_before", node, op=op_name(node))
    a, b = mul.args[0], mul.args[1]
    if not (isinstance(a, Node) and isinstance(b, Node)) or tensor(a) is None or tensor(b) is None:
        raise Refuse("no_product_before", node, op=op_name(node))
    shape = shape_of(mul)
    dims = args.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    if len(dims) != 1:
        raise Refuse("no_product_before", node, op=op_name(node))
    at = dims[0] % len(shape)
    width = axes.new(shape[at])
    keep = bool(args.get("keepdim"))
    full = (*layout[:at], width, *(layout[at + 1 :] if keep else layout[at:]))
    la, lb = axes.align(full, shape_of(a), shape), axes.align(full, shape_of(b), shape)
    if not width or any(width[0] not in {x for dim in side for x in dim} for side in (la, lb)):
        raise Refuse("no_product_before", node, op=op_name(node))
    return Product(node, a, b, la, lb, width, inner=mul)


_FORMS: dict[str, Callable[[Node, Layout, Axes], Product]] = {
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    "sum": _mul_sum,
}


def is_product(node: Node) -> bool:
    """May be a product of two tensors; reading it may still refuse."""
    name = op_name(node)
    if name == "sum":
        source = node.args[0]
        return (
            isinstance(source, Node)
            and op_name(source) == "mul"
            and all(isinstance(arg, Node) and tensor(arg) is not None for arg in source.args[:2])
            and not any(
                tensor(arg) is not None and tensor(arg).dim() == 0  # type: ignore[union-attr]
                for arg in source.args[:2]
                if isinstance(arg, Node)
            )
        )
    if name == "einsum":
        return len(bound(node)["tensors"]) == 2
    return name in _FORMS


def read(node: Node, layout: Layout, axes: Axes) -> Product:
    """The product that computes `node`, whose dimensions are `layout`."""
    val = tensor(node)
    if val is None or val.dtype is torch.bool or not val.is_floating_point():
        raise Refuse(
            "not_floating", node, dtype=str(val.dtype).removeprefix("torch.") if val is not None else "no tensor"
        )
    return _FORMS[op_name(node)](node, axes.resolve(layout), axes)
