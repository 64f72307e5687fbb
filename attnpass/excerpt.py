"""A part of a graph as a module of its own: to be timed (autotune.py), or tried against another (trial/pair.py).

graph:   x ── a ── b ── end          excerpt of {a, b, end}:   given ── a ── b ── end
              └── (read elsewhere)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attnpass.graph import value


def needed(ends: Iterable[Node], inside: Collection[Node]) -> set[Node]:
    """What these nodes are computed from: nodes of `inside`, and the first ones that are not."""
    found: set[Node] = set()
    work = list(ends)
    while work:
        node = work.pop()
        if node not in found:
            found.add(node)
            work += [arg for arg in node.all_input_nodes if node in inside]
    return found


def excerpt(graph: Graph, end: Node, nodes: Collection[Node], twin: dict[Node, Any]) -> GraphModule:
    """`graph`, which has its inputs, with copies of these nodes behind them; `twin` has what stands for each node, at
    first for all others that they read.
    """
    root = torch.nn.Module()
    for node in end.graph.nodes:
        if node in nodes:
            twin[node] = graph.node_copy(node, twin.__getitem__)
            if node.op == "get_attr":
                name = f"function{len(twin)}"
                twin[node].target = name
                setattr(root, name, value(node))
    graph.output((twin[end],))
    return GraphModule(root, graph)
