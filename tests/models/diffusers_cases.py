"""diffusers models with the vanilla attention processor: baddbmm, softmax, bmm over merged batch and heads.

Models whose attention exists only as a call of scaled_dot_product_attention (Flux, SD3 and later ones) have no
hand-written form and are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.case import Case, Inputs, noise, redraw
from tests.models.torchvision_stub import ensure

BATCH = 3
_BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}


def _vanilla(model: nn.Module) -> nn.Module:
    """Set the processor of every attention module to its hand-written form."""
    from diffusers.models import attention_processor as p

    plain = {p.AttnProcessor2_0: p.AttnProcessor, p.AttnAddedKVProcessor2_0: p.AttnAddedKVProcessor}
    for module in model.modules():
        if isinstance(module, p.Attention) and type(module.processor) in plain:
            module.set_processor(plain[type(module.processor)]())
    return model


def _step() -> Tensor:
    return torch.tensor([3, 50, 400])


def _keep(length: int) -> Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    mask[0, -2:] = False
    mask[1, -3:] = False
    return mask


def unet_condition(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.UNet2DConditionModel(
        sample_size=8, **_BLOCKS, cross_attention_dim=24, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    inputs = {"encoder_hidden_states": noise(BATCH, 7, 24), "encoder_attention_mask": _keep(7)}
    return model, {"sample": noise(BATCH, 4, 10, 6), "timestep": _step()} | inputs


def unet_condition_sdxl(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.UNet2DConditionModel(
        sample_size=8, **_BLOCKS, cross_attention_dim=24, attention_head_dim=(2, 4), use_linear_projection=True,
        transformer_layers_per_block=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), upcast_attention=True,
    )  # fmt: skip
    return model, {"sample": noise(BATCH, 4, 10, 6), "timestep": _step(), "encoder_hidden_states": noise(BATCH, 7, 24)}


def unet_condition_sliced(d: Any) -> tuple[nn.Module, Inputs]:
    model, inputs = unet_condition(d)
    del inputs["encoder_attention_mask"]
    model.set_attention_slice("max")
    return model, inputs


def unet_added_kv(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.UNet2DConditionModel(
        sample_size=8, **_BLOCKS, cross_attention_dim=24, attention_head_dim=8,
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, {"sample": noise(BATCH, 4, 8, 8), "timestep": _step(), "encoder_hidden_states": noise(BATCH, 7, 24)}


def unet_2d(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.UNet2DModel(
        sample_size=8, **_BLOCKS, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": noise(BATCH, 3, 8, 8), "timestep": _step()}


def unet_3d(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.UNet3DConditionModel(
        sample_size=8, **_BLOCKS, cross_attention_dim=24, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    sample = noise(BATCH, 4, 5, 8, 8)
    return model, {"sample": sample, "timestep": _step(), "encoder_hidden_states": noise(BATCH, 7, 24)}


def unet_motion(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.UNetMotionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24,
        motion_num_attention_heads=4, num_attention_heads=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip
    model.set_attn_processor(d.models.attention_processor.AttnProcessor())
    sample = noise(BATCH, 4, 5, 8, 8)
    return model, {"sample": sample, "timestep": _step(), "encoder_hidden_states": noise(BATCH * 5, 7, 24)}


def dit(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=6,
        norm_num_groups=4, num_embeds_ada_norm=500,
    )  # fmt: skip
    labels = torch.tensor([1, 2, 3])
    return model, {"hidden_states": noise(BATCH, 4, 6, 6), "timestep": _step(), "class_labels": labels}


def pixart(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=6,
        norm_num_groups=4, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip
    text = {"encoder_hidden_states": noise(BATCH, 7, 24), "encoder_attention_mask": _keep(7)}
    sample = {"hidden_states": noise(BATCH, 4, 6, 6), "timestep": _step()}
    return model, sample | text | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def transformer_2d(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.Transformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=32, num_layers=2, cross_attention_dim=24,
        norm_num_groups=4, attention_bias=True,
    )  # fmt: skip
    return model, {"hidden_states": noise(BATCH, 32, 5, 3), "encoder_hidden_states": noise(BATCH, 7, 24)}


def prior(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.PriorTransformer(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=7,
        additional_embeddings=4,
    )  # fmt: skip
    text = {"encoder_hidden_states": noise(BATCH, 7, 16), "attention_mask": _keep(7)}
    return model, {"hidden_states": noise(BATCH, 16), "timestep": 5, "proj_embedding": noise(BATCH, 16)} | text


def uvit(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.UVit2DModel(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, in_channels=16, block_out_channels=16,
        intermediate_size=64, cond_embed_dim=16, micro_cond_encode_dim=8, micro_cond_embed_dim=40,
        encoder_hidden_size=24, vocab_size=30, codebook_size=24, sample_size=5, block_num_heads=4,
        downsample=False, upsample=False,
    )  # fmt: skip
    ids = torch.randint(0, 24, (BATCH, 5, 5), generator=torch.Generator().manual_seed(0))
    text = {"encoder_hidden_states": noise(BATCH, 7, 24), "pooled_text_emb": noise(BATCH, 16)}
    return model, {"input_ids": ids, "micro_conds": torch.arange(15.0).view(BATCH, 5)} | text


def latte(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.LatteTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=6,
        patch_size=2, cross_attention_dim=32, caption_channels=24, norm_type="ada_norm_single",
        num_embeds_ada_norm=1000, video_length=5, attention_bias=True, norm_elementwise_affine=False,
    )  # fmt: skip
    text = {"encoder_hidden_states": noise(BATCH, 7, 24)}
    return model, {"hidden_states": noise(BATCH, 4, 5, 6, 6), "timestep": _step()} | text


def vae(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, {"sample": noise(BATCH, 3, 14, 10)}


def vq(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.VQModel(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, num_vq_embeddings=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, {"sample": noise(BATCH, 3, 14, 10)}


def controlnet(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.ControlNetModel(
        **_BLOCKS, cross_attention_dim=24, attention_head_dim=4, conditioning_embedding_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    )  # fmt: skip
    inputs = {"encoder_hidden_states": noise(BATCH, 7, 24), "controlnet_cond": noise(BATCH, 3, 16, 16)}
    return model, {"sample": noise(BATCH, 4, 8, 8), "timestep": _step()} | inputs


def t5_film(d: Any) -> tuple[nn.Module, Inputs]:
    model = d.T5FilmDecoder(
        input_dims=8, targets_length=9, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, dropout_rate=0.0
    )
    encoded = [(noise(BATCH, 7, 32), _keep(7).long())]
    args = {"encodings_and_masks": encoded, "decoder_input_tokens": noise(BATCH, 9, 8)}
    return model, args | {"decoder_noise_time": torch.tensor([0.1, 0.5, 0.9])}


_BUILDERS: tuple[Callable[[Any], tuple[nn.Module, Inputs]], ...] = (
    unet_condition, unet_condition_sdxl, unet_condition_sliced, unet_added_kv, unet_2d, unet_3d, unet_motion,
    dit, pixart, transformer_2d, prior, uvit, latte, vae, vq, controlnet, t5_film,
)  # fmt: skip


def _case(builder: Callable[[Any], tuple[nn.Module, Inputs]]) -> Case:
    def build() -> tuple[nn.Module, Inputs]:
        ensure()
        import diffusers

        torch.manual_seed(0)
        model, inputs = builder(diffusers)
        return redraw(_vanilla(model.eval())), inputs

    return Case(suite="diffusers", name=builder.__name__, build=build)


def cases() -> list[Case]:
    """All models."""
    return [_case(builder) for builder in _BUILDERS]
