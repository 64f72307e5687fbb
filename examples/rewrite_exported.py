"""Rewrite an exported program before deployment, save it, and load it where attnpass is not needed.

    model -> torch.export -> attnpass.rewrite -> program.pt2 -> torch.export.load, in another process

Run it: python examples/rewrite_exported.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import attnpass


class CrossAttention(nn.Module):
    """Queries look at a memory whose padding is masked; written by hand, as models do."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor, is_padding: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(memory)), self.split(self.v(memory))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(is_padding[:, None, None, :], torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1)
        return self.out(torch.einsum("bhqk,bhkd->bhqd", weights, v).transpose(1, 2).flatten(2))


IN_ANOTHER_PROCESS = """
import sys, torch
program, inputs, output = sys.argv[1:]
result = torch.export.load(program).module()(*torch.load(inputs))
assert "attnpass" not in sys.modules
torch.save(result, output)
"""


def main() -> None:
    torch.manual_seed(0)
    model = CrossAttention().eval()
    lengths = torch.tensor([60, 33, 41])
    args = (torch.randn(3, 48, 128), torch.randn(3, 60, 128), torch.arange(60) >= lengths[:, None])

    batch, queries, keys = torch.export.Dim("batch"), torch.export.Dim("queries"), torch.export.Dim("keys")
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch, 1: keys})
    program = torch.export.export(model, args, dynamic_shapes=shapes)

    rewritten, report = attnpass.rewrite(program)
    print(report)
    assert report.replaced == len(report.sites) == 1
    assert "softmax" in str(program.graph), "the original stays as it was"
    assert "softmax" not in str(rewritten.graph)
    assert "scaled_dot_product_attention" in str(rewritten.graph)

    # other sizes than those exported with: the program stays dynamic
    other = (torch.randn(2, 7, 128), torch.randn(2, 90, 128), torch.arange(90) >= torch.tensor([[90], [17]]))
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("program.pt2", "inputs.pt", "output.pt")]
        torch.export.save(rewritten, paths[0])
        torch.save(other, paths[1])
        subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, *paths], check=True)
        error = (torch.load(paths[2]) - model(*other)).abs().max().item()
    print(f"\nloaded in another process, without attnpass, at other sizes: largest error against eager {error:.1e}")
    assert error < 1e-5


if __name__ == "__main__":
    main()
