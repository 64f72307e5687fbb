"""attnpass: makes the attention of any PyTorch model fast without touching the model.

    model = torch.compile(model, backend="attnpass")              # nothing needs to be imported
    program, report = attnpass.rewrite(torch.export.export(model, args))
    report = attnpass.audit(model, *args, **kwargs)               # what would happen, and why; the model is untouched

Everything public is named here. Importing this module is light: torch and the pass itself are imported when first used.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, overload

from attnpass.ambient import policy
from attnpass.errors import AttnpassError
from attnpass.ledger import Report
from attnpass.policy import Policy, Rule

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from attnpass.bisect import Bisection
    from attnpass.capture.fence import inductor_settings
    from attnpass.kernels import Capabilities, Kernel, register_kernel, unregister_kernel
    from attnpass.recognize import register_rule

__version__ = "0.1.0"

__all__ = [
    "AttnpassError",
    "Capabilities",
    "Kernel",
    "Policy",
    "Report",
    "Rule",
    "__version__",
    "audit",
    "bisect",
    "inductor_settings",
    "policy",
    "register_kernel",
    "register_rule",
    "report",
    "reset",
    "rewrite",
    "unregister_kernel",
    "verify",
]


class _Package(ModuleType):
    """Keeps the functions `report` and `policy`: importing the modules of these names would replace them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


@overload
def rewrite(
    program: ExportedProgram, *, policy: Policy | None = ..., example_inputs: Sequence[Any] | None = ...
) -> tuple[ExportedProgram, Report]: ...
@overload
def rewrite(
    program: GraphModule, *, policy: Policy | None = ..., example_inputs: Sequence[Any] | None = ...
) -> tuple[GraphModule, Report]: ...
def rewrite(
    program: ExportedProgram | GraphModule,
    *,
    policy: Policy | None = None,
    example_inputs: Sequence[Any] | None = None,
) -> tuple[ExportedProgram | GraphModule, Report]:
    """A copy of an exported program with its attention replaced, and the report on every softmax in it.

    Takes an ``ExportedProgram`` or a ``GraphModule`` of ATen operations; the original stays as it is, the copy shares
    its weights. `example_inputs` is needed only for a GraphModule whose nodes carry no shapes. A GraphModule that
    make_fx traced does not say which of its inputs need gradients, so all may: call this under ``torch.no_grad()``
    where none does, or mark the values of its placeholders (``node.meta["val"].requires_grad_()``).
    """
    from attnpass.capture import exported

    return exported.rewrite(program, policy=policy, example_inputs=example_inputs)


def audit(target: Any, *args: Any, policy: Policy | None = None, **kwargs: Any) -> Report:
    """What would become of every softmax, and why; nothing is changed.

    `target` is an ``ExportedProgram``, a ``GraphModule`` of ATen operations, or any model or function, which is then
    captured as ``torch.compile`` would capture it when called with these arguments.
    """
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from attnpass.capture import aten, exported

    if isinstance(target, ExportedProgram):
        if args or kwargs:
            raise AttnpassError("an ExportedProgram is audited as it is; call audit(program) without arguments")
        return exported.audit(target, policy=policy)
    if isinstance(target, GraphModule) and aten.foreign_call(target) is None and not kwargs:
        return exported.audit(target, policy=policy, example_inputs=args or None)
    if not callable(target):
        raise AttnpassError(f"cannot audit {type(target).__name__}; pass a model, a function or an ExportedProgram")
    from attnpass.capture import dynamo

    return dynamo.audit_callable(target, args, kwargs, policy)


def verify(target: Any, *args: Any, policy: Policy | None = None, **kwargs: Any) -> Report:
    """Try every replacement beside its original, both held to float64, on these arguments and on harder ones.

    The report has the numbers of each site; one that is worse than its original is left as it was. `target` as for
    :func:`audit`; an ``ExportedProgram`` may come with arguments, else those it was exported with are taken.
    """
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from attnpass.capture import aten, dynamo, exported

    if isinstance(target, ExportedProgram):
        return exported.verify(target, args, kwargs, policy)
    if isinstance(target, GraphModule) and aten.foreign_call(target) is None and not kwargs:
        return exported.verify(target, args, kwargs, policy)
    if not callable(target):
        raise AttnpassError(f"cannot verify {type(target).__name__}; pass a model, a function or an ExportedProgram")
    return dynamo.verify_callable(target, args, kwargs, policy)


def bisect(
    target: Any,
    *args: Any,
    policy: Policy | None = None,
    inner: Any = "eager",
    gradients: bool = False,
    tolerance: float | None = None,
    output: str | None = None,
    **kwargs: Any,
) -> Bisection:
    """Find the sites that make the output of a model differ on these arguments, and write each as a file to `output`.

    `gradients`: compare those of the parameters, too. `tolerance`: the difference from the model as it is that is fine,
    as a share of the largest element; without one the model in float64 is the measure. `inner`: what runs the graphs.
    """
    from attnpass.bisect import bisect as search

    if not callable(target):
        raise AttnpassError(f"cannot bisect {type(target).__name__}; pass a model or a function")
    options: dict[str, Any] = {
        "policy": policy,
        "inner": inner,
        "gradients": gradients,
        "tolerance": tolerance,
        "output": output,
    }
    return search(target, args, kwargs, **options)


def report() -> Report:
    """What became of every softmax that was compiled in this process since :func:`reset`."""
    from attnpass import session

    return session.report()


def reset() -> None:
    """Forget what was compiled so far."""
    from attnpass import session

    session.reset()


_LATE = {
    "Capabilities": "attnpass.kernels",
    "Kernel": "attnpass.kernels",
    "inductor_settings": "attnpass.capture.fence",
    "register_kernel": "attnpass.kernels",
    "register_rule": "attnpass.recognize",
    "unregister_kernel": "attnpass.kernels",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'attnpass' has no attribute {name!r}")
