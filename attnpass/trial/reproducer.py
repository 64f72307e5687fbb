"""One site as a file that runs without its model, and shows what its replacement does.

    the site's two graphs, and the original in float64, as code ── the values that it was tried on ── show() ── errors

The file needs torch and attnpass. Small values are in the file itself, larger ones beside it; they are read with
``weights_only=True``. Both files are written beside their places and moved there.
"""

from __future__ import annotations

import base64
import io
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from attnpass.errors import AttnpassError
from attnpass.graph import where
from attnpass.ledger import Trial
from attnpass.trial import inputs
from attnpass.trial.compare import gap, largest
from attnpass.trial.examine import outcome, share_of, trained, widened
from attnpass.trial.inputs import Given, copied
from attnpass.trial.pair import Built, Pair

_INSIDE = 100_000  # bytes of values that the file itself may hold
_TEMPLATE = '''"""{title}

    {place}
    {code}
    kernel {kernel}, {inputs} inputs, torch {torch}, attnpass {attnpass}

Runs the original operations of this site and what attnpass put in their place, and holds both to float64.
Exit status: 1 while the replacement is worse than the original, 0 when it is not.
"""

import sys

{imports}
from attnpass.trial import reproducer

{needs}
{original}


{replacement}


{exact}


VALUES = reproducer.values({values})

if __name__ == "__main__":
    sys.exit(
        reproducer.show(
            Original(),
            Replacement(),
            Exact(),
            VALUES,
            reads={reads!r},
            trained={trained!r},
            share={share!r},
            rows={rows!r},
            state={state!r},
            compiled={compiled!r},
        )
    )
'''


@dataclass(frozen=True)
class Reproducer:
    """A file that is not written yet."""

    text: str  # with a place for the values
    values: bytes
    worse: bool  # the replacement was worse when it was made

    def write(self, path: str) -> None:
        """Both files are replaced whole or not at all."""
        packed = base64.b85encode(zlib.compress(self.values)).decode()
        beside = Path(path).with_suffix(".pt")
        if len(packed) > _INSIDE:
            _move(self.values, beside)
            said = f"beside={beside.name!r}, of=__file__"
        else:
            lines = "\n".join(f'    "{packed[at : at + 100]}"' for at in range(0, len(packed), 100))
            said = f"inside=(\n{lines}\n)"
        _move(self.text.replace("<VALUES>", said).encode(), Path(path))


def _move(content: bytes, path: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=path.resolve().parent, prefix=".attnpass-") as folder:
            written = Path(folder, path.name)
            written.write_bytes(content)
            os.replace(written, path)
    except OSError as error:
        raise AttnpassError(f"{path} cannot be written: {error.strerror}") from error


def reproducer(built: Built, pair: Pair, given: Given, trials: Sequence[Trial], *, compiled: str = "") -> Reproducer:
    """The file for one site and one set of values; `compiled`: "replacement" or "both" are to be compiled first."""
    import attnpass

    place = where(pair.site.anchor)
    names = {node: f"x{i}" for i, node in enumerate(pair.leaves)}
    held = {names[node]: copied(given.values[node]) for node in pair.leaves}
    buffer = io.BytesIO()
    torch.save({name: x.cpu() if isinstance(x, Tensor) else x for name, x in held.items()}, buffer)
    modules = {"Original": pair.original.module, "Replacement": pair.replacement.module, "Exact": pair.exact}
    codes = {name: _code(module, name) for name, module in modules.items()}
    used = {key: obj for _, found in codes.values() for key, obj in found.items()}
    state = pair.site.state
    dtype = pair.site.output.meta["val"].dtype
    text = _TEMPLATE.format(
        title=f"The attention of {place.module or place.cls or 'a function'}.",
        place=f"{place.file}:{place.line}" if place.file else "",
        code=place.code or "",
        kernel=pair.kernel.name,
        inputs=given.kind,
        torch=torch.__version__,
        attnpass=attnpass.__version__,
        imports="\n".join(sorted(_imports(used, pair), key=lambda line: (line.startswith("from attnpass"), line))),
        needs=_needs(pair),
        original=codes["Original"][0],
        replacement=codes["Replacement"][0],
        exact=codes["Exact"][0],
        values="<VALUES>",
        reads={
            "original": [names[node] for node in pair.original.reads],
            "replacement": [names[node] for node in pair.replacement.reads],
        },
        trained=[names[node] for node in trained(pair, given)],
        share=share_of(pair, given, dtype),
        rows=given.kind != inputs.HUGE,
        state=[(device, str(kind).removeprefix("torch."), on) for device, kind, on in state.autocast],
        compiled=compiled or ("replacement" if pair.kernel.takes == "functions" else ""),
    )
    return Reproducer(text, buffer.getvalue(), any(t.worse for t in trials))


def _imports(used: Mapping[str, Any], pair: Pair) -> set[str]:
    lines = {"import torch"}
    for name, held in used.items():
        if name == "torch":
            continue
        module, own = getattr(held, "__module__", None), getattr(held, "__qualname__", None)
        if isinstance(held, float):
            lines.add(f"from math import {name}")
        elif module and own and "." not in own:
            lines.add(f"from {module} import {own}" + (f" as {name}" if own != name else ""))
    made_by = type(pair.kernel).__module__
    if not made_by.startswith("attnpass.") and _calls_others(pair):
        lines.add(f"import {made_by}  # the kernel's own operations")
    return lines


