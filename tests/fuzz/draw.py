"""Hypothesis draws programs: every spelling is combined with every other that can stand beside it.

`whole` programs are attention, spelled at random; `damaged` ones have one of :mod:`tests.fuzz.damages` besides. What
cannot stand together (a shape that another choice needs, a number that float16 does not hold) is settled here, so that
each draw is a program that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st

from tests.fuzz import masks
from tests.fuzz.damages import DAMAGES, Damage
from tests.fuzz.programs import Bias, Cap, Floor, Mask, Number, Program, Scale, Shape, Step, ToFloat
from tests.fuzz.spelled import (
    CALLS,
    DROPOUT,
    IN_PLACE,
    LAYOUTS,
    PRODUCTS,
    RESULTS,
    SCALES,
    SINKS,
    SOFTMAX,
    VALUES,
)

Draw = Callable[[Any], Any]

# Fronts with weights: a graph is traced in a quarter of the time that torch.compile takes.
FRONTS = ["graph"] * 14 + ["export"] + ["compile"] * 2
INNER = ["eager"] * 12 + ["aot_eager"] * 3
REPEATED = ("repeat_kv", "repeat_interleave", "expand and flatten", "stack", "repeat")
ORDERS = ("bhqk", "bhqk", "bhqk", "hbqk", "bqhk", "bhkq", "qkbh")
EXTRAS = ("clones", "dead average", "type_as", "scores are measured", "operands written afterwards")
KERNELS = ("fuzz_tensor", "fuzz_forms", "fuzz_functions", "native_math")
PLAIN_PRODUCTS = ("matmul", "@", "permuted", "mul and sum", "bmm, viewed")  # that a damage can be put behind


def _sometimes(draw: Draw, times: int) -> bool:
    """Once in so many draws."""
    return bool(draw(st.integers(1, times)) == times)


def _one(draw: Draw, *values: Any) -> Any:
    return draw(st.sampled_from(values))


@st.composite
def whole(draw: Draw) -> Program:
    """A program that is attention."""
    layout = _one(draw, *LAYOUTS)
    shape = _shape(draw, layout)
    if layout == "bshd, as it is" and shape.groups > 1:
        layout = "bshd"
    heads, product, order = _product(draw, layout, shape)
    extras = tuple(extra for extra in EXTRAS if _sometimes(draw, 8))
    if "operands written afterwards" in extras and "clones" not in extras:
        extras = (*extras, "clones")
    dtype = _one(draw, *["float32"] * 5, "bfloat16", "bfloat16", "float16")
    autocast = dtype == "float32" and _sometimes(draw, 16)
    grad = draw(st.booleans()) and "operands written afterwards" not in extras
    program = Program(
        shape=shape,
        dtype=dtype,
        grad=grad,
        literal=draw(st.booleans()),
        layout=layout,
        heads=heads,
        product=product,
        product_scale=_one(draw, 1.0, 0.3, 0.125),
        order=order,
        letters="".join(draw(st.permutations("abcdefhijklmnopqrstuvwx"))[:6]),
        q_scale=_scale(draw, places=3, in_place="clones" in extras),
        k_scale=_scale(draw, places=6, in_place="clones" in extras),
        upcast=_sometimes(draw, 10),
        steps=_steps(draw, shape, dtype, autocast),
        sink=_one(draw, *SINKS) if order == "bhqk" and _sometimes(draw, 14) else None,
        softmax=_one(draw, *["F.softmax"] * 4, *SOFTMAX),
        dropout=_one(draw, *DROPOUT) if _sometimes(draw, 5) else None,
        pv=_one(draw, *VALUES, "einsum"),
        out=_one(draw, *RESULTS),
        extras=extras,
        autocast=autocast,
        empty=_sometimes(draw, 6),
        called=_one(draw, *CALLS) if _sometimes(draw, 8) else None,
        seed=draw(st.integers(0, 99)),
    )
    return _front(draw, settled(program))


@st.composite
def damaged(draw: Draw) -> Program:
    """A program that was attention."""
    name = _one(draw, *DAMAGES)
    damage = DAMAGES[name]
    program = draw(whole())
    layout = program.layout
    if layout in ("merged", "bshd, as it is") or ("G" in "".join(damage.equal) and layout.startswith("packed")):
        layout = "bhsd"
    shape = _equal(replace(program.shape), damage, layout)
    heads = program.heads if program.heads in REPEATED else "repeat_kv"
    if damage.equal and "GH" in damage.equal:
        heads = "none"
    program = replace(
        program,
        layout=layout,
        shape=shape,
        heads="none" if shape.groups == 1 else heads,
        product=program.product if program.product in PLAIN_PRODUCTS else "matmul",
        order="bhqk",
        sink=None if damage.at in ("softmax", "probabilities", "before softmax") else program.sink,
        damage=name,
        called=None,
        grad=program.grad and not damage.no_grad,
        front=program.front,
        upcast=program.upcast and not damage.clones,
    )
    if damage.at == "mask" and not program.masks:
        program = replace(program, steps=(*program.steps, _mask(draw, shape, program.dtype)))
    if name == "mask inside a cap" and not program.masks:
        program = replace(program, steps=(*program.steps, _mask(draw, shape, program.dtype)))
    return settled(program)


PROGRAMS = st.one_of(whole(), whole(), damaged())


# -- parts ------------------------------------------------------------------------------------------------------------


def _shape(draw: Draw, layout: str) -> Shape:
    """Small sizes, sometimes many of them equal, so that an axis taken for another still fits."""
    groups = 1 if layout.startswith("packed") or layout == "merged" else _one(draw, 1, 1, 2, 3)
    if _sometimes(draw, 6):
        side = _one(draw, 2, 4)
        return Shape(side, side if groups == 1 else 2, groups, side, side, max(side, 4), max(side, 4))
    keys = draw(st.integers(3, 9))
    queries = keys if layout.startswith("packed") or draw(st.booleans()) else draw(st.integers(1, keys))
    width = _one(draw, 4, 8, 8, 16)
    v_width = _one(draw, width, width, max(4, width // 2), width + 4) if not layout.startswith("packed") else width
    return Shape(
        draw(st.integers(1, 3)), draw(st.integers(1, 4)), groups, queries, keys, width, min(v_width, 2 * width)
    )


def _product(draw: Draw, layout: str, shape: Shape) -> tuple[str, str, str]:
    """How heads are shared, how the scores are made, and the order of their dimensions."""
    if layout == "merged":
        return "none", _one(draw, "bmm", "baddbmm"), "bhqk"
    if shape.groups > 1:
        heads = _one(
            draw, *REPEATED, *["groups", "groups, einsum", "folded"], *(["broadcast"] if shape.kv_heads == 1 else [])
        )
        if heads in ("groups", "groups, einsum", "folded"):
            return heads, "matmul", "bhqk"
        if heads == "broadcast":
            return heads, _one(draw, "matmul", "@", "permuted", "transposed"), "bhqk"
    else:
        heads = "none"
    if layout == "bshd, as it is":
        return heads, "einsum", _one(draw, *ORDERS)
    product = _one(draw, *PRODUCTS, "einsum")
    return heads, product, _one(draw, *ORDERS) if product == "einsum" else "bhqk"


def _scale(draw: Draw, *, places: int, in_place: bool) -> Scale | None:
    if not _sometimes(draw, places):
        return None
    form = _one(draw, *(form for form in SCALES if in_place or form not in IN_PLACE))
    return Scale(form, _one(draw, 0.3, 0.5, 0.125, 1.0))


def _steps(draw: Draw, shape: Shape, dtype: str, autocast: bool) -> tuple[Step, ...]:
    """What happens to the scores: a scale and a cast anywhere, a cap before all masks and biases."""
    added: list[Step] = []
    for _ in range(_one(draw, 0, 1, 1, 1, 2, 3)):
        added.append(_mask(draw, shape, dtype) if draw(st.integers(0, 3)) else _bias(draw))
    before: list[Step] = []
    if _sometimes(draw, 10):
        before.append(Cap(_one(draw, 3.0, 20.0)))
    steps = [*before, *added]
    scale = _scale(draw, places=1, in_place=True)
    if scale is not None and draw(st.integers(0, 3)):
        # mostly first of all, and sometimes in between or last
        steps.insert(0 if draw(st.integers(0, 3)) else draw(st.integers(0, len(steps))), scale)
    if _sometimes(draw, 5):
        steps.insert(draw(st.integers(0, len(steps))), ToFloat())
    if _sometimes(draw, 12):
        steps.insert(draw(st.integers(len(before), len(steps))), Number(_one(draw, 0.5, 100.0, -3e4, 7e4, -1e9, 1e30)))
    if _sometimes(draw, 10):
        # where it belongs, and anywhere
        at = len(steps) if draw(st.booleans()) else draw(st.integers(len(before), len(steps)))
        steps.insert(at, Floor(_one(draw, *masks.FLOORS)))
    return tuple(steps)


def _mask(draw: Draw, shape: Shape, dtype: str) -> Mask:
    kind = _one(draw, *["causal"] * 4, *masks.KEEP)
    fills = [fill for fill in masks.FILLS if not (dtype == "float16" and fill.startswith("-1"))]
    apply = _one(draw, *masks.APPLY)
    fill = _one(draw, "-inf", "min", *fills)
    if apply in masks.TIMES_FILL and fill == "-inf":
        fill = "min"
    return Mask(kind, draw(st.integers(0, 11)), apply, fill)


def _bias(draw: Draw) -> Bias:
    return Bias(_one(draw, *masks.BIASES), _one(draw, *masks.ADD))


def _front(draw: Draw, program: Program) -> Program:
    front = _one(draw, *FRONTS)
    inner = _one(draw, *INNER) if front == "compile" else "eager"
    dynamic = None
    if front != "graph" and not program.literal and program.layout != "merged" and _sometimes(draw, 3):
        dynamic = _one(draw, "QK", "B", "BQK")
    kernel = _one(draw, *KERNELS) if _sometimes(draw, 6) else None
    if program.cap or program.sink:
        kernel = _one(draw, "fuzz_forms", "fuzz_functions") if program.sink else _one(draw, *KERNELS[:3])
    if kernel == "fuzz_functions":
        front, dynamic = "compile", None
        program = replace(program, grad=False)
    return settled(replace(program, front=front, inner=inner, dynamic=dynamic, kernel=kernel))


def _equal(shape: Shape, damage: Damage, layout: str) -> Shape:
    """The shape with the sizes made equal that a damage exchanges."""
    for pair in damage.equal:
        if pair in ("BH", "HQ", "GK", "GH"):
            shape = replace(shape, kv_heads=max(2, shape.kv_heads), groups=1)
        shape = {
            "QK": lambda s: replace(s, queries=s.keys),
            "BH": lambda s: replace(s, batch=s.kv_heads),
            "HQ": lambda s: replace(s, queries=s.kv_heads, keys=s.kv_heads if layout.startswith("packed") else s.keys),
            "DK": lambda s: replace(s, keys=s.width, queries=s.width if layout.startswith("packed") else s.queries),
            "GK": lambda s: replace(s, keys=max(3, s.kv_heads), kv_heads=max(3, s.kv_heads)),
            "GH": lambda s: s,
            "DE": lambda s: replace(s, v_width=s.width),
        }[pair](shape)
    return replace(shape, queries=min(shape.queries, shape.keys))


def _called(p: Program) -> Program:
    """Of a call there is no product and no softmax, and it takes what it is told in one argument."""
    kinds: tuple[type, ...] = (Mask,) if str(p.called).startswith("boolean") else (Mask, Bias)
    heads = p.heads if p.heads in REPEATED else "gqa"
    return replace(
        p,
        layout="bhsd" if LAYOUTS[p.layout].qkv != ("bhqd", "bhkd", "bhke") else p.layout,
        heads="none" if p.shape.groups == 1 else heads,
        product="matmul",
        order="bhqk",
        upcast=False,
        steps=tuple(step for step in p.steps if isinstance(step, kinds)),
        sink=None,
        softmax="F.softmax",
        dropout=None,
        pv="matmul",
        extras=tuple(extra for extra in p.extras if extra in ("clones", "operands written afterwards")),
        autocast=False,
    )


def settled(program: Program) -> Program:
    """What cannot stand together is taken apart."""
    p = _called(program) if program.called else program
    written = any(isinstance(step, Mask) and ("in place" in step.apply or "index" in step.apply) for step in p.steps)
    # make_fx makes constants of tensors written in the code, which cannot be told from what a module holds
    literal = p.softmax == "clamped" or any(mask.apply == "boolean index" for mask in p.masks)
    if p.front == "graph" and (literal or p.dynamic):
        p = replace(p, front="export")
    if p.autocast and (written or p.out == "linear"):
        p = replace(p, autocast=False)  # a narrower product is written with numbers of the wider type
    if p.sink is not None and p.order != "bhqk":
        p = replace(p, sink=None)
    if p.product in ("bmm", "baddbmm", "transposed") or p.heads in ("groups", "groups, einsum"):
        p = replace(p, sink=None)
    if p.dropout == "live" and (p.grad or p.front != "compile" or p.inner != "eager"):
        p = replace(p, dropout="evaluation")  # other compilers draw other random numbers
    return p
