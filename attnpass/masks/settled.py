"""Numbers that hang on no data: the slopes of ALiBi, as most models compute them in their forward.

    pow(0.25, arange(1, 9))      no input, no parameter, no random number, no symbolic size: the same in every run

What makes such a tensor is run once, on the CPU, and its numbers are looked at. Another device may round them
otherwise, which makes no difference to their size. Buffers are data (they can be loaded, or written), and so is what an
operation gives that is not understood.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from attnpass.masks.bias import TAME
from attnpass.masks.check import NotRun, Replay
from attnpass.masks.expr import Load
from attnpass.masks.lift import Lifter
from attnpass.shape_readers import data_inputs

_MAX_ELEMENTS = 1 << 16


class Settled:
    """Which tensors of a graph are settled, and whether what they hold is tame."""

    def __init__(self, lifter: Lifter) -> None:
        self.lifter = lifter
        self._tame: dict[str, bool] = {}

    def __call__(self, load: Load) -> bool:
        """The tensor that is read holds nothing but numbers below TAME, in every run."""
        if load.source not in self._tame:
            node = self.lifter.nodes[load.source]
            self._tame[load.source] = self._settled(node) and self._below(node)
        return self._tame[load.source]

    def _settled(self, node: Node) -> bool:
        work, seen = [node], {node}
        while work:
            at = work.pop()
            if not self._by_itself(at):
                return False
            for arg in data_inputs(at):
                if arg not in seen:
                    seen.add(arg)
                    work.append(arg)
        return True

    def _by_itself(self, node: Node) -> bool:
        """The operation gives the same whenever its inputs are the same, and nobody else writes its result."""
        target, val = node.target, node.meta.get("val")
        return (
            isinstance(target, torch._ops.OpOverload)
            and target.namespace == "aten"
            and torch.Tag.nondeterministic_seeded not in target.tags
            and "empty" not in target._schema.name  # holds whatever was there
            and not self.lifter.writes.to(node)
            and isinstance(val, torch.Tensor)
            and all(isinstance(size, int) for size in val.shape)
            and val.numel() <= _MAX_ELEMENTS
        )

    def _below(self, node: Node) -> bool:
        replay = Replay(self.lifter.writes, self.lifter.sizes, (), {})
        try:
            # the pass runs within compilations, where new tensors would be fake
            with unset_fake_temporarily(), torch.no_grad():
                replay.run({node}, self.lifter.writes.position[node])
                return bool((replay.values[node].abs() < TAME).all())
        except (NotRun, RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
            return False  # not on the CPU: then it is data