def _needs(pair: Pair) -> str:
    """The line that registers operations of ours; they are not registered by an import."""
    targets = (node.target for node in pair.replacement.module.graph.nodes)
    ours = sorted({t._schema.name.removeprefix("attnpass::") for t in targets if _is_ours(t)})
    return f"reproducer.needs({', '.join(map(repr, ours))})\n\n" if ours else ""


def _traced(module: nn.Module) -> GraphModule:
    """As a graph again, for inductor; so are the functions that it passes on."""
    for name, child in list(module.named_children()):
        setattr(module, name, _traced(child))
    return torch.fx.symbolic_trace(module)


def _is_ours(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "attnpass"


def _calls_others(pair: Pair) -> bool:
    targets = (node.target for node in pair.replacement.module.graph.nodes)
    return any(
        isinstance(t, torch._ops.OpOverload) and t.namespace not in ("aten", "prims", "attnpass") for t in targets
    )


def _code(module: GraphModule, name: str) -> tuple[str, dict[str, Any]]:
    """A class with the code of a graph, those of the functions that it passes on before it, and the names it uses."""
    written = module.graph.python_code("self")
    found = {key: obj for key, obj in written.globals.items() if re.search(rf"\b{re.escape(key)}\b", written.src)}
    parts: list[str] = []
    makes: list[str] = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            inner = getattr(module, str(node.target))
            code, more = _code(inner, f"{name}_{node.target}")
            parts.append(code)
            found |= more
            makes.append(f"        self.{node.target} = {name}_{node.target}()")
    body = "\n".join("    " + line if line.strip() else "" for line in written.src.strip().splitlines())
    init = "    def __init__(self):\n        super().__init__()\n" + "\n".join(makes) + "\n\n" if makes else ""
    parts.append(f"class {name}(torch.nn.Module):\n{init}{body}")
    return "\n\n\n".join(parts), found


# -- what the file calls -----------------------------------------------------------------------------------------------


def needs(*names: str) -> None:
    """Register the operations of ours that these names belong to."""
    from attnpass.kernels import flash_base, flash_ops, kernels, ops, sage_ops

    if "apart" in names:
        ops.apart()
    if any(name.startswith("sage") for name in names):
        for form in sage_ops.FORMS:
            sage_ops.operation(form)
    for kernel in kernels():
        if isinstance(kernel, flash_base.FlashKernel) and kernel.vendor.name in names:
            flash_ops.define(kernel.vendor)


def values(*, inside: str = "", beside: str = "", of: str = "") -> dict[str, Any]:
    """What was written with the file."""
    if inside:
        source: Any = io.BytesIO(zlib.decompress(base64.b85decode(inside)))
    else:
        source = os.path.join(os.path.dirname(os.path.abspath(of)), beside)
    found: dict[str, Any] = torch.load(source, weights_only=True)
    return found


def show(
    original: nn.Module,
    replacement: nn.Module,
    exact: nn.Module,
    held: Mapping[str, Any],
    *,
    reads: Mapping[str, Sequence[str]],
    trained: Sequence[str],
    share: float,
    rows: bool,
    state: Sequence[tuple[str, str, bool]] = (),
    compiled: str = "",
) -> int:
    """Run all three and print their errors; 1 where the replacement is worse."""
    from attnpass.graph import State

    def ran(module: nn.Module, names: Sequence[str], wide: bool) -> tuple[Tensor, list[Tensor]]:
        fresh = {name: copied(x, grad=name in trained) for name, x in held.items()}
        if wide:
            fresh = {name: widened(x) for name, x in fresh.items()}
        entered = State(autocast=() if wide else tuple((d, getattr(torch, k), on) for d, k, on in state))
        args = [fresh[name] for name in names]
        call: Callable[..., Any] = module
        with entered.entered():
            if (module is replacement and compiled) or (module is original and compiled == "both"):
                with torch.set_grad_enabled(bool(trained)):
                    call = torch._inductor.compile(_traced(module), args)
            return outcome(call, args, [fresh[name] for name in trained])

    true, true_grads = ran(exact, reads["original"], True)
    plain, plain_grads = ran(original, reads["original"], False)
    mine, mine_grads = ran(replacement, reads["replacement"], False)
    found = {"result": gap(mine, plain, true, share=share, size=largest(true), rows=rows)}
    size = largest(*true_grads)
    for name, *grads in zip(trained, mine_grads, plain_grads, true_grads, strict=False):
        found[f"gradient of {name}"] = gap(*grads, share=share, size=size, hideable=True)
    worse = False
    print(f"{'':16}  {'original':>10}  {'replacement':>11}  {'allowed':>10}   error against float64")
    for name, one in found.items():
        if one is not None:
            worse |= one.worse
            mark = "   <- worse" if one.worse else ""
            print(f"{name:16}  {one.original:10.2e}  {one.replacement:11.2e}  {one.allowed:10.2e}{mark}")
    print("the replacement is worse than the original" if worse else "no difference beyond rounding")
    return int(worse)
