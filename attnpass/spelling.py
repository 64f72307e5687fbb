"""Telling equally spelled pieces of graph from one another, so that a report can group what was not recognised.

The neighbourhood of a softmax (what it is made of, what reads it) is turned into a small directed graph labelled with
operations; equal Weisfeiler-Lehman hashes mean the same spelling for all practical purposes. Only reports use this.
"""

from __future__ import annotations

import warnings

import networkx as nx
from torch.fx import Node

_DEPTH = 5
_MOST = 64


def spelling_hash(anchor: Node) -> str:
    """The same for softmaxes whose neighbourhoods are spelled alike, whatever their sizes."""
    picture = nx.DiGraph()
    picture.add_node(anchor, op=str(anchor.target))
    frontier = [anchor]
    for _ in range(_DEPTH):
        reached: list[Node] = []
        for node in frontier:
            edges = [(other, node) for other in node.all_input_nodes] + [(node, other) for other in node.users]
            for source, target in edges:
                if picture.number_of_nodes() >= _MOST:
                    break
                other = source if target is node else target
                if other not in picture:
                    label = str(other.target) if other.op == "call_function" else other.op
                    picture.add_node(other, op=label)
                    reached.append(other)
                picture.add_edge(source, target)
        frontier = reached
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that hashes differ from those of an older networkx: none is kept
        return str(nx.weisfeiler_lehman_graph_hash(picture, node_attr="op", iterations=3))
