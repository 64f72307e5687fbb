"""Operations that read of an argument nothing but its shape, dtype and device. Its elements make no difference.

    ones_like(scores)   scores.new_zeros(...)   mask.expand_as(scores)   bias.type_as(scores)   sym_size(scores, -1)

No value and no gradient flows through such an argument. Random numbers of a form (``rand_like``) are left out: which
numbers they are may depend on more than the form.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

_SHAPE_ONLY = {
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), "self"),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), "self"),
    **dict.fromkeys(("sym_size", "sym_numel"), "self"),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as", "type_as"), "other"),
}


@cache
def _shape_argument(target: Any) -> tuple[int, str] | None:
    """Where the argument stands of which `target` reads only the form."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, name = target._schema.name.split("::")
    wanted = "other" if (name, target._overloadname) == ("to", "other") else _SHAPE_ONLY.get(name)
    for index, argument in enumerate(target._schema.arguments):
        if namespace == "aten" and argument.name == wanted:
            return index, argument.name
    return None


def data_inputs(node: Node) -> list[Node]:
    """The inputs of a node without those of which it reads only the form."""
    at = _shape_argument(node.target) if node.op == "call_function" else None
    if at is None:
        return node.all_input_nodes
    index, name = at
    found: dict[Node, None] = {}
    map_arg(
        ([arg for i, arg in enumerate(node.args) if i != index], {k: v for k, v in node.kwargs.items() if k != name}),
        lambda arg: found.setdefault(arg),
    )
    return list(found)


def reads_shape_only(node: Node, tensors: set[Node]) -> bool:
    """Of these tensors, `node` reads nothing but the form."""
    return tensors.isdisjoint(data_inputs(node))
