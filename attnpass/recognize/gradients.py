"""Which values of a graph gradients may flow back through, as a note on each node: ``meta["attnpass_grad"]``.

A value that a gradient reaches passes it to whatever is computed from its elements, and, where it is written into
memory, to everything that is read from that memory afterwards (``z = zeros(...); z.copy_(q @ k)``). Too many notes cost
a kernel or a proof at worst, one too few would lose a gradient.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from attnpass.graph import State, state_of, value
from attnpass.recognize.purity import Effects
from attnpass.shape_readers import data_inputs


def mark_gradients(graph: Graph, default: State, effects: Effects) -> None:
    """Note on every node whether gradients may flow back through it."""
    memory = _written_memory(effects)
    reached: set[Node] = set()  # memory into which something was written that a gradient flows back through
    for node in graph.nodes:
        flows = _flows(node, default, effects, reached)
        node.meta["attnpass_grad"] = flows
        if flows:
            reached.update(memory.get(node, ()))


def asked(node: Node, state: State) -> bool:
    """A gradient may be asked of an operand of what runs under this state: an input says that it needs one even where
    nothing is recorded.
    """
    return state.grad and bool(node.meta.get("attnpass_grad", False))


def _flows(node: Node, default: State, effects: Effects, reached: set[Node]) -> bool:
    val = value(node)
    recorded = isinstance(val, torch.Tensor) and val.requires_grad
    if node.op in ("placeholder", "get_attr"):
        # a nested graph's inputs are marked by capture: their values do not tell what their caller passes
        return recorded or bool(node.meta.get("attnpass_grad", False))
    if recorded:  # what capture could not lower may start to record gradients by itself
        return True
    if not state_of(node, default).grad or str(node.target).startswith("aten.detach"):
        return False
    if isinstance(val, torch.Tensor) and not (val.is_floating_point() or val.is_complex()):
        return False
    return any(arg.meta["attnpass_grad"] or (reached and effects.group(arg) in reached) for arg in data_inputs(node))


def _written_memory(effects: Effects) -> dict[Node, list[Node]]:
    """What memory each node writes into."""
    written: dict[Node, list[Node]] = {}
    for group, entries in effects.writers.items():
        for _, writer, _ in entries:
            written.setdefault(writer, []).append(group)
    return written
