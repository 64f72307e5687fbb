"""A program's Python source: a module `Attention`, and `inputs(B, Q, K, device)`, with which it runs.

    take apart   the inputs become q, k, v of (batch, heads, length, width)
    heads        shared key/value heads are repeated, or the product is written over groups
    product      q and k become scores; `order` says what each of their dimensions is
    steps        scales, masks, biases, casts, a soft cap, in the order they were drawn
    softmax      over the keys, perhaps beside a sink
    values       the product with v, and the form of the result

From the product to the values it may also be one call of scaled_dot_product_attention.

Orders of dimensions: b batch, h heads, q queries, k keys, d e widths; n batch and heads in one; g r heads in two.
"""

from __future__ import annotations

from tests.fuzz import masks
from tests.fuzz.damages import DAMAGES
from tests.fuzz.programs import Bias, Cap, Floor, Mask, Number, Program, Scale, ToFloat
from tests.fuzz.spelled import (
    CALLS,
    DROPOUT,
    EXTRA_INPUTS,
    HEADER,
    LAYOUTS,
    PRODUCTS,
    RESULTS,
    SCALES,
    SINKS,
    SOFTMAX,
    VALUES,
    Input,
)


class Source:
    """Writes one program."""

    def __init__(self, program: Program) -> None:
        self.p = program
        self.lines: list[str] = []
        self.inputs: list[Input] = []
        self.members: dict[str, str] = {}
        self.order = ""  # of the scores
        self.qkv = ("bhqd", "bhkd", "bhke")
        self.wide = False  # scores are float32 whatever q is

    def text(self) -> str:
        """The whole file but for what runs it."""
        self._take_apart()
        self._damage("operands")
        self._scale("q", self.p.q_scale)
        self._scale("k", self.p.k_scale)
        self._heads()
        if self.p.called is None:
            self._by_hand()
        else:
            self._call()
        self._result()
        return "\n".join([HEADER, "", *self._module(), "", "", *self._inputs()]) + "\n"

    def _by_hand(self) -> None:
        self._product()
        self._damage("scores")
        for step in self.p.steps:
            self._step(step)
        self._damage("before softmax")
        self._softmax()
        self._damage("probabilities")
        self._values()

    # -- the parts of the file ----------------------------------------------------------------------------------------
    def _module(self) -> list[str]:
        lines = ["class Attention(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.members.values()]
        names = ", ".join(i.name for i in self.inputs)
        lines += ["", f"    def forward(self, {names}):"]
        body = self._sizes() + self.lines
        if self.p.autocast:
            body = [*self._sizes(), "with torch.autocast(dev.type, dtype=torch.bfloat16):", *_in(self.lines)]
        return lines + _in(_in(body))

    def _sizes(self) -> list[str]:
        p, s = self.p, self.p.shape
        first = self.inputs[0].name
        fixed = [
            f"dev = {first}.device",
            f"H, G, R, D, E = {s.heads}, {s.kv_heads}, {s.groups}, {s.width}, {s.v_width}",
        ]
        if p.literal:
            return [*fixed, f"B, Q, K = {s.batch}, {s.queries}, {s.keys}", "O = K - Q"]
        found = {}
        for name in "BQK":
            if name == "B" and p.layout == "merged":
                found["B"] = "q.shape[0] // H"
                continue
            if name == "Q" and p.layout.startswith("packed"):
                found["Q"] = found.get("K", "x.shape[1]")
                continue
            of = next((i, i.dims.index(name)) for i in self.inputs if name in i.dims)
            found[name] = f"{of[0].name}.shape[{of[1]}]"
        return [*fixed, f"B, Q, K = {found['B']}, {found['Q']}, {found['K']}", "O = K - Q"]

    def _inputs(self) -> list[str]:
        p, s = self.p, self.p.shape
        dtype = f"torch.{p.dtype}"
        lines = [
            f'def inputs(B={s.batch}, Q={s.queries}, K={s.keys}, device="cpu"):',
            f"    H, G, R, D, E = {s.heads}, {s.kv_heads}, {s.groups}, {s.width}, {s.v_width}",
            f"    g = torch.Generator().manual_seed({p.seed})",
            "",
            "    def noise(*shape):",
            f"        return torch.randn(shape, generator=g).to({dtype})",
            "",
            "    def padding(keep):",
            *([] if p.empty else ["        keep[..., 0] = True"]),
            "        return keep",
            "",
            "    made = (",
        ]
        for i in self.inputs:
            made = i.make.format(dims=", ".join(i.dims), least=0 if p.empty else 1)
            grad = ".requires_grad_()" if i.grad and p.grad else ""
            lines.append(f"        ({made}).to(device){grad},  # {i.name}")
        dims = [f"    ({', '.join(repr(d) for d in i.dims)},)," for i in self.inputs]
        return [*lines, "    )", "    return made", "", "", "DIMS = (", *dims, ")"]

    def _need(self, name: str | None) -> None:
        """An input or member that the text reads."""
        s = self.p.shape
        members = {
            "causal_buffer": f'self.register_buffer("causal", torch.tril(torch.ones(1, 1, {_L}, {_L})))',
            "slopes": f'self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, {s.heads + 1}))',
            "table": f"self.table = nn.Embedding(7, {s.heads})",
            "scale": f'self.register_buffer("scale", torch.tensor({self._value("buffer")}))',
            "gain": f"self.gain = nn.Parameter(torch.tensor({self._gain()}))",
            "head_gain": f"self.head_gain = nn.Parameter(torch.linspace(0.2, 0.4, {s.heads}))",
            "softmax": "self.softmax = nn.Softmax(dim={})",
            "dropout": "self.dropout = nn.Dropout(0.3)",
        }
        if name in members:
            self.members.setdefault(name, members[name])
        elif name is not None and all(i.name != name for i in self.inputs):
            self.inputs.append(EXTRA_INPUTS[name])

    def _value(self, form: str) -> float:
        scales = (self.p.q_scale, self.p.k_scale, *self.p.steps)
        return next((x.value for x in scales if isinstance(x, Scale) and x.form == form), 0.3)

    def _gain(self) -> float:
        """A temperature that divides is above one."""
        scales = (self.p.q_scale, self.p.k_scale, *self.p.steps)
        divides = any(isinstance(x, Scale) and x.form == "divided by a parameter" for x in scales)
        return 3.0 if divides else self._value("parameter")

    def _say(self, *lines: str) -> None:
        self.lines.extend(lines)

    # -- inputs -------------------------------------------------------------------------------------------------------
    def _take_apart(self) -> None:
        p, s = self.p, self.p.shape
        layout = LAYOUTS[p.layout]
        sizes = {
            "HD": s.heads * s.width,
            "GD": s.kv_heads * s.width,
            "GE": s.kv_heads * s.v_width,
            "3HD": 3 * s.heads * s.width,
            "BH": s.batch * s.heads,
        }
        for name, dims in layout.inputs.items():
            self.inputs.append(Input(name, tuple(str(sizes.get(dim, dim)) for dim in dims.split()), grad=True))
        self._say(*layout.lines)
        self.qkv = layout.qkv
        if p.layout == "linear":
            for name, width in (("q", sizes["HD"]), ("k", sizes["GD"]), ("v", sizes["GE"])):
                bias = name != "k"
                self.members[f"to_{name}"] = (
                    f"self.to_{name} = nn.Linear(16, {width}, bias={bias}, dtype=torch.{p.dtype})"
                )
        if "clones" in p.extras or (p.damage and DAMAGES[p.damage].clones):
            self._say("q, k, v = q.clone(), k.clone(), v.clone()")

    def _heads(self) -> None:
        form = self.p.heads
        if form == "repeat_kv":
            for x, width in (("k", "D"), ("v", "E")):
                self._say(f"{x} = {x}[:, :, None, :, :].expand(B, G, R, K, {width}).reshape(B, H, K, {width})")
        elif form == "repeat_interleave":
            self._say("k, v = k.repeat_interleave(R, dim=1), torch.repeat_interleave(v, R, 1)")
        elif form == "expand and flatten":
            self._say("k, v = (t.unsqueeze(2).expand(-1, -1, R, -1, -1).flatten(1, 2) for t in (k, v))")
        elif form == "stack":
            self._say("k, v = (torch.stack([t] * R, dim=2).flatten(1, 2) for t in (k, v))")
        elif form == "repeat":  # head h reads h % G: other groups than all others make
            self._say("k, v = k.repeat(1, R, 1, 1), v.repeat(1, R, 1, 1)")
        elif form in ("groups", "groups, einsum"):
            self._say("q = q.unflatten(1, (G, R))" if self.p.literal else "q = q.reshape(B, G, R, Q, D)")
        elif form == "folded":
            self._say("q = q.reshape(B, G, R * Q, D)")
        else:
            assert form in ("none", "broadcast", "gqa")

    def _scale(self, x: str, scale: Scale | None) -> None:
        if scale is None:
            return
        self._need({"buffer": "scale", "for each head": "head_gain"}.get(scale.form))
        if scale.form in ("parameter", "divided by a parameter"):
            self._need("gain")
        c = scale.value
        head = "self.head_gain[:G]" if x == "k" else "self.head_gain"
        if x == "s" and self.order != "nqk":
            head = self._like_scores(f"{head}.view(1, H, 1, 1)", two=False)
        elif x == "s" or self.qkv[0] == "nqd":
            head = f"{head}.repeat(B).view(-1, 1, 1)"
        else:
            head = f"{head}[:, None]" if self.qkv[0][1] != "h" else f"{head}[:, None, None]"
        text = SCALES[scale.form].format(
            x=x,
            c=c,
            inverse=round(1 / c, 4),
            square=round(1 / c**2, 4),
            half=c / 2,
            width="D" if x == "s" else f"{x}.shape[-1]",
            head=head,
        )
        self._say(text)

    # -- scores -------------------------------------------------------------------------------------------------------
    def _product(self) -> None:
        p = self.p
        if p.upcast:
            self._say("q, k = q.float(), k.to(torch.float32)")
            self.wide = True
        how = [line.format(alpha=p.product_scale) for line in PRODUCTS.get(p.product, ())]
        if p.product == "einsum":
            how = [f"s = torch.einsum('{self._letters(self.qkv[0], self.qkv[1], p.order)}', q, k)"]
        self.order = {"transposed": "bhkq", "bmm": "nqk", "baddbmm": "nqk", "einsum": p.order}.get(p.product, "bhqk")
        if self.qkv[0] == "nqd":
            how = [line.replace("q.reshape(B * H, Q, D)", "q").replace("k.reshape(B * H, K, D)", "k") for line in how]
            self.order = "nqk"
        if p.heads == "groups":
            how, self.order = ["s = q @ k[:, :, None].transpose(-1, -2)"], "bgrqk"
        elif p.heads == "groups, einsum":
            how, self.order = [f"s = torch.einsum('{self._letters('bgrqd', 'bgkd', 'bgrqk')}', q, k)"], "bgrqk"
        elif p.heads == "folded":
            how, self.order = ["s = (q @ k.transpose(-1, -2)).view(B, H, Q, K)"], "bhqk"
        self._say(*how)

    def _letters(self, a: str, b: str, c: str) -> str:
        """An equation in the program's own letters."""
        own = dict(zip("bhqkde", self.p.letters, strict=True)) | {"g": self.p.letters[1], "r": "z", "n": "y"}
        return "{},{}->{}".format(*("".join(own[x] for x in dims) for dims in (a, b, c)))

    def _like_scores(self, x: str, *, two: bool) -> str:
        """A tensor over (q, k), or over (b, h, q, k) with sizes of one, against the scores."""
        order = self.order
        if order == "bhqk" or (two and order.endswith("qk")):
            return x
        if two and order.endswith("kq"):
            return f"({x}).transpose(0, 1)"
        if two:
            x = f"({x})[None, None]"
        if order == "nqk":
            return f"({x}).expand(B, H, Q, K).reshape(B * H, Q, K)"
        if order == "bgrqk":
            return f"({x}).expand(-1, H, -1, -1).unflatten(1, (G, R))"
        return f"({x}).permute({', '.join(str('bhqk'.index(c)) for c in order)})"

    def _step(self, step: object) -> None:
        p = self.p
        if isinstance(step, Scale):
            self._scale("s", step)
        elif isinstance(step, Cap):
            self._say(f"s = torch.tanh(s / {step.value}) * {step.value}")
            self._damage("after the cap")
        elif isinstance(step, Floor):
            self._say(masks.FLOORS[step.form].format(s="s"))
        elif isinstance(step, Number):
            self._say(f"s = s + {step.value!r}")
        elif isinstance(step, ToFloat):
            self._say("s = s.float()")
            self.wide = True
        elif isinstance(step, Bias):
            spelled = masks.BIASES[step.kind]
            self._need(spelled.needs)
            self._say(f"bias = {self._like_scores(spelled.text, two=spelled.two)}")
            self._say(masks.ADD[step.form].format(s="s", b="bias.to(s.dtype)"))
        else:
            assert isinstance(step, Mask)
            spelled = masks.keeps(step.kind, step.spelling)
            self._need(spelled.needs)
            self._say(f"keep = {self._like_scores(spelled.text, two=spelled.two)}")
            if p.damage and DAMAGES[p.damage].at == "mask":
                self._damage("mask")
            fill = masks.FILLS[step.fill].format(s="s")
            if p.dtype == "float16" and step.fill == "half of min":
                fill = "-32752.0"  # which swallows no score: it must not become another number in float64
            self._say(*masks.APPLY[step.apply].format(s="s", m="keep", f=fill).splitlines())

    def _call(self) -> None:
        p = self.p
        assert p.called is not None
        seen: list[str] = []
        for mask in p.masks:
            spelled = masks.keeps(mask.kind, mask.spelling)
            self._need(spelled.needs)
            seen.append(f"({spelled.text})")
        given = "None"
        if seen:
            given, fill = "mask", masks.FILLS[p.masks[0].fill].format(s="q")
            self._say(CALLS[p.called].format(m=" & ".join(seen), f=fill))
        for bias in p.biases:
            spelled = masks.BIASES[bias.kind]
            self._need(spelled.needs)
            added = f"({spelled.text}).to(q.dtype)"
            self._say(f"mask = mask + {added}" if given == "mask" else f"mask = {added}")
            given = "mask"
        grouped = ", enable_gqa=True" if p.heads == "gqa" else ""
        self._say(f"o = F.scaled_dot_product_attention(q, k, v, {given}, scale={p.product_scale}{grouped})")

    # -- softmax and values -------------------------------------------------------------------------------------------
    def _softmax(self) -> None:
        p = self.p
        at = self.order.index("k")
        if p.sink is not None:
            self._need("sinks")
            before, after = SINKS[p.sink]
            self._say(before.format(sink="sinks.to(s.dtype).view(1, H, 1, 1).expand(B, H, Q, 1)"))
        if p.softmax == "module":
            self._need("softmax")
            self.members["softmax"] = f"self.softmax = nn.Softmax(dim={at})"
        changed = p.damage and DAMAGES[p.damage].at == "softmax"
        lines = DAMAGES[p.damage or ""].lines if changed else SOFTMAX[p.softmax]
        self._say(*(line.format(d=at - len(self.order), positive=at) for line in lines))
        if p.sink is not None:
            self._say(after)
        if "float" in p.softmax or self.wide:
            self._say("p = p.to(v.dtype)")
        elif "type_as" in p.extras:
            self._say("p = p.type_as(v)")
        if "dead average" in p.extras:
            self._say("average = p.mean(1)")
        if p.dropout is not None:
            if p.dropout == "module":
                self._need("dropout")
            self._say(DROPOUT[p.dropout])

    def _values(self) -> None:
        p, order, v = self.p, self.order, self.qkv[2]
        if p.heads == "folded":
            self._say("o = (p.reshape(B, G, R * Q, K) @ v).view(B, H, Q, E)")
        elif order == "bgrqk":
            self._say(
                f"o = torch.einsum('{self._letters('bgrqk', 'bgke', 'bgrqe')}', p, v)"
                if p.heads == "groups, einsum"
                else "o = p @ v.unsqueeze(2)",
                "o = o.reshape(B, H, Q, E)",
            )
        elif order == "nqk":
            three = v if v == "nke" else "v.reshape(B * H, K, E)"
            self._say(f"o = torch.bmm(p, {'v' if v == 'nke' else three})", "o = o.view(B, H, Q, E)")
        elif order == "bhkq" and p.product == "transposed":
            self._say("o = p.transpose(-1, -2) @ v" if p.pv == "matmul" else "o = (v.mT @ p).transpose(-1, -2)")
        elif order != "bhqk" or v != "bhke" or p.pv == "einsum":
            self._say(f"o = torch.einsum('{self._letters(order, v, 'bhqe')}', p, v)")
        else:
            self._say(VALUES[p.pv])

    def _result(self) -> None:
        p = self.p
        self._damage("result")
        if p.out == "linear":
            width = p.shape.heads * p.shape.v_width
            self.members["to_out"] = f"self.to_out = nn.Linear({width}, 8, dtype=torch.{p.dtype})"
        self._say(*RESULTS[p.out])
        if "operands written afterwards" in p.extras:
            self._say("q.zero_()", "v.mul_(2.0)")
        returned = ["o"]
        if p.damage and DAMAGES[p.damage].returns:
            returned.append(DAMAGES[p.damage].returns)
        if "scores are measured" in p.extras:
            returned.append("torch.ones_like(s).sum()")
        self._say(f"return {', '.join(returned)}")

    def _damage(self, point: str) -> None:
        if self.p.damage and DAMAGES[self.p.damage].at == point:
            self._say(*DAMAGES[self.p.damage].lines)


_L = masks.LONGEST


def _in(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def source(program: Program) -> str:
    """The Python source of a program."""
    return Source(program).text()
