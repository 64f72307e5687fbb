"""What kernels are called: here, and in the libraries that users come from.

    diffusers          _flash_3                       ──┐
    transformers       flash_attention_3              ──┼──  flash_3
    DiffSynth-Studio   flash_attention_3              ──┘

Case, dashes and leading underscores make no difference. A name stands for a function, not for where it was loaded from:
diffusers' ``flash_hub`` is flash-attn from the Hub, here it is flash-attn as it is installed. Only ``flash_3_hub`` is a
kernel of its own, because it is there where FlashAttention-3 is not installed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from attnpass.errors import AttnpassError

KEEP = "keep"  # in the place of a kernel: leave the site as it is
NATIVE = "native"  # what torch's scaled_dot_product_attention does by itself

CANONICAL = (
    NATIVE,
    "native_math",
    "native_flash",
    "native_efficient",
    "native_cudnn",
    "native_varlen",
    "native_npu",
    "native_xla",
    "flex",
    "flash",
    "flash_varlen",
    "flash_3",
    "flash_varlen_3",
    "flash_3_hub",
    "flash_4",
    "flash_varlen_4",
    "sage",
    "sage_varlen",
    "sage_qk_int8_pv_fp16_triton",
    "sage_qk_int8_pv_fp16_cuda",
    "sage_qk_int8_pv_fp8_cuda",
    "sage_qk_int8_pv_fp8_cuda_sm90",
    "xformers",
    "aiter",
)
"""The kernels of this package, whether they are registered or not."""

ALIASES = {
    # diffusers, beyond its names that differ from ours by an underscore
    "flash_hub": "flash",
    "flash_varlen_hub": "flash_varlen",
    "flash_3_varlen_hub": "flash_varlen_3",
    "flash_4_hub": "flash_4",
    "sage_hub": "sage",
    "sage_blackwell_hub": "sage",  # sageattention takes what the GPU has
    "aiter_fa2_hub": "aiter",
    # transformers
    "eager": KEEP,
    "sdpa": NATIVE,
    "flex_attention": "flex",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash_3",
    "flash_attention_4": "flash_4",
    "kernels_community/flash_attn2": "flash",
    "kernels_community/flash_attn3": "flash_3_hub",
    "kernels_community/vllm_flash_attn3": "flash_3_hub",
    "kernels_community/flash_attn4": "flash_4",
    # DiffSynth-Studio, whose flash_attention_* are those of transformers
    "sage_attention": "sage",
    "torch": NATIVE,
}


def canonical(name: str, registered: Iterable[str] = ()) -> str:
    """The name by which a kernel goes here; `registered` are further kernels. An unknown name is an error."""
    others = {plain(other): other for other in registered}
    known = {**dict.fromkeys((*CANONICAL, KEEP)), **ALIASES, **others}
    wanted = plain(name)
    if wanted in known:
        return known[wanted] or wanted
    near = difflib.get_close_matches(wanted, known, n=4)
    among = near or (*CANONICAL, *others.values(), KEEP)
    raise AttnpassError(f"there is no kernel {name!r}; {'near are' if near else 'known are'} {', '.join(among)}")


def plain(name: str) -> str:
    """A name without what makes no difference."""
    return name.strip().lower().replace("-", "_").lstrip("_")
