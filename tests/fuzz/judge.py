"""Runs one program three ways: as it is, as the pass makes it, and in float64.

    front "graph"     make_fx, attnpass.rewrite of the GraphModule
    front "export"    torch.export, attnpass.rewrite of the program
    front "compile"   torch.compile with the backend, and another backend behind it

What the pass makes may be no further from float64 than twice what eager code is (tests/zoo/numbers.py). Nothing here
knows how programs are drawn: this file is copied whole into the file of a failing one.
"""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import attnpass
from attnpass.capture import frames
from tests.fuzz.kernels import register
from tests.zoo.numbers import FLOOR, Run, complaints, run, truth


@dataclass(frozen=True, kw_only=True)
class How:
    """How a program is run, and what it is held to."""

    grad: bool
    front: str
    inner: str
    kernel: str | None
    dynamic: str | None
    drops: bool  # live dropout: comparable only where nothing is replaced
    narrow: str  # the narrowest dtype that it computes in
    added: float = 1.0  # the largest number beside which scores still count


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What came of it."""

    wrong: tuple[str, ...] = ()  # results that are further off than they may be, failures of the pass, its own doubts
    replaced: int = 0
    sites: int = 0
    reasons: tuple[str, ...] = ()  # why what was left was left
    kernels: tuple[str, ...] = ()
    ungraded: bool = False  # a declared assumption says that some gradients are not asked for
    ours: bool = True  # without the pass the same compiler gives a right result
    invalid: str | None = None  # the program does not run by itself


# The only fused kernel for float32 on CUDA loses more digits than plain products (tests/test_zoo_gpu.py).
CUDA_FLOORS = {torch.float32: 4096.0}
OTHER = {"B": 1, "Q": 2, "K": 2}  # by how much other sizes are larger


def judge(namespace: dict[str, Any], how: How, device: str = "cpu") -> Judged:
    """Run the program of an executed source."""
    register()
    warnings.simplefilter("ignore")
    module, given = _built(namespace, how, device)
    try:
        eager = _on_cpu(run(copy.deepcopy(module), given, grad=how.grad))
        exact = eager if how.drops else _on_cpu(truth(copy.deepcopy(module), given, grad=how.grad))
    except Exception as error:
        return Judged(invalid=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    attnpass.reset()
    try:
        candidate = _candidate(namespace, module, given, how)
    except _NotTraced as error:
        return Judged(invalid=str(error))
    report = candidate.report
    told = tuple(
        [f"{s.reason.code}: {s.reason.text}" for s in report.sites if s.reason]
        + [f"miss {m.reason.code}: {m.reason.text}" for m in report.misses]
    )
    wrong = [f"failure in {f.stage}: {f.text.strip().splitlines()[-1]}" for f in report.failures]
    wrong += [f"note: {note}" for note in report.notes if "a bug of attnpass" in note]
    replaced = sum(site.replaced for site in report.sites)
    # A declared assumption, which strict=True refuses: rows that a bias masks entirely are asked for no gradient.
    ungraded = any("no gradient" in text for site in report.sites for text in site.assumptions)
    if not (how.drops and replaced):
        wrong += _further(_on_cpu(candidate.found), eager, exact, how, given[0])
        if candidate.elsewhere is not None:
            wrong += [f"at other sizes, {text}" for text in candidate.elsewhere]
    if ungraded:
        wrong = [text for text in wrong if "grad of" not in text]
    ours = not wrong or bool(report.failures) or _is_ours(module, given, how, eager, exact)
    kernels = tuple(site.kernel for site in report.sites if site.kernel is not None)
    return Judged(
        wrong=tuple(wrong),
        replaced=replaced,
        sites=len(report.sites),
        reasons=told,
        kernels=kernels,
        ungraded=ungraded,
        ours=ours,
    )


class _NotTraced(Exception):
    """torch itself cannot make a graph of this."""


@dataclass(frozen=True)
class _Candidate:
    found: Run
    report: Any
    elsewhere: list[str] | None = None  # complaints at other sizes


def _built(namespace: dict[str, Any], how: How, device: str) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    module = namespace["Attention"]().eval().requires_grad_(how.grad).to(device)
    return module, namespace["inputs"](device=device)


def _options(how: How) -> dict[str, Any]:
    """Programs this small are often as fast as they are, which is not what is asked here."""
    return {"kernel": how.kernel, "min_gain": -1e9}


def _candidate(namespace: dict[str, Any], module: nn.Module, given: tuple[Any, ...], how: How) -> _Candidate:
    if how.front == "compile":
        return _compiled(namespace, module, given, how)
    policy = attnpass.Policy(**_options(how))
    if how.front == "graph":
        return _traced(module, given, how, policy)
    shapes = None if how.dynamic is None else [_marked(dims, how.dynamic) for dims in namespace["DIMS"]]
    try:
        before = torch.export.export(
            copy.deepcopy(module), given, dynamic_shapes=None if shapes is None else tuple(shapes)
        )
    except Exception as error:
        raise _NotTraced(f"torch.export: {str(error)[:300]}") from error
    program, report = attnpass.rewrite(before, policy=policy)
    after = program.module()
    found = run(after, given, grad=how.grad)
    elsewhere = None
    if how.dynamic is not None:
        elsewhere = _elsewhere(namespace, module, given, how, after, None, may_refuse=before.module())
    return _Candidate(found, report, elsewhere)


def _traced(module: nn.Module, given: tuple[Any, ...], how: How, policy: attnpass.Policy) -> _Candidate:
    """The module as a graph of its parameters, buffers and inputs, rewritten, and put in place of its code."""
    mine = copy.deepcopy(module)
    names = [name for name, _ in (*mine.named_parameters(), *mine.named_buffers())]

    def function(*args: Any) -> Any:
        return torch.func.functional_call(mine, dict(zip(names, args, strict=False)), args[len(names) :])

    inputs = (*mine.parameters(), *mine.buffers(), *given)
    try:
        traced = make_fx(function, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:
        raise _NotTraced(f"make_fx: {error}") from error
    for node, x in zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if x.requires_grad:  # make_fx forgets it
            node.meta["val"].requires_grad_()
    with torch.set_grad_enabled(how.grad):
        rewritten, report = attnpass.rewrite(traced, policy=policy)
    after = copy.deepcopy(module)
    after.forward = lambda *args: rewritten(*after.parameters(), *after.buffers(), *args)  # type: ignore[method-assign]
    return _Candidate(run(after, given, grad=how.grad), report)


def _marked(dims: tuple[str, ...], dynamic: str) -> dict[int, Any]:
    return {at: Dim.AUTO for at, dim in enumerate(dims) if dim in dynamic}


def _compiled(namespace: dict[str, Any], module: nn.Module, given: tuple[Any, ...], how: How) -> _Candidate:
    torch._dynamo.reset()
    reports: list[Any] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        if how.kernel == "fuzz_functions":  # functions are otherwise given only where inductor compiles them
            policy = attnpass.Policy(**_options(how))
            done = frames.process(gm, example_inputs, name="graph", policy=policy, rewrite=True, compiled=True)
            reports.append(done.report)
            return lookup_backend(how.inner)(gm, example_inputs)
        from attnpass.capture.dynamo import backend as ours

        return ours(gm, example_inputs, options={"inner": how.inner, **_options(how)})

    mine = copy.deepcopy(module)
    fast = torch.compile(mine, backend=backend, fullgraph=True, dynamic=None if how.dynamic else False)

    def call(*args: Any) -> Any:
        for arg, dims in zip(args, namespace["DIMS"], strict=True):
            for at in _marked(dims, how.dynamic or ""):
                torch._dynamo.maybe_mark_dynamic(arg, at)
        return fast(*args)

    found = run(mine, given, call=call, grad=how.grad)
    report = reports[-1] if reports else attnpass.report()
    elsewhere = None
    if how.dynamic is not None:
        elsewhere = _elsewhere(namespace, module, given, how, mine, fast)
    return _Candidate(found, report, elsewhere)


def _elsewhere(
    namespace: dict[str, Any],
    module: nn.Module,
    given: tuple[Any, ...],
    how: How,
    candidate: nn.Module,
    call: Any,
    may_refuse: nn.Module | None = None,
) -> list[str]:
    """The same at other sizes; `may_refuse`: a module that may not be made for those."""
    sizes = {d: x.shape[at] for x, dims in zip(given, namespace["DIMS"], strict=True) for at, d in enumerate(dims)}
    more = {name: sizes[name] + OTHER[name] for name in OTHER if name in sizes and name in (how.dynamic or "")}
    others = namespace["inputs"](**more, device=given[0].device.type)
    if may_refuse is not None:
        try:
            may_refuse(*others)
        except Exception:
            return []  # torch.export itself has settled these sizes
    try:
        eager = _on_cpu(run(copy.deepcopy(module), others, grad=how.grad))
    except RuntimeError:
        return []  # a damaged program may be one at equal sizes only
    exact = eager if how.drops else _on_cpu(truth(copy.deepcopy(module), others, grad=how.grad))
    found = _on_cpu(run(candidate, others, call=call, grad=how.grad))
    return _further(found, eager, exact, how, others[0])


def _further(found: Run, eager: Run, exact: Run, how: How, first: torch.Tensor) -> list[str]:
    """Where the candidate is further from float64 than it may be; `first` is an input that is computed with.

    Four things are no error of the pass, each measured by what the original itself promises:
    - what is computed in a narrower dtype (autocast, a cast parameter) is rounded in that one, whatever it is kept in;
    - a learned factor of all scores gets one gradient, a sum over all of q (or all scores) of numbers of either sign:
      what cancels is measured by how many there are, not by their sum;
    - beside a number like -10000 a score loses digits, in the original as in a kernel, but not the same ones;
    - a gradient that is NaN in the original (it went through a row without any key) says nothing, and a fused call
      leaves it out of the sums.
    """
    narrow = torch.finfo(getattr(torch, how.narrow)).eps
    coarsest = max(narrow, how.added * torch.finfo(torch.float32).eps)
    floors = {d: _FLOOR * max(1.0, coarsest / torch.finfo(d).eps) for d in _DTYPES}
    if first.is_cuda:
        floors |= CUDA_FLOORS
    sums = {name for name in eager.tensors if name in ("grad of gain", "grad of head_gain")}
    found = Run(
        {name: _without(x, eager.tensors.get(name)) if "grad" in name else x for name, x in found.tensors.items()}
    )

    def part(run: Run, inside: bool) -> Run:
        return Run({name: x for name, x in run.tensors.items() if (name in sums) == inside})

    summed = {d: floor * first.numel() ** 0.5 for d, floor in floors.items()}
    return [
        *complaints(part(found, False), part(eager, False), part(exact, False), floors=floors),
        *complaints(part(found, True), part(eager, True), part(exact, True), floors=summed),
    ]


# Of cases written by hand no gradient that cancels to nothing is a sum of many numbers far above one. Of thousands of
# random ones some are: where a query sees one key alone, eager code has a gradient of exactly zero for q and k, and a
# kernel that makes its probability anew, as exp(score - lse), has the rounding of products of several normal numbers.
_FLOOR = 4 * FLOOR
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _without(x: torch.Tensor, eager: torch.Tensor | None) -> torch.Tensor:
    """NaN where eager code has one."""
    return x if eager is None or eager.shape != x.shape else x.masked_fill(eager.isnan(), torch.nan)


def _is_ours(module: nn.Module, given: Any, how: How, eager: Run, exact: Run) -> bool:
    """The same compiler alone is right, so it is the pass that is wrong."""
    if how.front != "compile" or how.inner == "eager":
        return True
    torch._dynamo.reset()
    mine = copy.deepcopy(module)
    fast = torch.compile(mine, backend=how.inner, fullgraph=True, dynamic=None if how.dynamic else False)
    try:
        return not _further(_on_cpu(run(mine, given, call=fast, grad=how.grad)), eager, exact, how, given[0])
    except Exception:
        return False


def _on_cpu(found: Run) -> Run:
    """Without the constants that make_fx puts beside the module's own buffers."""
    return Run({name: x.cpu() for name, x in found.tensors.items() if "_tensor_constant" not in name})


def main(namespace: dict[str, Any], how: How) -> int:
    """What the file of a failing program does when it is run."""
    judged = judge(namespace, how, os.environ.get("ATTNPASS_FUZZ_DEVICE", "cpu"))
    print(f"replaced {judged.replaced} of {judged.sites} sites by {', '.join(judged.kernels) or 'nothing'}")
    for text in (*judged.reasons, *judged.wrong, *([judged.invalid] if judged.invalid else [])):
        print(f"  {text}")
    if not judged.ours:
        print("  (the compiler behind the pass is as wrong without it)")
    print("WRONG" if judged.wrong else "right")
    return int(bool(judged.wrong))
