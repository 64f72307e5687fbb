"""timm models with fused attention switched off: the hand-written branch of each attention class."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from tests.models.case import Case, Inputs, noise, redraw
from tests.models.torchvision_stub import ensure

_VIT: dict[str, Any] = {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_WINDOW: dict[str, Any] = {"img_size": 40, "patch_size": 4, "window_size": 5}
_SWIN: dict[str, Any] = _WINDOW | {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
_MAXVIT: dict[str, Any] = {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1), "block_type": ("M", "M")}

# name: size of the picture, arguments
_TABLE: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (40, _VIT | {"qk_norm": True}),
    "vit_relpos_small_patch16_224": (40, _VIT),
    "vit_relpos_small_patch16_rpn_224": (40, _VIT),
    "vit_srelpos_small_patch16_224": (40, _VIT),
    "vit_pe_core_tiny_patch16_384": (40, _VIT),
    "vit_base_patch16_rope_224": (40, _VIT),
    "vit_base_patch16_rope_mixed_224": (40, _VIT),
    "flexivit_small": (40, _VIT),
    "naflexvit_base_patch16_map": (32, {"embed_dim": 32, "depth": 2, "num_heads": 4}),
    "deit_tiny_distilled_patch16_224": (40, _VIT),
    "deit3_small_patch16_224": (40, _VIT),
    "beit_base_patch16_224": (40, _VIT),
    "beitv2_base_patch16_224": (40, _VIT),
    "beit3_base_patch16_224": (40, _VIT),
    "eva02_tiny_patch14_224": (40, _VIT),
    "cait_xxs24_224": (40, _VIT),
    "xcit_nano_12_p16_224": (48, {"img_size": 48, "embed_dim": 32, "depth": 2, "num_heads": 4}),
    "convit_tiny": (40, _VIT | {"local_up_to_layer": 1}),
    "samvit_base_patch16": (40, _VIT | {"window_size": 3, "global_attn_indexes": (1,)}),
    "swin_tiny_patch4_window7_224": (40, _SWIN),
    "swinv2_tiny_window8_256": (40, _SWIN),
    "swinv2_cr_tiny_224": (40, _SWIN),
    "maxvit_pico_rw_256": (64, _MAXVIT),
    "maxvit_rmlp_pico_rw_256": (64, _MAXVIT),
    "coatnet_pico_rw_224": (64, {"img_size": 64}),
    "coatnet_rmlp_nano_rw_224": (64, {"img_size": 64}),
    "levit_128s": (64, {"img_size": 64}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "twins_svt_small": (64, {"img_size": 64, "depths": (2, 2, 1, 1)}),
    "twins_pcpvt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "pvt_v2_b0": (56, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (64, {"img_size": 64}),
    "volo_d1_224": (64, {"img_size": 64}),
    "crossvit_tiny_240": (240, {}),
    "visformer_tiny": (64, {"img_size": 64, "depth": (1, 1, 1)}),
    "pit_ti_224": (64, {"img_size": 64, "depth": (1, 1, 1)}),
    "tnt_s_patch16_224": (48, {"img_size": 48, "depth": 2}),
    "coat_tiny": (64, {"img_size": 64, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),
    "edgenext_xx_small": (64, {}),
    "gcvit_xxtiny": (64, {"img_size": 64}),
    "nest_tiny": (64, {"img_size": 64}),
    "tiny_vit_5m_224": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "hiera_tiny_224": (64, {"img_size": (64, 64), "stages": (1, 1), "q_pool": 1, "mask_unit_size": (4, 4)}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1)}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (64, {"img_size": 64}),
    "shvit_s1": (64, {}),
    "swiftformer_xs": (64, {}),
    "nextvit_small": (64, {}),
    "vitamin_small_224": (64, {"img_size": 64, "depth": 2}),
    "caformer_s18": (64, {}),
    "bat_resnext26ts": (256, {}),
    "botnet26t_256": (64, {"img_size": 64}),
    "halonet26t": (256, {}),
    "lambda_resnet26t": (64, {}),
    "iformer_t": (64, {}),
    "resnet50_clip": (64, {}),
    "mobilenetv4_hybrid_medium": (64, {}),
    "qwen3_vit_88m": (64, {"embed_dim": 32, "depth": 2, "num_heads": 4}),
    "gemma4_vit_167m": (64, {"embed_dim": 32, "depth": 2, "num_heads": 4}),
}


def _build(name: str) -> tuple[nn.Module, Inputs]:
    ensure()
    import timm
    import torch
    from timm.layers import set_fused_attn

    set_fused_attn(False)
    torch.manual_seed(0)
    size, arguments = _TABLE[name]
    classes = {} if name in {"samvit_base_patch16"} else {"num_classes": 5}
    model = redraw(timm.create_model(name, pretrained=False, **classes, **arguments).eval())
    return model, {"*": (noise(3, 3, size, size),)}


def cases() -> list[Case]:
    """All models, in the order of the table."""
    return [Case(suite="timm", name=name, build=functools.partial(_build, name)) for name in _TABLE]
