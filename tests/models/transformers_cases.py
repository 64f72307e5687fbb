"""One transformers model per architecture, its eager attention, from a tiny configuration with every feature on.

A configuration is made of TINY, restricted to the fields it has (nested configurations likewise), and of what the
line of the table says. The kinds say what a model is fed.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from tests.models.case import Case, Inputs, noise, padded, redraw, tokens
from tests.models.torchvision_stub import ensure

HEADS, WIDTH = 4, 64
LENGTH, TARGET, BATCH = 11, 7, 3
IMAGE = 40

TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "projection_dim", "output_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "n_inner"), 96),
    **dict.fromkeys(("ffn_hidden_size", "ffn_dim", "dff", "moe_intermediate_size", "dim_ff"), 96),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), HEADS // 2),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size", "rotary_dim"), WIDTH // HEADS),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "entity_vocab_size"), 99),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("sliding_window", "window_size"), 5),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 0),
    "eos_token_id": 1,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_channels": 3,
    "use_cache": False,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "num_queries": 5,
}


def config_of(model_type: str, **changes: Any) -> Any:
    """The tiny configuration of a model type."""
    from transformers import CONFIG_MAPPING

    cls: Any = CONFIG_MAPPING[model_type]
    return cls(**_fields(cls, changes))


def _fields(cls: Any, changes: dict[str, Any]) -> dict[str, Any]:
    own = cls().to_dict()
    fields = {name: value for name, value in TINY.items() if name in own}
    for name, sub in getattr(cls, "sub_configs", {}).items():
        given = changes.get(name, {})
        if isinstance(given, dict) and sub.__name__ != "AutoConfig":
            fields[name] = _fields(sub, given)
    return fields | {name: value for name, value in changes.items() if not isinstance(fields.get(name), dict)}


# --- what models are fed -----------------------------------------------------------------------------------------


def text(model: nn.Module) -> Inputs:
    return {"input_ids": tokens(BATCH, LENGTH), "attention_mask": padded(BATCH, LENGTH)}


def text_alone(model: nn.Module) -> Inputs:
    return {"input_ids": tokens(BATCH, LENGTH)}


def text_pairs(model: nn.Module) -> Inputs:
    target = {"decoder_input_ids": tokens(BATCH, TARGET, seed=4), "decoder_attention_mask": padded(BATCH, TARGET)}
    return text(model) | target


def image(model: nn.Module) -> Inputs:
    size = getattr(model.config, "image_size", IMAGE)
    size = size if isinstance(size, int) else size[0]
    return {"pixel_values": noise(BATCH, getattr(model.config, "num_channels", 3), size, size)}


def image_and_text(model: nn.Module) -> Inputs:
    size = getattr(model.config, "vision_config", model.config).image_size
    return text(model) | {"pixel_values": noise(BATCH, 3, size, size)}


def wave(model: nn.Module) -> Inputs:
    return {"input_values": noise(BATCH, 331)}


def spectrum(model: nn.Module) -> Inputs:
    config = model.config
    features = noise(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "decoder_input_ids": tokens(BATCH, TARGET)}


def boxes(model: nn.Module) -> Inputs:
    import torch

    return text(model) | {"bbox": torch.arange(4).expand(BATCH, LENGTH, 4) * 3}


Feed = Any
_TABLE: dict[str, tuple[str, Feed, dict[str, Any], str]] = {}


def arch(name: str, feed: Feed = text, *, cls: str = "AutoModel", of: str = "", **changes: Any) -> None:
    """One line of the table; `of` is the model type where it is not the name."""
    assert name not in _TABLE, name
    _TABLE[name] = (cls, feed, changes, of or name)


def _build(name: str) -> tuple[nn.Module, Inputs]:
    import torch

    ensure()  # transformers imports torchvision where it is installed
    import transformers

    cls, feed, changes, model_type = _TABLE[name]
    torch.manual_seed(0)
    config = config_of(model_type, **changes)
    if hasattr(config, "_experts_implementation") or hasattr(config, "num_experts_per_tok"):
        config._experts_implementation = "batched_mm"  # the loop over experts depends on the data
    factory = getattr(transformers, cls)
    make = factory.from_config if cls.startswith("Auto") else factory._from_config
    model = redraw(make(config, attn_implementation="eager").eval())
    return model, feed(model)


_CONV: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
_STAGES: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 5}
_MLA: dict[str, Any] = {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "model_type": "resnet",
    "out_features": ["stage4"],
}

# --- decoders ----------------------------------------------------------------------------------------------------
for _name in (
    "llama", "mistral", "gemma", "qwen2", "qwen3", "phi", "gpt2", "gptj", "opt", "bloom", "mpt", "xglm", "ctrl",
    "cohere", "nemotron", "granite", "olmo", "olmo2", "stablelm", "starcoder2", "biogpt", "gpt_bigcode",
    "persimmon", "gpt_neox", "gpt_neox_japanese", "helium", "smollm3", "arcee", "exaone4", "ernie4_5", "bitnet",
    "cohere2", "olmo3", "diffllama", "hunyuan_v1_dense", "seed_oss", "apertus", "ministral", "nanochat",
    "vaultgemma", "modernbert-decoder", "jais2", "cwm", "granite_swa", "hyperclovax",
):  # fmt: skip
    arch(_name)
arch("glm", pad_token_id=0)
arch("glm4", pad_token_id=0)
arch("codegen", rotary_dim=8)
arch("phi3", pad_token_id=0, sliding_window=5)
arch("minicpm3", **{k: v for k, v in _MLA.items() if k not in {"n_group", "topk_group", "first_k_dense_replace"}})
arch("gemma2", attn_logit_softcapping=2.0, query_pre_attn_scalar=12, num_hidden_layers=2)
arch("gemma3_text", query_pre_attn_scalar=12, layer_types=["sliding_attention", "full_attention"])
arch("gpt_neo", attention_types=[[["global", "local"], 1]])
arch("falcon", multi_query=True)
arch("falcon_new", of="falcon", new_decoder_architecture=True)
arch("falcon_alibi", of="falcon", alibi=True, multi_query=False, num_kv_heads=HEADS)
arch("openai-gpt")
arch(
    "gpt_oss",
    layer_types=["sliding_attention", "full_attention"],
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
arch("mixtral")
arch("qwen2_moe", decoder_sparse_step=1)
arch("qwen3_moe", decoder_sparse_step=1)
arch("phimoe")
arch("olmoe")
arch("granitemoe")
arch("jetmoe", num_attention_heads=4)
arch("deepseek_v2", **_MLA, topk_method="greedy")
arch("deepseek_v3", **_MLA, head_dim=8)
arch(
    "llama4_text", attention_chunk_size=5, layer_types=["chunked_attention", "full_attention"], intermediate_size_mlp=96
)
arch(
    "dbrx",
    attn_config={"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
    ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
)
arch("xlnet", text, d_head=16)
arch("xlm")
arch("flaubert")

# --- encoders ----------------------------------------------------------------------------------------------------
for _name in (
    "bert", "roberta", "distilbert", "electra", "camembert", "xlm-roberta", "xlm-roberta-xl", "ernie",
    "data2vec-text", "rembert", "roformer", "megatron-bert", "convbert", "esm", "roberta-prelayernorm", "ibert",
    "splinter", "modernbert", "eurobert", "bert-generation", "nomic_bert",
):  # fmt: skip
    arch(_name)
arch("layoutlm", boxes)
arch("lilt", boxes, hidden_size=96)
arch("mpnet", pad_token_id=1, relative_attention_num_buckets=32)
arch("squeezebert", embedding_size=WIDTH)
arch("bros", boxes, dim_bbox_sinusoid_emb_2d=32, dim_bbox_sinusoid_emb_1d=4, dim_bbox_projection=16)
arch("albert", embedding_size=16)
arch("mobilebert", intra_bottleneck_size=32, embedding_size=32, true_hidden_size=32)
arch("nystromformer", segment_means_seq_len=LENGTH, num_landmarks=LENGTH)
arch("deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
arch("deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=True)
arch("funnel", cls="FunnelModel", block_sizes=[1, 1], block_repeats=[1, 1], num_decoder_layers=1)
arch("longformer", attention_window=4, pad_token_id=1)
arch("big_bird", text, attention_type="original_full")
arch("big_bird_sparse", text, of="big_bird", attention_type="block_sparse", block_size=2, num_random_blocks=1)

# --- encoder-decoders --------------------------------------------------------------------------------------------
for _name in (
    "t5", "mt5", "umt5", "bart", "mbart", "pegasus", "blenderbot", "blenderbot-small", "m2m_100", "prophetnet",
    "plbart", "pegasus_x", "mvp",
):  # fmt: skip
    arch(_name, text_pairs)
arch("marian", text_pairs, decoder_vocab_size=99)
arch("fsmt", text_pairs, src_vocab_size=99, tgt_vocab_size=99)
arch("longt5", text_pairs, local_radius=3)
arch(
    "longt5_global",
    text_pairs,
    of="longt5",
    local_radius=3,
    global_block_size=4,
    encoder_attention_type="transient-global",
)
arch("led", text_pairs, attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)

# --- vision ------------------------------------------------------------------------------------------------------
for _name in (
    "vit", "deit", "dinov2", "dinov2_with_registers", "ijepa", "vit_msn", "siglip_vision_model",
    "clip_vision_model", "aimv2_vision_model",
):  # fmt: skip
    arch(_name, image)
arch("beit", image, use_relative_position_bias=True, use_mask_token=True)
arch("data2vec-vision", image, use_relative_position_bias=True)
arch("dinov3_vit", image)
arch("yolos", image, image_size=[IMAGE, IMAGE], num_detection_tokens=3)
arch("vitdet", image, window_size=2, window_block_indices=[0], use_relative_position_embeddings=True)
arch("swin", image, **_STAGES, patch_size=4, image_size=40)
arch("swinv2", image, **_STAGES, patch_size=4, image_size=40)
arch("donut-swin", image, **_STAGES, patch_size=4, image_size=40)
arch(
    "segformer",
    image,
    num_encoder_blocks=2,
    depths=[1, 1],
    sr_ratios=[2, 1],
    hidden_sizes=[16, 32],
    num_attention_heads=[2, 4],
    patch_sizes=[7, 3],
    strides=[4, 2],
    mlp_ratios=[2, 2],
)
arch(
    "pvt",
    image,
    num_encoder_blocks=2,
    depths=[1, 1],
    hidden_sizes=[16, 32],
    sequence_reduction_ratios=[2, 1],
    num_attention_heads=[2, 4],
    patch_sizes=[4, 2],
    strides=[4, 2],
    mlp_ratios=[2, 2],
)
arch(
    "pvt_v2",
    image,
    image_size=32,
    num_encoder_blocks=2,
    depths=[1, 1],
    hidden_sizes=[16, 32],
    sr_ratios=[2, 1],
    num_attention_heads=[2, 4],
    patch_sizes=[7, 3],
    strides=[4, 2],
    mlp_ratios=[2, 2],
)
arch("cvt", image, embed_dim=[16, 32, 64], depth=[1, 2, 3], num_heads=[1, 2, 4])
arch(
    "mobilevit",
    image,
    image_size=64,
    hidden_sizes=[16, 24, 32],
    neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
    num_attention_heads=4,
    patch_size=2,
)
arch(
    "hiera",
    image,
    image_size=[64, 64],
    patch_size=[7, 7],
    embed_dim=16,
    depths=[1, 1],
    num_heads=[1, 2],
    patch_kernel=[7, 7],
    patch_stride=[4, 4],
    patch_padding=[3, 3],
    masked_unit_size=[4, 4],
    query_stride=[2, 2],
    num_query_pool=1,
    embed_dim_multiplier=2.0,
)
arch("sam_vision_model", image, window_size=3, global_attn_indexes=[1], output_channels=16, mlp_dim=64)
arch("dpt", image, cls="DPTModel", backbone_out_indices=[0, 1, 1, 1], is_hybrid=False)
arch("detr", image, use_timm_backbone=False, backbone_config=_RESNET)
arch("conditional_detr", image, use_timm_backbone=False, backbone_config=_RESNET)
arch("table-transformer", image, use_timm_backbone=False, backbone_config=_RESNET)
arch("dab-detr", image, use_timm_backbone=False, backbone_config=_RESNET)
arch(
    "mask2former",
    image,
    cls="Mask2FormerModel",
    feature_size=WIDTH,
    mask_feature_size=WIDTH,
    hidden_dim=WIDTH,
    encoder_feedforward_dim=64,
    dim_feedforward=64,
    num_attention_heads=4,
    num_queries=5,
    encoder_layers=1,
    decoder_layers=2,
    backbone_config={
        "model_type": "swin",
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [2, 2, 4, 4],
        "window_size": 5,
        "image_size": 64,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
)

# --- audio, several kinds ----------------------------------------------------------------------------------------
for _name in ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "sew"):
    arch(_name, wave, **_CONV)
arch("wav2vec2-conformer", wave, **_CONV, position_embeddings_type="relative", conv_depthwise_kernel_size=3)
arch("whisper", spectrum, num_mel_bins=16, max_source_positions=15, max_target_positions=20)
arch("clip", image_and_text)
arch("siglip", image_and_text)
arch("chinese_clip", image_and_text)
arch("altclip", image_and_text)
arch("owlvit", image_and_text)
arch("owlv2", image_and_text)
arch("clipseg", image_and_text)
arch("blip", image_and_text, cls="BlipModel")
arch(
    "groupvit",
    image_and_text,
    vision_config={
        "depths": [1, 1, 1],
        "num_group_tokens": [6, 4, 0],
        "num_output_groups": [6, 4, 4],
        "num_hidden_layers": 3,
    },
    projection_intermediate_dim=32,
)
arch("vilt", image_and_text)
arch("git", text)


def cases() -> list[Case]:
    """All architectures, in the order of the table."""
    return [Case(suite="transformers", name=name, build=functools.partial(_build, name)) for name in _TABLE]
