"""Compile a model that nobody prepared with backend="attnpass", compare it with eager, and read what became of it.

Run it: python examples/quickstart.py
"""

import torch
from torch import Tensor, nn

import attnpass


class Block(nn.Module):
    """Causal attention as it stands in countless repositories; nothing here knows of attnpass."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        past = torch.tril(torch.ones(length, length, device=x.device, dtype=torch.bool))
        scores = scores.masked_fill(~past, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(128, heads=4) for _ in range(4)))
    x = torch.randn(2, 100, 128)

    # What would happen? Nothing is compiled or changed.
    audit = attnpass.audit(model, x)
    print(audit)
    assert audit.replaced == len(audit.sites) == 4

    # The one change to use it; the backend is found by its name.
    compiled = torch.compile(model, backend="attnpass")

    expected, result = model(x), compiled(x)
    error = (result - expected).abs().max().item()
    expected.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    result.square().mean().backward()
    worst = max((p.grad - gradients[name]).abs().max().item() for name, p in model.named_parameters())
    print(f"\nlargest error against eager: outputs {error:.1e}, gradients {worst:.1e}")
    assert error < 1e-5
    assert worst < 1e-5

    # What did happen, for everything compiled in this process.
    assert attnpass.report().replaced == 4


if __name__ == "__main__":
    main()
