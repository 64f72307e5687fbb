"""Who else reads scores or probabilities: as long as somebody does they have to be computed, and nothing is saved."""

from __future__ import annotations

from torch.fx import Node

from attnpass.recognize.purity import Effects
from attnpass.shape_readers import reads_shape_only


def escaping(
    region: set[Node], output: Node, kept: set[Node], effects: Effects, live: set[Node]
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The live readers of a region's insides that outlive it or feed what the fused call reads (`kept`): those of
    their form alone, which can be given a stand-in, and the others.
    """
    inner = region - {output}
    found: dict[Node, None] = {}
    for node in inner:
        for user in node.users:
            if user in live and user not in region and _leaves(user, region, kept, live):
                found[user] = None
    readers = sorted(found, key=effects.position.__getitem__)
    form = tuple(node for node in readers if reads_shape_only(node, inner))
    return form, tuple(node for node in readers if node not in form)


def _leaves(node: Node, region: set[Node], kept: set[Node], live: set[Node]) -> bool:
    stack, seen = [node], {node}
    while stack:
        here = stack.pop()
        if here.op == "output" or here in kept or len(seen) > 32:
            return True
        for user in here.users:
            if user in region or user in seen or user not in live:
                continue
            seen.add(user)
            stack.append(user)
        if not here.users:  # a live node without readers has an effect
            return True
    return False
