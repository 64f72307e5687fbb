"""One model through the pass: eager, captured and rewritten, compared.

build -> oracle (what is there) -> eager outputs and gradients -> captured with the pass -> the same, and its report
                                                            └──> inductor's own fuse_attention on the same graphs
"""

from __future__ import annotations

import collections
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests.models.case import Case, Inputs
from tests.models.oracle import Oracle

OUTPUT_LIMIT, GRADIENT_LIMIT = 2e-5, 1e-3
"""Differences that rounding alone explains; beyond, eager's own error against float64 is asked."""


@dataclass(kw_only=True)
class Result:
    """What the pass made of one model. Errors are relative to the largest element of each tensor."""

    suite: str
    name: str
    front: str
    there: int = 0  # softmax attention in one eager run that the outputs depend on
    softmaxes: int = 0
    existing: int = 0  # calls of scaled_dot_product_attention that the model makes itself
    sites: int = 0  # found by the pass, existing calls not counted
    replaced: int = 0  # in inference
    left: dict[str, int] = field(default_factory=dict)  # sites found and not replaced, by reason
    misses: dict[str, int] = field(default_factory=dict)
    replaced_training: int | None = None
    left_training: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    grad_error: float | None = None
    own_error: float | None = None  # eager's own, where the difference is larger than rounding explains
    own_grad_error: float | None = None
    inductor: int | None = None
    seconds: float = 0.0
    problem: str | None = None

    def decisions(self) -> dict[str, Any]:
        """The part that does not depend on machine or luck: what expected.json keeps."""
        kept = ("there", "existing", "sites", "replaced", "left", "misses", "replaced_training", "left_training")
        return {name: value for name, value in asdict(self).items() if name in kept and value not in ({}, None)}

    @property
    def accurate(self) -> bool:
        """No further from eager than a few times what eager is from float64."""
        return self.error <= _allowed(OUTPUT_LIMIT, self.own_error) and (
            self.grad_error is None or self.grad_error <= _allowed(GRADIENT_LIMIT, self.own_grad_error)
        )


def _allowed(limit: float, own: float | None) -> float:
    # beyond a few percent it is no rounding: the model computes another function in float64 (it mixes dtypes)
    return max(limit, 4 * own) if own is not None and own < 0.05 else limit


