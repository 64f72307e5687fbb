"""Tables of spellings that :mod:`tests.fuzz.source` chooses from; masks and biases have a file of their own."""

from __future__ import annotations

from dataclasses import dataclass

HEADER = """\
import math

import torch
import torch.nn.functional as F
from torch import nn
"""


@dataclass(frozen=True)
class Layout:
    """How inputs come: their dimensions by name, and what makes q, k and v of them."""

    inputs: dict[str, str]
    lines: tuple[str, ...] = ()
    qkv: tuple[str, str, str] = ("bhqd", "bhkd", "bhke")  # the order of their dimensions then


LAYOUTS = {
    "bhsd": Layout({"q": "B H Q D", "k": "B G K D", "v": "B G K E"}),
    "bshd": Layout(
        {"q": "B Q H D", "k": "B K G D", "v": "B K G E"},
        ("q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.permute(0, 2, 1, 3)",),
    ),
    "bshd, as it is": Layout({"q": "B Q H D", "k": "B K G D", "v": "B K G E"}, qkv=("bqhd", "bkhd", "bkhe")),
    "merged heads": Layout(
        {"q": "B Q HD", "k": "B K GD", "v": "B K GE"},
        (
            "q = q.view(B, Q, H, D).transpose(1, 2)",
            "k = k.unflatten(-1, (G, D)).transpose(1, 2)",
            "v = v.reshape(B, K, G, E).permute(0, 2, 1, 3)",
        ),
    ),
    "merged": Layout({"q": "BH Q D", "k": "BH K D", "v": "BH K E"}, qkv=("nqd", "nkd", "nke")),
    "k transposed": Layout({"q": "B H Q D", "k": "B G D K", "v": "B G K E"}, ("k = k.transpose(2, 3)",)),
    "packed": Layout({"x": "B K 3HD"}, ("q, k, v = x.view(B, K, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)",)),
    "packed, chunks": Layout(
        {"x": "B K 3HD"}, ("q, k, v = (t.view(B, K, H, D).transpose(1, 2) for t in x.chunk(3, dim=-1))",)
    ),
    "linear": Layout(
        {"x": "B Q 16", "y": "B K 16"},
        (
            "q = self.to_q(x).view(B, Q, H, D).transpose(1, 2)",
            "k = self.to_k(y).view(B, K, G, D).transpose(1, 2)",
            "v = self.to_v(y).view(B, K, G, E).transpose(1, 2)",
        ),
    ),
}

SCALES = {
    "mul": "{x} = {x} * {c}",
    "rmul": "{x} = {c} * {x}",
    "torch.mul": "{x} = torch.mul({x}, {c})",
    "div": "{x} = {x} / {inverse}",
    "torch.div": "{x} = torch.div({x}, {inverse})",
    "sqrt of the width": "{x} = {x} / math.sqrt({width})",
    "power of the width": "{x} = {x} * {width} ** -0.5",
    "divided by a power": "{x} = {x} / ({width} ** 0.5)",
    "tensor": "{x} = {x} * torch.tensor({c}, dtype={x}.dtype, device=dev)",
    "full": "{x} = {x} * torch.full((), {c}, dtype={x}.dtype, device=dev)",
    "sqrt of a tensor": "{x} = {x} / torch.sqrt(torch.tensor({square}, dtype={x}.dtype, device=dev))",
    "twice": "{x} = {x} * 2.0 * {half}",
    "negated": "{x} = -({x} * -{c})",
    "buffer": "{x} = {x} * self.scale.to({x}.dtype)",
    "parameter": "{x} = {x} * self.gain.to({x}.dtype)",
    "divided by a parameter": "{x} = {x} / self.gain.to({x}.dtype)",
    "mul_": "{x}.mul_({c})",
    "div_": "{x} /= {inverse}",
    "for each head": "{x} = {x} * {head}.to({x}.dtype)",
}
IN_PLACE = {"mul_", "div_"}
TENSOR_SCALES = {"tensor", "sqrt of a tensor"}  # export lifts them out of the code, which is not always undone
MODULE_SCALES = {"buffer", "parameter", "divided by a parameter", "for each head"}

