"""Inductor's own attention patterns, kept away from graphs that went through the pass.

    inductor's joint passes:  hide ── ... inductor's patterns ... ── show

After us, inductor looks for attention itself, by patterns that do not look at numbers. On torch 2.13 it takes a softmax
over another dimension than the last for attention (pytorch#196468), a finite fill for minus infinity whatever it is,
a mask that is kept where it is not zero for one that is kept where it is one; results change, and nothing says so.
What we leave, we leave for a reason, so these patterns must not take it; nor what `scaled_dot_product_attention` falls
apart into where no fused kernel serves it.

Inductor has no setting for this: the patterns lie in one list with others that are needed (padding of matrices, casts,
devices of indices). But each of them contains a quotient `exp(...) / ...`, and none of the others does
(tests/test_fence.py looks at all that inductor has). So a pass of ours that runs before them renames the `exp` of such
quotients to an operator of the same meaning, and another one behind them renames it back. Inductor has settings for
both passes, with an identity that goes into the keys of its caches; they are given with each compilation, never set
for the process. Passes that the user has given there run as well, on the graph as it is without us. The identity also
holds what `sdpa_kernel` and its like have set: `scaled_dot_product_attention` becomes a certain kernel while it is
compiled, and torch's keys do not say which were allowed (pytorch#185449).

Only a joint graph (forward and backward together) or one for inference is searched by those patterns, and both come
to be while the backend is called: a backward that is compiled later needs no fence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from attnpass.kernels.identity import identity
from attnpass.ledger import Report

NOTE = (
    "inductor's own attention patterns are kept from what was left here: they also take what only looks like "
    "attention, and results change (pytorch#196468)"
)
UNFENCED = (
    "inductor's own attention patterns may change what was left here (pytorch#196468) when this program is compiled "
    "by AOTInductor; settings that keep them from it: inductor_configs=attnpass.inductor_settings()"
)

_BEFORE = "joint_custom_pre_pass"
_AFTER = "joint_custom_post_pass"

_VERSION = 1  # of what the two passes do; part of the keys of caches
_EXP = torch.ops.aten.exp.default
_HIDDEN = torch.ops.prims.exp.default  # the same, and right as it is should nobody rename it back
_QUOTIENT = torch.ops.aten.div.Tensor

Pass = Callable[[Graph], None]


def hide(graph: Graph) -> None:
    """The numerator of each softmax is called by its other name."""
    for node in graph.find_nodes(op="call_function", target=_EXP, sort=False):
        if any(user.target is _QUOTIENT and user.args[0] is node for user in node.users):
            node.target = _HIDDEN


def show(graph: Graph) -> None:
    """What was hidden has its name again; so has what was called that way before, and inductor has code for it."""
    for node in graph.find_nodes(op="call_function", target=_HIDDEN, sort=False):
        node.target = _EXP


@dataclass(frozen=True)
class _Fence(CustomGraphPass):
    """One side of the fence, with what the user has there."""

    theirs: tuple[Pass, ...]

    def uuid(self) -> Any | None:
        """What caches go by; with what our own operations do, which compiled graphs call by name only."""
        known = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.theirs]
        if not all(known):
            return None  # nothing is cached then, as without us
        try:
            return (type(self).__name__, "attnpass", _VERSION, identity(), _allowed(), *known)
        except Exception:
            return None


def _allowed() -> tuple[str, ...]:
    """Which kernels `scaled_dot_product_attention` may become here and now, and in which order."""
    names = (name for name in sorted(vars(torch._C)) if name.startswith("_get_") and "sdp" in name)
    return tuple(f"{name} {getattr(torch._C, name)()}" for name in names)


class Hide(_Fence):
    """Their passes, then `hide`."""

    def __call__(self, graph: Graph) -> None:
        for one in self.theirs:
            one(graph)
        hide(graph)


class Show(_Fence):
    """`show`, then their passes."""

    def __call__(self, graph: Graph) -> None:
        show(graph)
        for one in self.theirs:
            one(graph)


def inductor_settings(settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings of inductor with the fence among them: for a compilation that attnpass does not start itself.

    ``torch._inductor.aoti_compile_and_package(program, inductor_configs=attnpass.inductor_settings())``
    """
    from torch._inductor import config

    def passes(name: str) -> tuple[Pass, ...]:
        given = (settings or {}).get(name, getattr(config, name))
        if given is None:
            return ()
        # torch 2.11 takes one, 2.13 also several; a fence that is there already is not built again
        found = given if isinstance(given, list | tuple) else (given,)
        return tuple(one for each in found for one in (each.theirs if isinstance(each, _Fence) else (each,)))

    return {**(settings or {}), _BEFORE: Hide(passes(_BEFORE)), _AFTER: Show(passes(_AFTER))}


def fenced(settings: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Exception | None]:
    """The same, and what went wrong if the fence cannot be built: inductor looks for no pattern then, not even for
    those that are needed to be fast.
    """
    try:
        return inductor_settings(settings), None
    except Exception as error:
        return {**(settings or {}), "pattern_matcher": False}, error


def within(inner: Callable[[GraphModule, Any], Any], settings: dict[str, Any]) -> Callable[[GraphModule, Any], Any]:
    """Another backend than inductor behind the fence: it may well end there."""

    def run(gm: GraphModule, example_inputs: Any) -> Any:
        from torch._inductor import config

        with config.patch(settings):
            return inner(gm, example_inputs)

    return run


def told(report: Report, note: str = NOTE) -> Report:
    """The report, with the note where a softmax was left as it is."""
    left = report.misses or any(not site.replaced for site in report.sites)
    return dataclasses.replace(report, notes=(*report.notes, note)) if left else report
