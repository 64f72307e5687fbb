"""Whatever program makes a mask: the lifted expression has its values, and what is proved of it is true."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attnpass.masks import Masks
from attnpass.masks.check import differing
from attnpass.masks.evaluate import Evaluator, dense_indices
from attnpass.masks.expr import Value, loads
from attnpass.masks.logic import is_bool
from attnpass.masks.structure import whole
from tests.masks.programs import PROGRAMS, Instruction, run

EXAMPLES = int(os.environ.get("ATTNPASS_MASK_EXAMPLES", "500"))
thorough = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 500, suppress_health_check=list(HealthCheck)
)


def traced(program: Sequence[Instruction], length: int, mode: str) -> GraphModule:
    def last(x: Tensor) -> Tensor:
        n = x.shape[0]
        return run(program, x).expand(n, n)

    return make_fx(last, tracing_mode=mode, pre_dispatch=True, _error_on_data_dependent_ops=False)(data(length))


def data(length: int) -> Tensor:
    return torch.randint(0, 3, (length,), generator=torch.Generator().manual_seed(length))


class Recorder(Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def values(self, *inputs: Tensor) -> Mapping[Node, object]:
        self.run(*inputs)
        return self.env


def check(program: Sequence[Instruction], module: GraphModule, length: int) -> None:
    """Lift the result, and compare it and everything proved of it with the real thing at this length."""
    masks = Masks(module.graph)
    out = next(n for n in module.graph.nodes if n.op == "output").args[0]
    assert isinstance(out, Node)
    frame = masks.frame(1, 1, *out.meta["val"].shape)
    boolean = out.meta["val"].dtype == torch.bool
    if not boolean and not out.meta["val"].dtype.is_floating_point:
        value = masks.lifter.read(out, frame.axes[2:], len(module.graph.nodes))
        _same(module, value, masks, frame.axes[2:], out, length)
        return
    proof = masks.analyse([masks.term(out, frame, off=False if boolean else None)], frame)
    assert not proof.check.startswith("disagreed"), proof.steps
    value = masks.lifter.read(out, frame.axes[2:], len(module.graph.nodes))
    evaluate, actual = _same(module, value, masks, frame.axes[2:], out, length)
    assert not differing(evaluate(proof.keep), evaluate(whole(proof.structure, frame))), proof.steps
    if boolean:
        assert not differing(evaluate(proof.keep), actual), proof.steps
        if proof.empty_rows == "impossible":
            assert bool(actual.any(-1).all()), proof.steps


def _same(
    module: GraphModule, value: Value, masks: Masks, index: tuple, out: Node, length: int
) -> tuple[Evaluator, Tensor]:
    values = Recorder(module).values(data(length))
    tensors = {load.source: values[masks.lifter.nodes[load.source]] for load in loads(value)}
    sizes = dict.fromkeys(masks.sizes.hints, length)
    evaluate = Evaluator(dense_indices({"i": length, "j": length}), sizes, tensors)
    actual = values[out]
    lifted = evaluate(value)
    assert is_bool(value) == (actual.dtype == torch.bool)
    wrong = differing(actual, lifted)
    assert not wrong, f"{value!r}\n{actual}\n{lifted.expand(actual.shape)}\n{module.graph}"
    return evaluate, actual


@given(PROGRAMS, st.integers(4, 7))
@thorough
def test_a_lifted_mask_has_the_values_of_its_program(program: list[Instruction], length: int) -> None:
    check(program, traced(program, length, "fake"), length)


@given(PROGRAMS, st.sampled_from([4, 5, 8, 11]))
@settings(thorough, max_examples=EXAMPLES // 10)
def test_a_mask_lifted_with_a_symbolic_length_is_right_at_other_lengths(program: list[Instruction], other: int) -> None:
    module = traced(program, 7, "symbolic")
    if _allows(module, other):
        check(program, module, other)
    check(program, module, 7)


def _allows(module: GraphModule, length: int) -> bool:
    """The trace is good for this length too: no guard of it says otherwise."""
    symbol = next(iter(module.graph.nodes)).meta["val"].shape[0]
    if not isinstance(symbol, torch.SymInt) or not symbol.node.expr.is_Symbol:
        return False
    return all(guard.expr.subs(symbol.node.expr, length) != False for guard in symbol.node.shape_env.guards)  # noqa: E712
