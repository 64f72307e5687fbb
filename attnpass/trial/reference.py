"""What the original means: its own operations, in float64.

    given (float64) ─┬─ an operation of the site: float64 in, float64 out, every narrower dtype in it float64
                     └─ one that leads to a mask or bias: in the types that it has ── what comes out of it is widened

So the result is the function that the author meant and not a rounding of it. What leads to a mask is left in its own
types because there a rounding can be part of the meaning: the lowest float32 as bfloat16 is -inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from attnpass.trial.pair import Side

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def exact(side: Side) -> GraphModule:
    """The original side of a pair in float64; it is given its floating inputs in float64."""
    graph, twin, wider, narrowed = Graph(), dict[Node, Node](), dict[Node, Node](), dict[Node, Node]()

    def is_wide(node: Node) -> bool:
        return node.op == "placeholder" or node.name in side.own

    def wide(node: Node) -> Node:
        if is_wide(node) or _narrow(node) is None:
            return twin[node]
        if node not in wider:
            wider[node] = graph.call_function(torch.ops.aten.to.dtype, (twin[node], torch.float64))
        return wider[node]

    def narrow(node: Node) -> Node:
        dtype = _narrow(node)
        if not is_wide(node) or dtype is None:
            return twin[node]
        if node not in narrowed:
            narrowed[node] = graph.call_function(torch.ops.aten.to.dtype, (twin[node], dtype))
        return narrowed[node]

    for node in side.module.graph.nodes:
        if node.op == "placeholder":
            twin[node] = graph.placeholder(str(node.target))
        elif node.op == "output":
            graph.output(map_arg(node.args[0], wide))
        elif node.name not in side.own:
            twin[node] = graph.create_node(
                node.op, node.target, *(map_arg(each, narrow) for each in (node.args, node.kwargs))
            )
        else:
            args, kwargs = (map_aggregate(map_arg(each, wide), widened) for each in (node.args, node.kwargs))
            made = graph.create_node(node.op, node.target, args, kwargs)
            # what is made from nothing but numbers may still be narrow
            made_narrow = _narrow(node) is not None and not node.all_input_nodes
            twin[node] = graph.call_function(torch.ops.aten.to.dtype, (made, torch.float64)) if made_narrow else made
    return GraphModule(side.module, graph)


def _narrow(node: Node) -> torch.dtype | None:
    val = node.meta.get("val")
    return val.dtype if isinstance(val, torch.Tensor) and val.dtype in _NARROW else None


def widened(x: Any) -> Any:
    """Where an argument asks for a narrower floating type: float64."""
    return torch.float64 if isinstance(x, torch.dtype) and x in _NARROW else x
