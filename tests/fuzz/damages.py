# ruff: noqa: E501  (one damage a line reads better than a wrapped one)
"""Ways of breaking an attention program. Whether the pass still replaces it does not matter: the result must be right.

Some leave attention that is merely another one (other masks, heads in another order); most leave something that only
looks like it. All are written on scores over (batch, heads, queries, keys), so a damaged program has that order.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Damage:
    """Where lines go, and what they need."""

    at: str  # operands, scores, after the cap, mask, before softmax, softmax, probabilities, result
    lines: tuple[str, ...]
    equal: tuple[str, ...] = ()  # sizes that have to be equal: pairs such as "QK", "BH", "HQ", "DK"
    clones: bool = False  # q, k and v are written, so they are the program's own
    no_grad: bool = False  # autograd refuses what it writes
    returns: str = ""


def _d(at: str, *lines: str, **options: object) -> Damage:
    return Damage(at, lines, **options)  # type: ignore[arg-type]


_NEG = "float('-inf')"
DAMAGES: dict[str, Damage] = {
    # -- axes
    "k is reshaped, not transposed": _d("operands", "k = k.reshape(B, k.shape[1], D, K).transpose(-1, -2)"),
    "v is reshaped into itself": _d("operands", "v = v.reshape(B, v.shape[1], E, K).mT"),
    "batch and heads of q exchanged": _d("operands", "q = q.transpose(0, 1)", equal=("BH",)),
    "heads and queries of q exchanged": _d("operands", "q = q.transpose(1, 2)", equal=("HQ",)),
    "keys and width of k exchanged": _d("operands", "k = k.transpose(2, 3)", equal=("DK",)),
    "heads and keys of v exchanged": _d("operands", "v = v.transpose(1, 2)", equal=("GK",)),
    "heads of k turned round": _d("operands", "k = k.flip(1)"),
    "keys of v shifted": _d("operands", "v = v.roll(1, 2)"),
    "queries reversed": _d("operands", "q = q.flip(2)"),
    "q and k in each other's place": _d("operands", "q, k = k, q", equal=("QK", "GH")),
    "v is k": _d("operands", "v = k", equal=("DE",)),
    "k is q": _d("operands", "k = q", equal=("QK", "GH")),
    "scores transposed": _d("scores", "s = s.mT", equal=("QK",)),
    "scores reshaped into other axes": _d("scores", "s = s.reshape(B, H, K, Q).transpose(-1, -2)"),
    "heads and queries of the scores exchanged": _d("scores", "s = s.transpose(1, 2)", equal=("HQ",)),
    "heads and batch viewed as each other": _d("scores", "s = s.reshape(H, B, Q, K).transpose(0, 1)"),
    "scores shifted along the keys": _d("scores", "s = s.roll(1, -1)"),
    "heads mixed": _d("scores", "s = s + s.flip(1)"),
    "heads averaged": _d("scores", "s = s - s.mean(1, keepdim=True)"),
    "softmax over queries": _d("softmax", "p = s.softmax(-2)"),
    "softmax over heads": _d("softmax", "p = s.softmax(1)"),
    "softmax over the batch": _d("softmax", "p = F.softmax(s, dim=0)"),
    "softmax over queries and keys": _d("softmax", "p = s.flatten(2).softmax(-1).view(s.shape)"),
    "probabilities transposed": _d("probabilities", "p = p.transpose(2, 3)", equal=("QK",)),
    "heads of the probabilities turned round": _d("probabilities", "p = p.flip(1)"),
    "heads and queries of the probabilities exchanged": _d("probabilities", "p = p.transpose(1, 2)", equal=("HQ",)),
    "keys of the probabilities shifted": _d("probabilities", "p = p.roll(1, -1)"),
    # -- arithmetic on the scores
    "relu": _d("scores", "s = s.relu()"),
    "absolute scores": _d("scores", "s = s.abs()"),
    "squared scores": _d("scores", "s = s * s"),
    "clamped scores": _d("scores", "s = s.clamp(-0.5, 0.5)"),
    "clamped from below": _d("before softmax", "s = s.clamp(min=-1.0)"),
    "a tanh without a factor": _d("scores", "s = s.tanh()"),
    "a cap of two numbers": _d("scores", "s = 3.0 * torch.tanh(s / 2.0)"),
    "a negative cap": _d("scores", "s = -3.0 * torch.tanh(s / 3.0)"),
    "weights over queries and keys": _d("scores", "s = s * torch.linspace(0.1, 1, Q * K, device=dev).view(Q, K).to(s.dtype)"),
    "weights over keys": _d("scores", "s = s * torch.linspace(0.1, 1, K, device=dev).to(s.dtype)"),
    "weights over keys after the mask": _d("before softmax", "s = s * torch.linspace(0.1, 1, K, device=dev).to(s.dtype)"),
    "weights over queries": _d("scores", "s = s / torch.linspace(1, 2, Q, device=dev)[:, None].to(s.dtype)"),
    "weights over the batch": _d("scores", "s = s * torch.linspace(0.1, 1, B, device=dev).view(B, 1, 1, 1).to(s.dtype)"),
    "a second product": _d("scores", "s = s + (q * 0.5) @ (k + 1.0).mT", equal=("GH",)),
    "a second product of values": _d("scores", "s = s + 0.1 * (v @ v.mT)", equal=("QK", "GH")),
    "less the greatest over queries": _d("before softmax", "s = s - s.amax(-2, keepdim=True)"),
    "less the mean over keys": _d("scores", "s = s - s.mean(-1, keepdim=True)"),
    "plus the greatest": _d("scores", "s = s + s.amax(-1, keepdim=True)"),
    "only the two best": _d("scores", f"s = s.masked_fill(s < s.topk(2, -1).values[..., -1:], {_NEG})"),
    "sorted scores": _d("before softmax", "s = s.sort(-1).values"),
    "summed scores": _d("scores", "s = s.cumsum(-1)"),
    "NaN taken out": _d("before softmax", "s = s.nan_to_num(0.0)"),
    "no infinities": _d("before softmax", "s = s.clamp(min=torch.finfo(s.dtype).min)"),
    "scores cut off from gradients": _d("scores", "s = s.detach()"),
    "scores without gradients": _d("before softmax", "with torch.no_grad():", "    s = s * 2.0"),
    "scores rounded": _d("scores", "s = s.to(torch.bfloat16).to(s.dtype)"),
    "a large constant": _d("before softmax", "s = s + 50.0"),
    "one column is zero": _d("scores", "s = torch.cat([torch.zeros_like(s[..., :1]), s[..., 1:]], -1)"),
    # -- masks
    "mask upside down": _d("mask", "keep = ~keep"),
    "mask transposed": _d("mask", "keep = keep.transpose(-1, -2)", equal=("QK",)),
    "mask shifted": _d("mask", "keep = keep.roll(1, -1)"),
    "mask reversed": _d("mask", "keep = keep.flip(-1)"),
    "mask of another batch row": _d("mask", "keep = keep.flip(0) if keep.dim() > 2 else keep.flip(-2)"),
    "mask with one key more": _d("mask", "keep = keep | (torch.arange(K, device=dev) == K - 1)"),
    "mask with one key less": _d("mask", "keep = keep & (torch.arange(K, device=dev) != 0)"),
    "mask applied twice": _d("before softmax", f"s = s.masked_fill(torch.arange(K, device=dev) == 1, {_NEG})", f"s = s.masked_fill(torch.arange(K, device=dev) == 1, {_NEG})"),
    "lowest number added twice": _d("before softmax", "low = torch.zeros(K, device=dev, dtype=s.dtype).masked_fill(torch.arange(K, device=dev) > 2, torch.finfo(s.dtype).min)", "s = s + low", "s = s + low"),
    "mask by a product": _d("before softmax", "s = s * (torch.arange(K, device=dev) != 1).to(s.dtype)"),
    "a fill above the scores": _d("before softmax", "s = s.masked_fill(torch.arange(K, device=dev) == 1, 5.0)"),
    "a weak fill": _d("before softmax", "s = s.masked_fill(torch.arange(K, device=dev) == 1, -4.0)"),
    "mask inside a cap": _d("before softmax", "s = 3.0 * torch.tanh(s / 3.0)"),
    "mask of the scores' sign": _d("scores", f"s = s.masked_fill((s > 0) & (torch.arange(K, device=dev) > 0), {_NEG})"),
    # -- the softmax
    "sigmoid": _d("softmax", "p = s.sigmoid()"),
    "one more in the denominator": _d("softmax", "e = s.exp()", "p = e / (1.0 + e.sum(-1, keepdim=True))"),
    "sum over queries": _d("softmax", "e = s.exp()", "p = e / e.sum(-2, keepdim=True)"),
    "sum over all but one": _d("softmax", "e = s.exp()", "p = e / e[..., 1:].sum(-1, keepdim=True)"),
    "powers of two": _d("softmax", "e = torch.exp2(s)", "p = e / e.sum(-1, keepdim=True)"),
    "softmax twice": _d("softmax", "p = s.softmax(-1).softmax(-1)"),
    "softmax in bfloat16": _d("softmax", "p = s.to(torch.bfloat16).softmax(-1).to(s.dtype)"),
    "temperature of itself": _d("softmax", "p = (s / (1.0 + s.detach().abs().amax())).softmax(-1)"),
    "softplus": _d("softmax", "e = F.softplus(s)", "p = e / e.sum(-1, keepdim=True)"),
    # -- probabilities and values
    "probabilities squared": _d("probabilities", "p = p * p", "p = p / p.sum(-1, keepdim=True)"),
    "probabilities halved": _d("probabilities", "p = p * 0.5"),
    "probabilities normalised again": _d("probabilities", "p = p / (p.sum(-1, keepdim=True) + 1e-3)"),
    "probabilities masked": _d("probabilities", "p = p.masked_fill(torch.arange(K, device=dev) == 1, 0.0)"),
    "NaN of the probabilities taken out": _d("probabilities", "p = p.nan_to_num(0.0)"),
    "probabilities cut off from gradients": _d("probabilities", "p = p.detach()"),
    "complement": _d("probabilities", "p = 1.0 - p"),
    "small probabilities dropped": _d("probabilities", "p = torch.where(p > 0.2, p, 0.0)"),
    "a gate": _d("probabilities", "p = p * s.sigmoid()"),
    "difference of two maps": _d("probabilities", "p = p - 0.3 * (2.0 * s).softmax(-1)"),
    "result scaled by its log-sum-exp": _d("result", "o = o * torch.sigmoid(s.logsumexp(-1, keepdim=True))"),
    "result less a log-sum-exp": _d("result", "o = o - 0.1 * s.logsumexp(-1, keepdim=True)"),
    # -- writes
    "q written behind its product": _d("scores", "q.add_(1.0)", clones=True, no_grad=True),
    "k written behind its product": _d("scores", "k.mul_(2.0)", "s = s + k.sum() * 0", clones=True, no_grad=True),
    "v written before its product": _d("probabilities", "v.mul_(2.0)", clones=True),
    "part of v written": _d("probabilities", "v[..., 0].zero_()", clones=True),
    "part of k written before": _d("operands", "k[:, :, 0].zero_()", clones=True),
    "part of the scores written": _d("before softmax", "s = s.clone()", "s[..., 1:3] = 0.5"),
    "one column of the scores added to": _d("before softmax", "s = s.clone()", "s[..., 0].add_(1.0)"),
    "part of the scores masked": _d("before softmax", "s = s.clone()", f"s[:, :, :, 2:].masked_fill_(s[:, :, :, 2:] > 0, {_NEG})", no_grad=True),
    "scores written through a view": _d("before softmax", "s = s.clone()", "s.view(-1)[::2].mul_(2.0)"),
    "scores written behind the softmax": _d("probabilities", "s.zero_()", no_grad=True),
    "probabilities written": _d("probabilities", "p = p.clone()", "p[..., 0] = 0.0"),
    "probabilities multiplied in place": _d("probabilities", "p = p.clone()", "p.mul_(0.5)"),
    "mask written behind its use": _d("before softmax", "low = torch.zeros(K, device=dev, dtype=s.dtype)", "s = s + low", "low.fill_(1.0)", "s = s * (low.sum() / K)"),
    "scores copied over": _d("before softmax", "s = s.clone()", "s.copy_(s.flip(-1).clone())"),
    "k overwritten by the scores": _d("probabilities", "k[:, :, :, 0].copy_(p.sum((1, 2))[:, None])", clones=True, no_grad=True, returns="k"),
    # -- other readers
    "scores returned": _d("result", returns="s"),
    "probabilities returned": _d("result", returns="p"),
    "average of the probabilities returned": _d("result", returns="p.mean(1)"),
    "shape of the scores returned": _d("result", returns="torch.zeros(s.shape[-1])"),
    "the result reads the scores": _d("result", "o = o + s.mean()"),
    "live dropout whose weights are read": _d("probabilities", "p = F.dropout(p, 0.5)", returns="p.sum()"),
}  # fmt: skip