def positional(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments under "*" are positional."""
    return tuple(inputs.get("*", ())), {name: value for name, value in inputs.items() if name != "*"}


def run(case: Case, *, inductor: bool = False) -> Result:
    """All of it, first for inference, then for training."""
    started = time.perf_counter()
    result = Result(suite=case.suite, name=case.name, front=case.front)
    torch.manual_seed(0)
    model, inputs = case.build()
    model.eval()
    count(model, inputs, result)
    infer(case, model, inputs, result)
    if case.grad:
        train(case, model, inputs, result)
    if not result.accurate:
        measure_eager(model, inputs, result, grad=case.grad)
    if inductor:
        result.inductor = inductor_count(model, inputs)
    result.seconds = time.perf_counter() - started
    return result


def infer(case: Case, model: nn.Module, inputs: Inputs, result: Result) -> None:
    """Outputs without gradients; what is found and replaced here is what the tables show."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trainable:
            parameter.requires_grad_(False)  # torch.export does not look at the ambient mode
        rewritten, report = FRONTS[case.front](model, inputs)
        result.error = worst(outputs(model, inputs), outputs(rewritten, inputs))
        for parameter in trainable:
            parameter.requires_grad_(True)
    found = tally(report(), result)
    result.sites, result.replaced, result.left, result.misses = found


def train(case: Case, model: nn.Module, inputs: Inputs, result: Result) -> None:
    """Outputs and gradients of all parameters."""
    seen = every_query_sees_a_key(inputs)
    rewritten, report = FRONTS[case.front](model, seen)
    result.grad_error = worst(gradients(model, model, seen), gradients(rewritten, model, seen))
    result.error = max(result.error, worst(outputs(model, inputs), outputs(rewritten, inputs)))
    _, result.replaced_training, result.left_training, _ = tally(report(), result)


def measure_eager(model: nn.Module, inputs: Inputs, result: Result, *, grad: bool) -> None:
    """How far eager itself is from the same model in float64, where it runs in float64."""
    exact = copy.deepcopy(model).double()
    wide = tree_map(_widened, inputs)
    try:
        result.own_error = worst(outputs(exact, wide), [leaf.double() for leaf in outputs(model, inputs)])
        if grad:
            seen, wide = every_query_sees_a_key(inputs), every_query_sees_a_key(wide)
            own = [leaf.double() for leaf in gradients(model, model, seen)]
            result.own_grad_error = worst(gradients(exact, exact, wide), own)
    except RuntimeError:  # a model that mixes in float32 by hand
        return


def _widened(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def count(model: nn.Module, inputs: Inputs, result: Result) -> None:
    args, kwargs = positional(inputs)
    oracle = Oracle(model)
    with torch.no_grad(), oracle:
        read = model(*args, **kwargs)
    result.there, result.softmaxes, result.existing = oracle.there(read), oracle.softmaxes, oracle.existing


def tally(report: dict[str, Any], result: Result) -> tuple[int, int, dict[str, int], dict[str, int]]:
    """(sites, replaced, left by reason, misses by reason); a model's own calls of the fused function are no finds."""
    left = collections.Counter(site["reason"]["code"] for site in report["sites"] if not site["replaced"])
    calls = left.pop("already_fused", 0)
    misses = collections.Counter(miss["reason"]["code"] for miss in report["misses"])
    if report.get("failures"):
        result.problem = f"the pass failed: {report['failures'][0]}"
    replaced = sum(site["replaced"] for site in report["sites"])
    return len(report["sites"]) - calls, replaced, dict(sorted(left.items())), dict(sorted(misses.items()))


Rewritten = tuple[Callable[..., Any], Callable[[], dict[str, Any]]]


def through_dynamo(model: nn.Module, inputs: Inputs) -> Rewritten:
    """torch.compile with the pass and no other compiler behind it."""
    import attnpass
    from attnpass.capture.dynamo import backend

    torch._dynamo.reset()
    attnpass.reset()
    compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
    return compiled, lambda: attnpass.report().to_dict()


def through_export(model: nn.Module, inputs: Inputs) -> Rewritten:
    """torch.export, then the rewritten copy of the program."""
    import attnpass

    args, kwargs = positional(inputs)
    program, report = attnpass.rewrite(torch.export.export(model, args, kwargs, strict=False))
    return program.module(), report.to_dict


FRONTS: dict[str, Callable[[nn.Module, Inputs], Rewritten]] = {"dynamo": through_dynamo, "export": through_export}


def outputs(call: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """All floating outputs."""
    args, kwargs = positional(inputs)
    torch.manual_seed(1)
    leaves = [leaf for leaf in tree_leaves(call(*args, **kwargs)) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def gradients(call: Callable[..., Any], model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The gradients of a fixed random weighting of the outputs, with respect to all parameters."""
    source = call if isinstance(call, torch.fx.GraphModule) else model
    wanted = [parameter for parameter in source.parameters() if parameter.requires_grad]
    weights = torch.Generator().manual_seed(3)
    loss = torch.zeros(())
    for leaf in outputs(call, inputs):
        if leaf.requires_grad:
            loss = loss + (leaf * torch.randn(leaf.shape, generator=weights)).sum()
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


def every_query_sees_a_key(inputs: Inputs) -> Inputs:
    """The same inputs without padding on the left.

    A causal query on left padding sees no key; its output counts (and is compared), but no training loss reads it, and
    fused kernels do not promise a gradient through it.
    """
    seen = dict(inputs)
    for name, mask in inputs.items():
        if name.endswith("attention_mask") and mask.dtype == torch.long:
            seen[name] = mask | (mask.cumsum(-1) == 0)
    return seen


def worst(wanted: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference of any pair, relative to the largest element of the wanted one; inf where they differ
    in number, shape, dtype or in where they are no numbers.

    A tensor that is nearly zero beside the others (the gradient of a key bias is zero but for rounding) is measured
    by a thousandth of the largest.
    """
    if len(wanted) != len(got):
        return float("inf")
    error = 0.0
    floor = 1e-3 * max((float(a.detach().nan_to_num(0, 0, 0).abs().max()) for a in wanted if a.numel()), default=1.0)
    for a, b in zip(wanted, got, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if not a.numel():
            continue
        a, b = a.double(), b.double()
        finite = a.isfinite()
        same = torch.equal(a[~finite].nan_to_num(0.0), b[~finite].nan_to_num(0.0))  # NaN is NaN, inf keeps its sign
        if not torch.equal(finite, b.isfinite()) or not same:
            return float("inf")
        if finite.any():
            scale = max(float(a[finite].abs().max()), floor, 1e-30)
            error = max(error, float((a - b)[finite].abs().max()) / scale)
    return error


def inductor_count(model: nn.Module, inputs: Inputs) -> int:
    """How often inductor's fuse_attention fires on this model's inference graphs.

    compile_fx runs as always (AOTAutograd, decompositions, joint-graph passes) with the code generator left out; its
    attention patterns live in the joint-graph passes, so the count is that of a real compilation.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    def no_codegen(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        return make_boxed_func(gm.forward)

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        return compile_fx(gm, example_inputs, inner_compile=no_codegen)

    def run_once(module: nn.Module, arguments: Inputs) -> int:
        torch._dynamo.reset()
        counters.clear()
        args, kwargs = positional(arguments)
        with torch.no_grad(), _fresh_cache():
            torch.compile(module, backend=backend)(*args, **kwargs)
        return int(counters["inductor"]["fuse_attention"])

    run_once(nn.Softmax(-1), {"*": (torch.zeros(2, 2),)})  # registers the patterns, which itself counts
    return run_once(model, inputs)


@contextmanager
def _fresh_cache() -> Iterator[None]:
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
