"""Add an idiom: one small function that teaches the walk from the softmax to the scores one more operation.

The walk keeps an equation, and every rule turns it into the next one further in:

    argument of softmax = factor * inner + terms collected so far

Here the bias is added and the scores are scaled in one operation, torch.addcmul(bias, scores, temperature), for which
attnpass has no rule. What it does not understand it leaves alone; the report says where it stopped.

Run it: python examples/add_an_idiom.py
"""

import torch
from torch import Tensor, nn

import attnpass
from attnpass.errors import Refuse
from attnpass.graph import is_one, tensor
from attnpass.recognize import Inner, Walker
from attnpass.recognize.ops import bound


def addcmul(walker: Walker, at: Inner) -> Inner:
    """``addcmul(bias, scores, t, value=c)`` is ``c * t * scores + bias``."""
    args = bound(at.node)  # the arguments by the names of the operator's schema
    bias, scores, by = args["self"], args["tensor1"], args["tensor2"]
    if not walker.has_product(scores):
        scores, by = by, scores
    if not walker.has_product(scores) or walker.has_product(by) or walker.has_product(bias):
        raise Refuse("two_score_tensors", at.node)
    # Only one number for all scores is taken here: a tensor over queries and keys could not move out of the softmax.
    multiplier = tensor(by)
    if multiplier is None or not all(is_one(size) for size in multiplier.shape):
        raise Refuse("score_weights", at.node)
    outer = walker.add_term(at, bias, 1)
    factor = at.factor.times(walker.factor_of(at, args["value"], 1)).times(walker.factor_of(at, by, 1))
    source = walker.read(at.node, scores)  # refuses if something has written to it in place
    return outer.step(source, walker.place(at, source).layout, factor=factor)


class Attention(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, length: int = 50) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.bias = nn.Parameter(torch.randn(heads, length, length))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.addcmul(self.bias, q @ k.transpose(2, 3), self.temperature)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model = Attention().eval().requires_grad_(False)
    x = torch.randn(2, 50, 64)
    program = torch.export.export(model, (x,))

    print("before:\n")
    report = attnpass.audit(program)
    print(report)
    assert [miss.reason.code for miss in report.misses] == ["unknown_op"]

    attnpass.register_rule("addcmul")(addcmul)  # or @attnpass.register_rule("addcmul") above the function

    print("\nafter:\n")
    rewritten, report = attnpass.rewrite(program)
    print(report)
    assert report.replaced == 1
    assert not report.misses
    error = (rewritten.module()(x) - model(x)).abs().max().item()
    print(f"\nlargest error against eager {error:.1e}")
    assert error < 1e-5


if __name__ == "__main__":
    main()
