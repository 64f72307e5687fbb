"""Whether a fused call that is there already is worth writing anew.

    the mask is gone           nothing is left of it, or the kernel knows it by a flag: no tensor is made or read
    the mask is a function     of which the kernel skips what it takes away, if that is expected to be faster
    another kernel             that has arguments for all of it, if that is expected to be faster
    another kernel             that the user has asked for by name
    heads are not repeated     k and v are read as they were before, and the kernel shares them

Nothing else counts: the same call in other words is left alone, so a rewritten graph is not rewritten again.

What a call answers for a query without any key differs between torch's own kernels where the mask is added (0, NaN or
the mean, by the number, the device and the direction). So unless it is proved that there is none, such a mask has to
stay the very tensor that it is, and the call must be one for which torch takes the same kernel as before. For a boolean
mask torch has laid it down: zeros, and no gradient (pytorch#133882). All of its kernels keep to that but cuDNN's, so a
kernel that is told what the mask means may answer so too; where torch may have taken cuDNN's, the site says so
(DEFINED, recognize/existing.py).
"""

from __future__ import annotations

from torch.fx import Node

from attnpass.cost import called_us
from attnpass.graph import is_one, same, tensor
from attnpass.kernels import Kernel
from attnpass.kernels.native import Native
from attnpass.names import NATIVE
from attnpass.prove import Proved
from attnpass.recognize.ops import bound
from attnpass.site import Site
from attnpass.spec import AttentionSpec, EmptyRow


def gained(proved: Proved, kernel: Kernel, *, named: bool = False) -> bool:
    """This kernel in place of the call reads less than the call does, and answers the same; `named`: what it reads
    does not matter, because the user has asked for it.
    """
    site = proved.site
    if site.obstacles or (site.causal and not kernel.can.causal):
        return False
    spec, args = site.spec, bound(site.anchor)
    mask = args["attn_mask"]
    sure = site.rows is EmptyRow.IMPOSSIBLE
    # what is expressed leaves every query a key or is a boolean mask (prove.py): then such rows are answered (emit.py)
    if kernel.takes == "functions":
        return mask is not None and proved.expressed and (named or (proved.structured and _faster(kernel, spec)))
    if kernel.takes == "forms":
        return proved.expressed and (named or _faster(kernel, spec))
    if mask is not None and (proved.unmasked or (kernel.can.causal and proved.causal)):
        return sure
    # the mask goes to the kernel as it is: not in a narrower dtype, nor q, k and v in a wider one
    if not all(bias.exact for bias in spec.bias) or not (sure or _same_kernel(site, kernel)):
        return False
    if named and kernel.name != NATIVE:  # which is what the call is already
        return True
    repeated = site.k.node is not args["key"] or site.v.node is not args["value"]
    return repeated and kernel.shares_heads(spec)


def _faster(kernel: Kernel, spec: AttentionSpec) -> bool:
    here, there = called_us(spec), kernel.cost(spec)
    return here is not None and there is not None and there < here


def _same_kernel(site: Site, kernel: Kernel) -> bool:
    """Torch takes its fused kernel for the CPU now, and will again: those are its conditions."""
    args = bound(site.anchor)
    given = [tensor(args[name]) for name in ("query", "key", "value")]
    mask = args["attn_mask"]
    assert isinstance(mask, Node)
    read = tensor(mask)
    q, k, v = (t for t in given if t is not None)
    return (
        type(kernel) is Native
        and site.spec.device == "cpu"
        and site.dropout == 0.0
        and all(t.dim() == 4 and is_one(t.stride(-1)) for t in (q, k, v))
        and all(same(a, b) for t in (k, v) for a, b in ((t.shape[0], q.shape[0]), (t.shape[3], q.shape[3])))
        and same(k.shape[1], v.shape[1])
        and (bool(args["enable_gqa"]) or same(k.shape[1], q.shape[1]))
        and read is not None
        and read.dim() in (2, 4)
        and not mask.meta.get("attnpass_grad", False)
    )
