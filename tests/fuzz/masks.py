# ruff: noqa: E501, E741  (one spelling a line reads better than a wrapped one; i and j are what they are called)
"""Keep-masks and biases as source text. Names in scope: B, H, Q, K (sizes), O = K - Q, and what `needs` asks for.

Each mask is an expression of four dimensions, of size one where it says nothing; `two` ones are written over (Q, K) and
get the others by ``[None, None]`` where the scores need them. True: the key is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 16  # the side of masks in buffers


@dataclass(frozen=True)
class Spelled:
    """One spelling: the expression, over how many dimensions it is, and which inputs it reads."""

    text: str
    two: bool = True
    needs: str | None = None


def _two(*texts: str) -> tuple[Spelled, ...]:
    return tuple(Spelled(text) for text in texts)


def _four(needs: str | None, *texts: str) -> tuple[Spelled, ...]:
    return tuple(Spelled(text, two=False, needs=needs) for text in texts)


I, J = "torch.arange(Q, device=dev)[:, None]", "torch.arange(K, device=dev)[None]"
ONES = "torch.ones(Q, K, dtype=torch.bool, device=dev)"

KEEP: dict[str, tuple[Spelled, ...]] = {
    "nothing": _two(ONES, f"{J} >= 0", f"({I} >= 0).expand(Q, K)", "torch.zeros(Q, K, device=dev) == 0"),
    "causal": (
        *_two(
            f"{J} <= {I} + O",
            f"{I} + O >= {J}",
            f"{ONES}.tril(O)",
            "torch.tril(torch.ones(Q, K, device=dev), diagonal=O).bool()",
            "~torch.triu(torch.ones(Q, K, device=dev), diagonal=1 + O).bool()",
            "torch.triu(torch.ones(Q, K, device=dev), 1 + O) == 0",
            f"~({J} > {I} + O)",
            f"({J} - {I} - O) <= 0",
            "torch.full((Q, K), float('-inf'), device=dev).triu(1 + O) == 0",
            "torch.ones(K, K, device=dev).tril()[O:, :] != 0",
        ),
        Spelled("self.causal[:, :, O:K, :K] != 0", two=False, needs="causal_buffer"),
        Spelled("self.causal[:, :, O:O + Q, :K].bool()", two=False, needs="causal_buffer"),
    ),
    "causal from the top left": _two(
        f"{J} <= {I}",
        f"{ONES}.tril()",
        "torch.tril(torch.ones(Q, K, device=dev)) > 0",
        f"~{ONES}.triu(1)",
    ),
    "causal, strict": _two(f"({J} < {I} + O) | ({J} == 0)", f"{ONES}.tril(O - 1) | ({J} < 1)"),
    "causal, one ahead": _two(f"{J} <= {I} + O + 1", f"{ONES}.tril(O + 1)", f"{J} < {I} + O + 2"),
    "some queries": _two(f"({I} >= 2).expand(Q, K)", f"{I}.expand(Q, K) > 0"),
    "no key": _two(f"~{ONES}", f"({J} < 0).expand(Q, K)"),
    "window": _two(
        f"({J} <= {I} + O) & ({J} > {I} + O - 3)",
        f"{ONES}.tril(O) & {ONES}.triu(O - 2)",
        f"({I} + O - {J} >= 0) & ({I} + O - {J} < 3)",
        f"{ONES}.tril(O) ^ {ONES}.tril(O - 3)",
        f"~({ONES}.triu(O + 1) | {ONES}.tril(O - 3))",
    ),
    "two-sided": _two(
        f"({I} + O - {J}).abs() <= 2",
        f"({J} >= {I} + O - 2) & ({J} <= {I} + O + 2)",
        f"{ONES}.tril(O + 2).triu(O - 2)",
    ),
    "prefix": _two(
        f"({J} <= {I} + O) | ({J} < 2)",
        f"{ONES}.tril(O) | (torch.arange(K, device=dev) < 2)",
        f"~(({J} > {I} + O) & ({J} >= 2))",
    ),
    "chunk": _two(
        f"({I} + O) // 3 == {J} // 3",
        f"torch.div({I} + O, 3, rounding_mode='floor') == torch.div({J}, 3, rounding_mode='floor')",
    ),
    "document": _four(
        "ids",
        "ids[:, None, O:, None] == ids[:, None, None, :]",
        "ids[:, O:].unsqueeze(1).unsqueeze(3) == ids.unsqueeze(1).unsqueeze(2)",
        "(ids[:, None, O:, None] - ids[:, None, None, :]).eq(0)",
    ),
    "padding": _four(
        "pad",
        "pad[:, None, None, :]",
        "pad[:, None, None, :] != 0",
        "(pad > 0).unsqueeze(1).unsqueeze(2)",
        "pad.view(B, 1, 1, K).bool()",
        "pad[:, None, None, :].expand(B, 1, Q, K) == True",
    ),
    "lengths": _four("lengths", f"({J} < lengths[:, None])[:, None, None, :]"),
    "given": _four("given", "given", "given != False", "given == 1"),
    "given for heads": _four("given_heads", "given_heads", "given_heads[:, :, :Q]"),
}  # fmt: skip


def keeps(kind: str, spelling: int) -> Spelled:
    """One spelling of a mask, whatever its number."""
    return KEEP[kind][spelling % len(KEEP[kind])]


FILLS = {
    "-inf": "float('-inf')",
    "min": "torch.finfo({s}.dtype).min",
    "min of q": "torch.finfo(q.dtype).min",
    "half of min": "torch.finfo({s}.dtype).min / 2",
    "-1e9": "-1e9",
    "-1e32": "-1e32",
    "-10000": "-10000.0",
}

# How a keep-mask {m} (four or two dimensions) meets the scores {s}; {f} is the fill.
APPLY = {
    "masked_fill": "{s} = {s}.masked_fill(~{m}, {f})",
    "masked_fill == 0": "{s} = {s}.masked_fill({m} == 0, {f})",
    "masked_fill logical_not": "{s} = {s}.masked_fill(torch.logical_not({m}), {f})",
    "masked_fill in place": "{s}.masked_fill_(~{m}, {f})",
    "where": "{s} = torch.where({m}, {s}, {f})",
    "where, off": "{s} = torch.where(~{m}, {f}, {s})",
    "where with a tensor": "{s} = torch.where({m}, {s}, torch.full([], {f}, dtype={s}.dtype, device=dev))",
    "where with full_like": "{s} = torch.where({m}, {s}, torch.full_like({s}, {f}))",
    "add where": "{s} = {s} + torch.where({m}, 0.0, {f}).to({s}.dtype)",
    "add where, commuted": "{s} = torch.where({m}, 0.0, {f}).to({s}.dtype) + {s}",
    "add where, in float32": "{s} = ({s} + torch.where({m}, 0.0, {f})).to({s}.dtype)",
    "sub where": "{s} = {s} - torch.where({m}, 0.0, -({f})).to({s}.dtype)",
    "add in place": "{s} += torch.zeros_like({m}, dtype={s}.dtype).masked_fill(~{m}, {f})",
    "add masked zeros": "{s} = {s} + torch.zeros({m}.shape, dtype={s}.dtype, device=dev).masked_fill(~{m}, {f})",
    "add (1 - m) * fill": "{s} = {s} + (1.0 - {m}.to({s}.dtype)) * {f}",
    "sub (1 - m) * -fill": "{s} = {s} - (1.0 - {m}.to({s}.dtype)) * -({f})",
    "multiplied": "seen = {m}.to({s}.dtype)\n{s} = {s} * seen + {f} * (1 - seen)",
    "multiplied, cast twice": "{s} = {s} * {m}.to({s}.dtype) + {f} * (1 - {m}.to({s}.dtype))",
    "boolean index": "{s}[~{m}.expand({s}.shape)] = {f}",
    "by ones_like": "{s} = {s}.masked_fill(torch.ones_like({s}, dtype=torch.bool) & ~{m}, {f})",
}
TIMES_FILL = {
    "add (1 - m) * fill",
    "sub (1 - m) * -fill",
    "multiplied",
    "multiplied, cast twice",
}  # with -inf they give NaN

FLOORS = {
    "clamp_min": "{s} = {s}.clamp_min(torch.finfo({s}.dtype).min)",
    "clamp": "{s} = torch.clamp({s}, min=torch.finfo({s}.dtype).min)",
    "in place": "{s}.clamp_(min=torch.finfo({s}.dtype).min)",
}

# Biases: the expression over (.., H, Q, K) and the input it needs; in scope also {s}.
BIASES: dict[str, Spelled] = {
    "relative": Spelled("relative[None]", two=False, needs="relative"),
    "relative for each row": Spelled("rows", two=False, needs="rows"),
    "over keys": Spelled("over_keys[:, None, None, :]", two=False, needs="over_keys"),
    "over queries": Spelled("over_queries[:, None, :, None]", two=False, needs="over_queries"),
    "alibi": Spelled(f"(2.0 ** -torch.arange(1, H + 1, device=dev).float()).view(1, H, 1, 1) * ({J} - {I} - O)", two=False),
    "alibi of a buffer": Spelled(f"self.slopes.view(1, H, 1, 1) * ({J} - {I} - O)", two=False, needs="slopes"),
    "distance": Spelled(f"-0.1 * ({I} + O - {J}).abs().float()"),
    "table": Spelled(f"self.table(({J} - {I} - O).clamp(-3, 3) + 3).permute(2, 0, 1)[None]", two=False, needs="table"),
    "number": Spelled("torch.full((Q, K), 0.5, device=dev)"),
}  # fmt: skip
ADD = {
    "add": "{s} = {s} + {b}",
    "commuted": "{s} = {b} + {s}",
    "in place": "{s} += {b}",
    "torch.add": "{s} = torch.add({s}, {b}, alpha=0.5)",
    "sub": "{s} = {s} - {b}",
}
