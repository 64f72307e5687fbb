"""What a case of the zoo is, and the two decorators that put one on the table.

    @plain("mul-softmax", Site(scale=0.3))
    def scores_times_a_number(q, k, v):            # the function's name is the case's name
        return (q @ k.mT * 0.3).softmax(-1) @ v

    @case("scaled-query", Site(scale=0.35))
    def a_module_with_weights():                   # builds the module and its example inputs
        return Module(), (torch.randn(2, 5, 24),)

`plain` is for attention written as a function of tensors, `case` for everything that needs a module. An expectation is
complete: whatever a :class:`Site` does not say has the value that the dataclass gives it, and nothing else is accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

T = torch.Tensor
Shape = tuple[Any, ...]
Built = tuple[nn.Module, tuple[Any, ...]] | tuple[nn.Module, tuple[Any, ...], Any]

TEXT = "<some text>"
"""Stands for any text: the name of a symbolic size, or the words for a scale that is no number."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One attention that must be found, with exactly this spec, and what must become of it."""

    scale: float | str
    q: Shape = (2, 3, 5, 8)
    k: Shape = (2, 3, 7, 8)
    v: Shape = (2, 3, 7, 8)
    dtype: str = "float32"
    softmax_dtype: str = "float32"
    groups: int = 1
    dropout: float | str = 0.0
    softcap: float | None = None
    sink: bool = False
    causal: int | str | None = None
    window: tuple[Any, Any] | None = None
    prefix: int | str | None = None
    chunk: int | str | None = None
    document: bool = False
    limited: bool = False
    key_padding: bool = False
    dense: bool = False  # a keep-mask that is not proved to be any of these
    bias: tuple[Shape, ...] = ()  # shapes of the tensors that are added, against (batch, heads, queries, keys)
    empty_rows: str = "impossible"
    replaced: bool = True
    reason: str | None = None  # the code, where it is not replaced
    assumed: bool = False  # the replacement rests on a declared assumption
    ungraded: bool = False  # ... one of which is that rows without a key get no gradient, though no bias is left

    def __post_init__(self) -> None:
        assert self.replaced == (self.reason is None), "a site that is left alone says why"


@dataclass(frozen=True)
class Miss:
    """One softmax that must be no site, for exactly this reason."""

    reason: str


Expect = tuple[Site | Miss, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    theme: str  # the file it stands in
    idiom: str  # a key of tests.zoo.idioms
    build: Callable[[], Built]
    expect: Expect
    spelled: int = 0  # softmaxes written by hand (exp and sum), which no operator's name shows
    train: bool = False
    grad: bool = True  # compare gradients
    reference: str = "float64"  # or "eager", where float64 computes another function (live dropout, overflow in bf16)
    alike: str = ""  # why the torch.compile front sees something else than the export front
    held: bool = False  # a buffer holds a causal mask: torch.compile proves it, and checks the buffer at every call
    export: bool = True  # False where torch.export cannot read the model at all
    other_sizes: Callable[[], tuple[Any, ...]] | None = None  # for dynamic shapes: further inputs

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(e for e in self.expect if isinstance(e, Site))

    @property
    def compiled(self) -> Case:
        """What the torch.compile front makes of it."""
        if not self.held:
            return self
        seen = (
            replace(e, causal=0, dense=False, empty_rows="impossible") if isinstance(e, Site) else e
            for e in self.expect
        )
        return replace(self, expect=tuple(seen))

    @property
    def misses(self) -> tuple[Miss, ...]:
        return tuple(e for e in self.expect if isinstance(e, Miss))

    @property
    def trap(self) -> bool:
        """A look-alike or a trap: something here must not be replaced, or it is there because others got it wrong."""
        return (
            not all(site.replaced for site in self.sites) or not self.sites or "#" in self.idiom or "trap" in self.idiom
        )


TABLE: list[Case] = []


class Plain(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def case(idiom: str, *expect: Site | Miss, **options: Any) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Put a build function on the table."""

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        name = build.__name__.replace("_", "-")
        theme = build.__module__.rsplit(".", 1)[-1]
        TABLE.append(Case(name=name, theme=theme, idiom=idiom, build=build, expect=expect, **options))
        return build

    return register


def plain(
    idiom: str,
    *expect: Site | Miss,
    inputs: Callable[[], tuple[Any, ...]] | None = None,
    dynamic: Any = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put a function of tensors on the table; `dynamic` are torch.export's dynamic shapes of its arguments."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def build() -> Built:
            given = (inputs or qkv)()
            return (Plain(function), given) if dynamic is None else (Plain(function), given, {"args": tuple(dynamic)})

        build.__name__, build.__module__ = function.__name__, function.__module__
        case(idiom, *expect, **options)(build)
        return function

    return register


# -- inputs: deterministic, of unlike sizes, so that no two axes can be mistaken for each other ----------------------


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = True) -> T:
    """Normal noise that depends on nothing but its seed and shape."""
    out = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return out.requires_grad_(grad)


def qkv(
    batch: int = 2,
    heads: int = 3,
    queries: int = 5,
    keys: int = 7,
    width: int = 8,
    *,
    kv_heads: int | None = None,
    v_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    grad: bool = True,
) -> tuple[T, T, T]:
    """q, k, v as (batch, heads, length, width)."""
    kv_heads = heads if kv_heads is None else kv_heads
    return (
        noise(batch, heads, queries, width, seed=1, dtype=dtype, grad=grad),
        noise(batch, kv_heads, keys, width, seed=2, dtype=dtype, grad=grad),
        noise(batch, kv_heads, keys, v_width or width, seed=3, dtype=dtype, grad=grad),
    )


def half() -> tuple[T, T, T]:
    """The same in bfloat16."""
    return qkv(dtype=torch.bfloat16)


def packed(batch: int = 2, length: int = 5, heads: int = 3, width: int = 8) -> tuple[T, T, T]:
    """q, k, v as (batch, length, heads, width), as projections leave them; seven keys."""
    return (
        noise(batch, length, heads, width, seed=1),
        noise(batch, length + 2, heads, width, seed=2),
        noise(batch, length + 2, heads, width, seed=3),
    )


def keep(*shape: int, empty: bool = False, seed: int = 4) -> T:
    """A random keep-mask; every row keeps a key, or with `empty` the first row of the first batch keeps none."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    if shape[-1] > 1:
        mask[..., 1] = True
    if empty:
        mask[0, ..., 0, :] = False
    return mask


def with_keep(*shape: int, empty: bool = False) -> Callable[[], tuple[T, T, T, T]]:
    """q, k, v and a keep-mask."""
    return lambda: (*qkv(), keep(*shape, empty=empty))


def with_bias(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Callable[[], tuple[T, T, T, T]]:
    """q, k, v and a float bias."""
    return lambda: (*qkv(), noise(*shape, seed=5, grad=grad, dtype=dtype))
