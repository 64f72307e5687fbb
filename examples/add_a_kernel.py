"""Add a kernel: one class that says what it computes, what it does not, and how it is called.

The kernel here serves attention with a soft cap (Gemma 2), which torch's own kernel refuses. It works through the
queries block by block, so the whole score matrix never exists. It is written in PyTorch to keep the example short; a
kernel in Triton or CUDA would be registered in the same way.

Run it: python examples/add_a_kernel.py
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import Node

import attnpass
from attnpass.graph import Builder
from attnpass.kernels.base import Capabilities, Kernel
from attnpass.reasons import Reason, reason
from attnpass.site import Call
from attnpass.spec import AttentionSpec

BLOCK = 64


# 1. The computation, as an operator that torch.compile and torch.export can carry without looking inside.
@torch.library.custom_op("attnpass_example::capped_attention", mutates_args=())
def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for start in range(0, q.shape[-2], BLOCK):
        rows = slice(start, start + BLOCK)
        scores = cap * torch.tanh(q[..., rows, :] @ k.mT * (scale / cap))
        if mask is not None:
            block = mask.expand(*q.shape[:-1], k.shape[-2])[..., rows, :]
            scores = scores.masked_fill(~block, -torch.inf) if mask.dtype == torch.bool else scores + block
        out[..., rows, :] = scores.softmax(-1) @ v
    return out


@capped_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


# 2. The kernel: what it can do is a table. What the table does not say (here: gradients, dropout, sinks, shared heads,
#    other dtypes) is refused, and every refusal shows in the report.
class Capped(Kernel):
    name = "capped"
    can = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"float32"}),
        unlike_widths=True,
        dense_mask=True,
        softcap=True,
    )

    def refusals(self, spec: AttentionSpec) -> Iterator[Reason]:
        yield from super().refusals(spec)
        if spec.softcap is None:
            yield reason("no_fused_form", detail="made for a soft cap only")
        if not isinstance(spec.scale, float):
            yield reason("no_fused_form", detail="a scale that is not a number")

    def emit(self, b: Builder, call: Call) -> Node:
        op = torch.ops.attnpass_example.capped_attention.default
        return b.call(op, call.q, call.k, call.v, call.mask, call.scale, call.spec.softcap)


class GemmaAttention(nn.Module):
    """Attention with a soft cap, as it is written in models."""

    def __init__(self, width: int = 64, heads: int = 4, cap: float = 50.0) -> None:
        super().__init__()
        self.heads, self.cap = heads, cap
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        scores = torch.tanh(scores / self.cap) * self.cap
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~past, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model = GemmaAttention().eval().requires_grad_(False)
    x = torch.randn(2, 150, 64)
    program = torch.export.export(model, (x,))

    print("before:\n")
    report = attnpass.audit(program)
    print(report)
    assert report.replaced == 0
    assert report.sites[0].reason is not None
    assert report.sites[0].reason.code == "no_kernel"

    attnpass.register_kernel(Capped())

    print("\nafter:\n")
    rewritten, report = attnpass.rewrite(program)
    print(report)
    assert [site.kernel for site in report.sites] == ["capped"]
    error = (rewritten.module()(x) - model(x)).abs().max().item()
    print(f"\nlargest error against eager {error:.1e}")
    assert error < 1e-5

    # The kernel has no backward, so a program that may be trained does not get it.
    trained = attnpass.audit(torch.export.export(GemmaAttention().train(), (x,)))
    capped = next(verdict for verdict in trained.sites[0].verdicts if verdict.kernel == "capped")
    print("with trainable weights:", "; ".join(refusal.text for refusal in capped.refusals))
    assert trained.replaced == 0


if __name__ == "__main__":
    main()
