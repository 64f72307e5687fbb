"""What a node of a Dynamo graph calls, by name: enough to know where looking closer is worth it."""

from __future__ import annotations

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

_CALLS = ("call_function", "call_method", "call_module")
COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack")  # what tells where in the program a node is from


def name_of(gm: GraphModule, node: Node) -> str:
    """The bare name of what a Dynamo node calls: ``"softmax"`` for F.softmax, Tensor.softmax and nn.Softmax alike."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__.lower()
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def is_softmax(gm: GraphModule, node: Node) -> bool:
    """A call that computes a softmax, alone or within attention."""
    if node.op not in _CALLS or isinstance(node.target, HigherOrderOperator):
        return False
    name = name_of(gm, node)
    return (
        name == "softmin"
        or ("softmax" in name and "log_softmax" not in name and "logsoftmax" not in name)
        or "attention" in name
    )


def worth_lowering(gm: GraphModule) -> bool:
    """Something in this graph may be a softmax in one of its spellings."""
    spellings = ("exp", "exp_", "exp2", "log_softmax", "logsumexp")
    calls = (n for n in gm.graph.nodes if n.op in _CALLS)
    return any(is_softmax(gm, node) or name_of(gm, node) in spellings for node in calls)


def changes_shape_in_place(node: Node) -> bool:
    """Later readers of the operand see another shape than the one that was noted on its node."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "").partition(".")[0]
    if not name.endswith("_") or name.endswith("__"):
        return False
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return any(torch.Tag.inplace_view in getattr(packet, o).tags for o in packet.overloads())
