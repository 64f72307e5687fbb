"""torch's and torchvision's own modules, on the paths that do not call the fused function by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.case import Case, Inputs, noise, redraw
from tests.models.torchvision_stub import ensure

BATCH, LENGTH, WIDTH, HEADS = 3, 11, 32, 4


def _padding() -> Tensor:
    """True where a key is switched off."""
    off = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    off[0, :2] = True
    off[1, -3:] = True
    return off


class _Attend(nn.Module):
    """nn.MultiheadAttention asked for its weights, which are then dropped."""

    def __init__(self, attention: nn.MultiheadAttention, **kwargs: Any) -> None:
        super().__init__()
        self.attention = attention
        self.kwargs = {"need_weights": True} | kwargs

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Tensor) -> Tensor:
        return self.attention(q, k, v, **self.kwargs, **kwargs)[0]


class _AttendAndReturn(_Attend):
    """The same with the averaged weights returned."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Tensor) -> Any:
        return self.attention(q, k, v, **self.kwargs, **kwargs)


def _qkv(lead: tuple[int, ...] = (BATCH,)) -> Inputs:
    return {"*": (noise(*lead, LENGTH, WIDTH), noise(*lead, 9, WIDTH, seed=5), noise(*lead, 9, WIDTH, seed=6))}


def mha_need_weights() -> tuple[nn.Module, Inputs]:
    return _Attend(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)), _qkv()


def mha_weights_returned() -> tuple[nn.Module, Inputs]:
    return _AttendAndReturn(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)), _qkv()


def mha_without_weights() -> tuple[nn.Module, Inputs]:
    return _Attend(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), need_weights=False), _qkv()


def mha_masked() -> tuple[nn.Module, Inputs]:
    x = noise(BATCH, LENGTH, WIDTH)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -3:] = True
    masks = {"attn_mask": torch.ones(LENGTH, LENGTH).triu(1).bool(), "key_padding_mask": padding}
    return _Attend(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)), {"*": (x, x, x)} | masks


def mha_empty_rows() -> tuple[nn.Module, Inputs]:
    model, inputs = mha_masked()
    return model, inputs | {"key_padding_mask": _padding()}


def mha_float_mask() -> tuple[nn.Module, Inputs]:
    x = noise(BATCH, LENGTH, WIDTH)
    mask = {"attn_mask": noise(BATCH * HEADS, LENGTH, LENGTH)}
    return _Attend(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)), {"*": (x, x, x)} | mask


def mha_sequence_first() -> tuple[nn.Module, Inputs]:
    x = noise(LENGTH, BATCH, WIDTH)
    return _Attend(nn.MultiheadAttention(WIDTH, HEADS)), {"*": (x, x, x), "key_padding_mask": _padding()}


def mha_bias_kv_zero_attention() -> tuple[nn.Module, Inputs]:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    return _Attend(attention), _qkv()


def mha_unlike_inputs() -> tuple[nn.Module, Inputs]:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, kdim=20, vdim=24)
    inputs = (noise(BATCH, LENGTH, WIDTH), noise(BATCH, 9, 20), noise(BATCH, 9, 24))
    return _Attend(attention), {"*": inputs}


def mha_unbatched() -> tuple[nn.Module, Inputs]:
    return _Attend(nn.MultiheadAttention(WIDTH, HEADS)), _qkv(())


def transformer() -> tuple[nn.Module, Inputs]:
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 48, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    return model, {
        "*": (noise(BATCH, LENGTH, WIDTH), noise(BATCH, 7, WIDTH)),
        "tgt_mask": causal,
        "tgt_is_causal": True,
    }


def transformer_encoder() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, {"*": (noise(BATCH, LENGTH, WIDTH),), "src_key_padding_mask": _padding()}


def transformer_decoder_causal() -> tuple[nn.Module, Inputs]:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 48), 2)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    return model, {"*": (noise(LENGTH, BATCH, WIDTH), noise(9, BATCH, WIDTH)), "tgt_mask": mask, "tgt_is_causal": True}


def torchvision_vit() -> tuple[nn.Module, Inputs]:
    ensure()
    from torchvision.models import VisionTransformer

    model = VisionTransformer(image_size=40, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48)
    return model, {"*": (noise(BATCH, 3, 40, 40),)}


def torchvision_swin() -> tuple[nn.Module, Inputs]:
    ensure()
    from torchvision.models import SwinTransformer

    model = SwinTransformer([4, 4], 16, [2, 2], [2, 4], [3, 3], stochastic_depth_prob=0.0)
    return model, {"*": (noise(BATCH, 3, 40, 40),)}


def torchvision_swin_v2() -> tuple[nn.Module, Inputs]:
    ensure()
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    model = SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [3, 3], stochastic_depth_prob=0.0,
        block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip
    return model, {"*": (noise(BATCH, 3, 40, 40),)}


def torchvision_maxvit() -> tuple[nn.Module, Inputs]:
    ensure()
    from torchvision.models import MaxVit

    model = MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=2, block_channels=[16, 32], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.0,
    )  # fmt: skip
    return model, {"*": (noise(BATCH, 3, 32, 32),)}


_BUILDERS: tuple[Callable[[], tuple[nn.Module, Inputs]], ...] = (
    mha_need_weights, mha_weights_returned, mha_without_weights, mha_masked, mha_empty_rows, mha_float_mask,
    mha_sequence_first, mha_bias_kv_zero_attention, mha_unlike_inputs, mha_unbatched, transformer, transformer_encoder,
    transformer_decoder_causal, torchvision_vit, torchvision_swin, torchvision_swin_v2, torchvision_maxvit,
)  # fmt: skip


def _case(builder: Callable[[], tuple[nn.Module, Inputs]]) -> Case:
    def build() -> tuple[nn.Module, Inputs]:
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path is one opaque call in evaluation mode
        torch.manual_seed(0)
        model, inputs = builder()
        return redraw(model.eval()), inputs

    # a query without keys is NaN, and so is every gradient: nothing to compare
    return Case(suite="torch", name=builder.__name__, build=build, grad=builder is not mha_empty_rows)


def cases() -> list[Case]:
    """All models."""
    return [_case(builder) for builder in _BUILDERS]