SOFTMAX = {
    "F.softmax": ["p = F.softmax(s, dim={d})"],
    "torch.softmax": ["p = torch.softmax(s, {d})"],
    "method": ["p = s.softmax({d})"],
    "positive dim": ["p = s.softmax(dim={positive})"],
    "module": ["p = self.softmax(s)"],
    "dtype=float32": ["p = F.softmax(s, dim={d}, dtype=torch.float32)"],
    "of a float": ["p = torch.softmax(s.float(), dim={d})"],
    "less its maximum": ["p = (s - s.amax({d}, keepdim=True)).softmax({d})"],
    "less max().values": ["s = s - s.max(dim={d}, keepdim=True).values", "p = s.softmax({d})"],
    "by hand": ["e = torch.exp(s - s.max(dim={d}, keepdim=True)[0])", "p = e / e.sum(dim={d}, keepdim=True)"],
    "by hand, detached": ["e = (s - s.amax({d}, keepdim=True).detach()).exp()", "p = e / e.sum({d}, True)"],
    "by hand, no maximum": ["e = s.exp()", "p = e / e.sum({d}, keepdim=True)"],
    "log-sum-exp": ["p = torch.exp(s - torch.logsumexp(s, {d}, keepdim=True))"],
    "log_softmax": ["p = F.log_softmax(s, dim={d}).exp()"],
    "clamped": [
        "s = torch.max(s, torch.tensor(torch.finfo(s.dtype).min, dtype=s.dtype, device=dev))",
        "p = s.softmax({d})",
    ],
}
SINKS = {
    "last": ("s = torch.cat([s, {sink}], dim=-1)", "p = p[..., :-1]"),
    "first": ("s = torch.cat((({sink}), s), dim=3)", "p = p[..., 1:]"),
    "sliced": ("s = torch.cat([s, {sink}], -1)", "p = p[:, :, :, :K]"),
}
DROPOUT = {
    "evaluation": "p = F.dropout(p, 0.3, training=self.training)",
    "module": "p = self.dropout(p)",
    "p of zero": "p = F.dropout(p, p=0.0)",
    "live": "p = F.dropout(p, 0.3)",
}


@dataclass(frozen=True)
class Input:
    """One input: its dimensions by name, and how it is made from a generator `g`."""

    name: str
    dims: tuple[str, ...]
    make: str = "noise({dims})"
    grad: bool = False


_SEEN = "torch.rand({dims}, generator=g) < 0.6"
EXTRA_INPUTS = {
    "ids": Input("ids", ("B", "K"), "torch.randint(0, 2, ({dims}), generator=g).sort(-1).values"),
    "pad": Input("pad", ("B", "K"), "padding(torch.rand(B, K, generator=g) < 0.6)"),
    "lengths": Input("lengths", ("B",), "torch.randint({least}, K + 1, (B,), generator=g)"),
    "given": Input("given", ("B", "1", "Q", "K"), f"padding({_SEEN})"),
    "given_heads": Input("given_heads", ("1", "H", "Q", "K"), f"padding({_SEEN})"),
    "relative": Input("relative", ("H", "Q", "K")),
    "rows": Input("rows", ("B", "1", "Q", "K")),
    "over_keys": Input("over_keys", ("B", "K")),
    "over_queries": Input("over_queries", ("B", "Q")),
    "sinks": Input("sinks", ("H",)),
}

# The scores s of q and k; an einsum is written in the program's own letters.
PRODUCTS = {
    "matmul": ["s = torch.matmul(q, k.transpose(-2, -1))"],
    "@": ["s = q @ k.mT"],
    "permuted": ["s = q.matmul(k.permute(0, 1, 3, 2))"],
    "transposed": ["s = k @ q.transpose(-1, -2)"],
    "mul and sum": ["s = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1)"],
    "bmm": ["s = torch.bmm(q.reshape(B * H, Q, D), k.reshape(B * H, K, D).transpose(1, 2))"],
    "bmm, viewed": [
        "s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))",
        "s = s.view(B, H, Q, K)",
    ],
    "baddbmm": [
        "empty = torch.empty(B * H, Q, K, dtype=q.dtype, device=dev)",
        "k = k.reshape(B * H, K, D).transpose(1, 2)",
        "s = torch.baddbmm(empty, q.reshape(B * H, Q, D), k, beta=0, alpha={alpha})",
    ],
}
VALUES = {
    "matmul": "o = torch.matmul(p, v)",
    "@": "o = p @ v",
    "transposed": "o = (v.transpose(-1, -2) @ p.mT).transpose(-1, -2)",
    "mul and sum": "o = (p.unsqueeze(-1) * v.unsqueeze(2)).sum(-2)",
    "bmm": "o = torch.bmm(p.reshape(B * H, Q, K), v.reshape(B * H, K, E)).view(B, H, Q, E)",
}
RESULTS = {
    "plain": [],
    "merged": ["o = o.transpose(1, 2).reshape(B, Q, H * E)"],
    "flatten": ["o = o.permute(0, 2, 1, 3).flatten(2)"],
    "viewed": ["o = o.transpose(1, 2).contiguous().view(B, Q, -1)"],
    "linear": ["o = self.to_out(o.transpose(1, 2).reshape(B, Q, H * E))"],
    "written": ["o.mul_(2.0)", "o += 1.0"],
    "residual": ["o = o + o.mean(-1, keepdim=True)"],
    "written through a view": ["o = o.transpose(1, 2)", "o[:, 0].zero_()"],
}

# How the mask {m} of a call is written: it stays boolean, or a number {f} is added where it is off.
CALLS = {
    "boolean": "mask = {m}",
    "boolean, whole": "mask = ({m}).expand(B, H, Q, K)",
    "added": "mask = torch.where({m}, 0.0, {f}).to(q.dtype)",
    "added, whole": "mask = torch.zeros(B, H, Q, K, dtype=q.dtype, device=dev).masked_fill(~({m}), {f})",
}
