"""Auditing a model or function as torch.compile would capture it, without leaving a trace.

    copies of model and arguments ── Dynamo, a backend of this call's own, eager behind it ── the pass, deciding only

The model is really run once, because what follows a graph break depends on values. It runs on copies: the modules with
their buffers and attributes are copied, the parameters are shared. What cannot be copied is run as it is; then buffers,
train and eval modes are put back. Random number generators are put back in any case. Two things are not undone: what
the forward code itself does to the outside (files, globals, parameters written in place), and buffers of modules that
a plain function reaches through its closure only.

Dynamo keeps what it compiles with the code of each function. Each audit enters through a function of its own, compiles
for a backend of its own, and afterwards takes out of the caches what it put in, so audits do not see one another. On
torch 2.11 an audit of what has a graph break and is compiled by the user already still counts as one of the
recompilations that he is granted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from attnpass.ambient import resolved
from attnpass.capture import aten, frames
from attnpass.capture.splice import copied
from attnpass.demands import insist, unmatched
from attnpass.errors import AttnpassError
from attnpass.ledger import Report, merge
from attnpass.policy import Policy

_SETTINGS = {
    "disable": False,
    "suppress_errors": False,
    "error_on_recompile": False,
    "fail_on_recompile_limit_hit": False,
    "recompile_limit": 2**16,
    "accumulated_recompile_limit": 2**16,
    # sizes seen here are not evidence that the user's own sizes vary
    "automatic_dynamic_shapes": False,
}
# torch 2.13 counts what such a call compiles apart from what others do
_APART: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)


def audit_callable(fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Policy | None = None) -> Report:
    """What would become of every softmax that `fn` computes on these arguments; nothing is changed."""
    return _observed(fn, args, kwargs, resolved(given), rewrite=False)


def verify_callable(fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Policy | None = None) -> Report:
    """The same with every replacement tried against float64; what is replaced is a copy."""
    return _observed(fn, args, kwargs, dataclasses.replace(resolved(given), verify=True), rewrite=True)


def _observed(fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any], policy: Policy, *, rewrite: bool) -> Report:
    reports: list[Report] = []

    def observer(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        name = f"graph{len(reports)}"
        plain = aten.clone(gm, copied(gm.graph)) if rewrite else gm
        done = frames.process(gm, example_inputs, name=name, policy=policy, rewrite=rewrite, compiled=True)
        reports.append(done.report)
        return plain.forward

    isolated(fn, args, kwargs, observer)
    report = merge(reports)
    if not reports:
        note = "torch.compile captured no graph at all: nothing was computed on tensors, or capture is switched off"
        report = Report(torch=torch.__version__, notes=(note,))
    insist(policy, report)
    return dataclasses.replace(report, notes=(*report.notes, *unmatched(policy, report)))


def isolated(
    fn: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    backend: Callable[..., Any],
    *,
    then: Callable[[Any, Any], Any] = lambda subject, out: out,
) -> Any:
    """What `fn` returns when it is compiled by this backend, on copies of model and arguments, without a trace; `then`
    is given the copy of the model, too.
    """
    original = _innermost(fn)
    subject = _isolated(original)
    call_args, call_kwargs = _copied((tuple(args), dict(kwargs)))
    with _as_it_was(original, (args, kwargs)), _caches_as_they_were(backend):
        try:
            return then(subject, torch.compile(_entry(subject), backend=backend, **_APART)(*call_args, **call_kwargs))
        except AttnpassError:
            raise
        except Exception as error:
            raise AttnpassError(f"the model does not run on these arguments: {_first_cause(error)}") from error


def _innermost(fn: Any) -> Any:
    """What torch.compile was applied to, where it was."""
    fn = getattr(fn, "_orig_mod", fn)
    return getattr(fn, "_torchdynamo_orig_callable", fn)


def _first_cause(error: BaseException) -> str:
    """The first line of what was raised first: Dynamo wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _entry(subject: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return subject(*args, **kwargs)

    # Dynamo's cache belongs to the code object: a new one is empty, and goes with the audit
    run.__code__ = run.__code__.replace()
    return run


# -- the model ---------------------------------------------------------------------------------------------------------


def _isolated(fn: Any) -> Any:
    """The same function over a copy of its module, where it has one that can be copied."""
    module = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    if not isinstance(module, nn.Module):
        return fn
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    try:
        twin = copy.deepcopy(module, memo)
    except Exception:  # modules may hold anything: locks, generators, tensors within a graph
        return fn
    return twin if module is fn else types.MethodType(fn.__func__, twin)


def _copied(arguments: Any) -> Any:
    """Arguments may be written to (a key-value cache is)."""
    try:
        return copy.deepcopy(arguments)
    except Exception:  # a tensor within a graph cannot be copied
        return arguments


def _modules(fn: Any) -> Iterator[nn.Module]:
    held = [fn, getattr(fn, "__self__", None)]
    for cell in getattr(fn, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # not filled yet
            held.append(cell.cell_contents)
    for one in held:
        if isinstance(one, nn.Module):
            yield from one.modules()


@contextlib.contextmanager
def _as_it_was(fn: Any, arguments: Any) -> Iterator[None]:
    """Buffers, modes and random numbers come out as they went in."""
    modules = list(dict.fromkeys(_modules(fn)))
    modes = [(module, module.training) for module in modules]
    buffers = [b for module in modules for b in module.buffers(recurse=False)]
    kept = [(buffer, buffer.detach().clone()) for buffer in buffers]
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    tensors += [p for module in modules for p in module.parameters(recurse=False)]
    grad = torch.is_grad_enabled()
    with _random_numbers({t.device for t in tensors if t.device.type == "cuda"}):
        try:
            yield
        finally:
            torch.set_grad_enabled(grad)
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, value in kept:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextlib.contextmanager
def _random_numbers(devices: set[torch.device]) -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    arrays = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(sorted({device.index or 0 for device in devices})):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


# -- Dynamo's caches ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _caches_as_they_were(observer: Callable[..., Any]) -> Iterator[None]:
    """Whatever is compiled inside is forgotten, and nothing else."""
    from torch._dynamo.convert_frame import register_bytecode_hook

    before: dict[types.CodeType, int] = {}

    def compiled(code: types.CodeType, new_code: types.CodeType) -> None:
        # called before the result is put into the cache
        before.setdefault(code, len(_entries(code)))

    handle = register_bytecode_hook(compiled)
    try:
        with torch._dynamo.config.patch({k: v for k, v in _SETTINGS.items() if hasattr(torch._dynamo.config, k)}):
            yield
    finally:
        handle.remove()
        for code, count in before.items():
            if count == 0:
                torch._C._dynamo.eval_frame.reset_code(code)
            else:
                _take_out(code, observer)


def _entries(code: types.CodeType) -> list[Any]:
    return list(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code))


def _take_out(code: types.CodeType, observer: Callable[..., Any]) -> None:
    """Entries made for our backend never match again; those of the user stay."""
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    for entry in _entries(code):
        manager = entry.guard_manager
        if _is_ours(entry.backend, observer) and manager is not None and manager.extra_state is not None:
            manager.extra_state.invalidate(entry, DeletedGuardManagerWrapper("the audit is over"))


def _is_ours(backend: Any, observer: Callable[..., Any]) -> bool:
    seen = 0
    while backend is not None and seen < 8:  # torch.compile wraps it
        if backend is observer:
            return True
        backend = getattr(backend, "compiler_fn", None) or getattr(backend, "_torchdynamo_orig_backend", None)
        seen += 1
    return False
