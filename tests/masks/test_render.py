"""A proved mask rendered back to operations is the mask it was lifted from, in the graph and for FlexAttention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.attention.flex_attention import create_mask

from attnpass.graph import Builder, State, fake_mode_of
from attnpass.masks.evaluate import Evaluator, dense_indices
from attnpass.masks.render import dense, mask_function
from tests.masks import spellings as s
from tests.masks.harness import BATCH, HEADS, Table

MASKS = {
    **{f"causal: {k}": v for k, v in list(s.CAUSAL.items())[:4]},
    **{f"window: {k}": v for k, v in list(s.WINDOW.items())[:3]},
    **{f"prefix: {k}": v for k, v in list(s.PREFIX.items())[:3]},
    **{f"chunk: {k}": v for k, v in list(s.CHUNK.items())[:3]},
    **{f"document: {k}": v for k, v in s.DOCUMENT.items()},
    **{f"padding: {k}": v for k, v in s.PADDING.items()},
    **{f"nothing: {k}": v for k, v in list(s.NOTHING.items())[:1]},
    **{f"everything: {k}": v for k, v in list(s.EVERYTHING.items())[:1]},
}
BIASES = {**s.ALIBI, **s.RELATIVE}


def example(length: int) -> Tensor:
    return torch.randint(0, 3, (BATCH, length)).float()


@dataclass(frozen=True)
class Rendered:
    """A table whose masks were all rendered into its graph, and every value of one run of it."""

    table: Table
    nodes: dict[str, Node]
    values: dict[Node, Tensor]

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """(as it was made, as it was rendered)"""
        return self.values[self.table.node(name)], self.values[self.nodes[name]]


@cache
def rendered(which: str, dynamic: bool) -> Rendered:
    makes = {"masks": MASKS, "biases": BIASES}[which]
    if dynamic:
        makes = {name: make for name, make in makes.items() if name != "take along"}
    table = Table(makes, dynamic=dynamic, x=example(12))
    t, nodes = table.traced, {}
    graph = t.program.graph
    output = next(n for n in graph.nodes if n.op == "output")
    for name in makes:
        proof = table.proof(name)
        value = proof.keep if which == "masks" else proof.added[0].bias.value
        builder = Builder(graph, output, mode=fake_mode_of(graph), state=State(), like=table.node(name))
        nodes[name] = dense(
            value,
            builder,
            proof.frame,
            proof.sizes,
            t.masks.lifter.nodes,
            device=torch.device("cpu"),
            dtype=torch.bool if which == "masks" else torch.float32,
        )
    run = Interpreter(GraphModule(torch.nn.Module(), graph), garbage_collect_values=False)
    x = example(17 if dynamic else 12)  # at another length than it was traced with
    run.run(*[t.masks.lifter.constants.get(n.name, x) for n in graph.nodes if n.op == "placeholder"])
    return Rendered(table, nodes, run.env)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_rendered_into_the_graph(name: str, dynamic: bool) -> None:
    actual, dense_mask = rendered("masks", dynamic).pair(name)
    seen = actual if actual.dtype == torch.bool else actual == 0
    assert dense_mask.dtype == torch.bool
    assert dense_mask.dim() == 4
    assert torch.equal(*torch.broadcast_tensors(seen, dense_mask))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_is_rendered_into_the_graph(name: str, dynamic: bool) -> None:
    if dynamic and name == "take along":
        pytest.skip("torch makes its length static")
    actual, bias = rendered("biases", dynamic).pair(name)
    assert torch.equal(*torch.broadcast_tensors(actual, bias))


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_becomes_a_function_for_flex_attention(name: str) -> None:
    length = 12
    made_once = rendered("masks", False)
    proof = made_once.table.proof(name)
    tensors = {load.source: made_once.values[node] for node, load in proof.loads}
    function = mask_function(proof.keep, {}, tensors, device=torch.device("cpu"))
    made = create_mask(function, BATCH, HEADS, length, length, device="cpu")
    indices = dense_indices({"b": BATCH, "h": HEADS, "i": length, "j": length})
    assert torch.equal(made, Evaluator(indices, {}, tensors)(proof.keep).expand(made.shape))
