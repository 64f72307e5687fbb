"""The torch.compile front.

    torch.compile(model, backend="attnpass")                                      then inductor
    torch.compile(model, backend="attnpass", mode="max-autotune")                 inductor, with that mode
    torch.compile(model, backend="attnpass", options={"inner": "aot_eager"})      another backend behind the pass
    torch.compile(model, backend="attnpass", options={"inductor": {"max_autotune": True}, "strict": True})
    torch.compile(model, backend="attnpass", options={"kernel": ["flash_3", "flash"]})

The pass works on the graph that Dynamo hands over and then calls the inner backend with it, changed or not: nothing
that goes wrong in the pass stops a compilation (it is in the report), and whatever the inner backend raises is raised.
Where a proof relies on what a buffer holds, two graphs stand behind one check (:mod:`attnpass.capture.held`).
Two things only are errors of ours, because they are the user's to mend: wrong options, and a site that cannot have the
kernel which `strict_kernel` demands.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from attnpass.ambient import resolved
from attnpass.capture import fence, frames
from attnpass.capture.held import ready
from attnpass.capture.observe import audit_callable, verify_callable
from attnpass.demands import insist
from attnpass.errors import AttnpassError, first_line
from attnpass.ledger import Failure, Report
from attnpass.policy import Policy
from attnpass.warn import of_failures, once

__all__ = ["audit_callable", "backend", "verify_callable"]

Inner = Callable[[GraphModule, Any], Any]


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A backend of torch.compile: replaces attention, then compiles with the inner backend."""
    from attnpass import session
    from attnpass.report.trace import trace

    setup = Setup.of(mode, options)
    number = _attempted(session.reserve)
    name = "graph" if number is None else f"graph{number}"
    done = frames.process(gm, example_inputs, name=name, policy=setup.policy, rewrite=True, compiled=setup.compiled)
    report, compiled = ready(gm, done.report, done.other, example_inputs, setup.inner)
    if setup.compiled:
        report = fence.told(report)
    if setup.unfenced is not None:
        report = _also(report, Failure.of(name, "fence", setup.unfenced, "all patterns of inductor"))
    try:
        trace(report)
    except Exception as error:
        report = _also(report, Failure.of(name, "trace", error, "trace"))
    _attempted(of_failures, report)
    if number is not None:
        _attempted(session.record, number, report)
    insist(setup.policy, report)
    return compiled()


def _also(report: Report, failure: Failure) -> Report:
    return dataclasses.replace(report, failures=(*report.failures, failure))


def _attempted(tell: Callable[..., Any], *args: Any) -> Any:
    """That nothing can be told of a compilation is no reason not to compile."""
    try:
        return tell(*args)
    except Exception as error:
        once(f"the report is not complete: {first_line(error)}. The model runs as it should")
        return None


def _reset() -> None:
    """torch._dynamo.reset() asks backends to let go of what they hold: here, inductor's recorded CUDA graphs."""
    import sys

    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


backend.reset = _reset  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Setup:
    """What `mode` and `options` ask for."""

    policy: Policy
    inner: Inner
    compiled: bool  # the inner backend is inductor
    unfenced: Exception | None = None  # why there is no fence, so that inductor looks for no pattern at all

    @classmethod
    def of(cls, mode: str | None, options: Mapping[str, Any] | None) -> Setup:
        given = dict(options or {})
        known = {"inner", "inductor", *(f.name for f in dataclasses.fields(Policy))}
        for name in given:
            if name not in known:
                raise AttnpassError(f"unknown option {name!r}{_hint(str(name), known)}")
        inner, patches = given.pop("inner", "inductor"), given.pop("inductor", None)
        policy = resolved(given)
        if inner == "inductor":
            inductor = _inductor(patches, mode)
            inductor.config, unfenced = fence.fenced(inductor.config)
            return cls(policy, inductor, True, unfenced)
        behind = _other(inner, patches, mode)
        settings, unfenced = fence.fenced()
        return cls(policy, fence.within(behind, settings), False, unfenced)


def _other(inner: Any, patches: Any, mode: str | None) -> Inner:
    if patches is not None:
        raise AttnpassError(f"option 'inductor' has settings for inductor, but 'inner' is {inner!r}")
    if mode is not None:
        raise AttnpassError(f"mode={mode!r} is a mode of inductor, but option 'inner' is {inner!r}")
    if callable(inner):
        if inner is backend:
            raise AttnpassError("option 'inner' is the backend behind attnpass, not attnpass itself")
        return inner  # type: ignore[no-any-return]
    if not isinstance(inner, str):
        raise AttnpassError(f"option 'inner' is the name of a backend or a callable, not {inner!r}")
    if inner == "attnpass":
        raise AttnpassError("option 'inner' is the backend behind attnpass, not attnpass itself")
    from torch._dynamo.backends.registry import list_backends, lookup_backend

    known = list_backends(exclude_tags=())
    if inner not in known:
        raise AttnpassError(f"option 'inner': there is no backend {inner!r}{_hint(inner, known)}")
    return lookup_backend(inner)


def _inductor(patches: Any, mode: str | None) -> Any:
    """Inductor as torch.compile would call it, its own checks of modes and settings included."""
    if patches is not None and not isinstance(patches, Mapping):
        raise AttnpassError(f"option 'inductor' is a dictionary of inductor's settings, not {patches!r}")
    try:
        inductor = torch._TorchCompileInductorWrapper(mode, dict(patches or {}), None)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        from torch._inductor import config, list_mode_options

        if mode is not None and mode != "default" and mode not in list_mode_options():
            raise AttnpassError(f"there is no mode {mode!r}{_hint(mode, list_mode_options())}") from error
        settings = config.get_config_copy()
        for name in patches or ():
            if str(name).replace("-", "_") not in settings:
                raise AttnpassError(f"inductor has no setting {name!r}{_hint(str(name), settings)}") from error
        raise AttnpassError(f"option 'inductor': {error}") from error
    return inductor


def _hint(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, [str(k) for k in known], n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(sorted(known))}" if len(known) <= 20 else ""
