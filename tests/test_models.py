"""Real models, unmodified: the attention that is there is found, and outputs and gradients are eager's.

The decisions on each model are data, tests/models/expected.json, one line a model; a change of behaviour is a change of
that file (``python -m benchmarks.recall --expected``), to be read like any other. The long list of models is
``make recall``; here is what fits in a few minutes.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from tests.models import harness
from tests.models.oracle import Oracle
from tests.models.suites import expected, find

TRANSFORMERS = (
    "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neo",
    "gpt_neox", "gptj", "opt", "bloom", "mpt", "falcon_new", "falcon_alibi", "openai-gpt", "gpt_oss", "mixtral",
    "deepseek_v3", "llama4_text", "granite", "olmo2", "cohere", "stablelm", "xlnet", "xglm",
    "bert", "distilbert", "albert", "deberta-v2", "mpnet", "modernbert", "roformer", "nystromformer",
    "t5", "bart", "fsmt", "marian", "whisper",
    "vit", "beit", "swin", "swinv2", "dinov2", "segformer", "sam_vision_model", "detr", "clip", "siglip", "wav2vec2",
)  # fmt: skip
TIMM = (
    "vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224",
    "eva02_tiny_patch14_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "convit_tiny", "samvit_base_patch16",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_rmlp_pico_rw_256", "twins_svt_small",
    "pvt_v2_b0", "visformer_tiny", "pit_ti_224", "tnt_s_patch16_224", "hiera_tiny_224", "naflexvit_base_patch16_map",
)  # fmt: skip
DIFFUSERS = ("unet_condition", "unet_added_kv", "unet_2d", "dit", "pixart", "transformer_2d", "prior", "vae")
TORCH = (
    "mha_need_weights", "mha_weights_returned", "mha_without_weights", "mha_masked", "mha_empty_rows", "mha_float_mask",
    "mha_sequence_first", "mha_bias_kv_zero_attention", "mha_unlike_inputs", "mha_unbatched", "transformer",
    "transformer_encoder", "transformer_decoder_causal",
)  # fmt: skip
HANDWRITTEN = (
    "mingpt", "vit", "einsum_causal", "llama", "alibi", "exp_sum", "perceiver", "softcap_sink", "talking_heads",
    "differential", "linear_attention", "router", "sagan",
)  # fmt: skip
TESTED = tuple(
    f"{suite}/{name}"
    for suite, names in (
        ("transformers", TRANSFORMERS),
        ("timm", TIMM),
        ("diffusers", DIFFUSERS),
        ("torch", TORCH),
        ("handwritten", HANDWRITTEN),
    )
    for name in names
)
OF_LIBRARIES = ("transformers/", "timm/", "diffusers/")
THIRD = [
    pytest.param(identity, marks=pytest.mark.slow) if n % 3 and identity.startswith(OF_LIBRARIES) else identity
    for n, identity in enumerate(TESTED)
]
"""Of libraries two of three are left to `make test-long`."""

EXPORTED = (
    "transformers/llama", "transformers/gemma2", "transformers/mixtral", "transformers/bert", "transformers/t5",
    "transformers/swin", "timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224", "diffusers/unet_condition",
    "torch/mha_masked", "handwritten/mingpt", "handwritten/talking_heads",
)  # fmt: skip

NOT_FOUND = {
    "transformers/openai-gpt": "a multiplicative mask that is a buffer: scores * b - 10000 * (1 - b)",
    "timm/convit_tiny": "a gate between softmax and values",
    "handwritten/differential": "the difference of two maps",
}
"""Attention by the oracle's count that is refused by name."""


def _run(identity: str, front: str) -> harness.Result:
    suite, name = identity.split("/")
    if suite in ("transformers", "timm", "diffusers") and importlib.util.find_spec(suite) is None:
        pytest.skip(f"{suite} is not installed")
    return harness.run(dataclasses.replace(find(suite, name), front=front))


@pytest.mark.filterwarnings("ignore")  # the models' own
@pytest.mark.parametrize("identity", THIRD)
def test_compiled_model_is_decided_as_written_down_and_agrees_with_eager(identity: str) -> None:
    result = _run(identity, "dynamo")
    assert result.problem is None
    assert result.decisions() == expected()[identity]
    assert result.accurate, result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("identity", EXPORTED)
def test_exported_model_is_decided_like_the_compiled_one_and_agrees_with_eager(identity: str) -> None:
    result = _run(identity, "export")
    assert result.problem is None
    assert result.decisions() == expected()[identity]
    assert result.accurate, result


def test_all_attention_is_found_but_for_what_is_named() -> None:
    written = expected()
    short = {identity for identity in TESTED if written[identity]["sites"] != written[identity]["there"]}
    assert short == set(NOT_FOUND)


def test_every_attention_that_is_not_found_has_a_reason() -> None:
    for identity in TESTED:
        entry = expected()[identity]
        missing = entry["there"] - entry["sites"]
        assert missing <= sum(entry.get("misses", {}).values()), identity


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_scores_are_large_enough_that_a_wrong_scale_would_show(name: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = find("transformers", name).build()
    with torch.no_grad():
        wanted = harness.outputs(model, inputs)
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("k_proj", "key", ".k.", "c_attn")):
                parameter.mul_(1.01)
        assert harness.worst(wanted, harness.outputs(model, inputs)) > 10 * harness.OUTPUT_LIMIT


@pytest.mark.parametrize(
    ("name", "there"),
    [("mingpt", 2), ("exp_sum", 2), ("perceiver", 2), ("differential", 4), ("talking_heads", 0), ("router", 0),
     ("linear_attention", 0)],
)  # fmt: skip
def test_the_oracle_counts_attention_and_nothing_else(name: str, there: int) -> None:
    model, inputs = find("handwritten", name).build()
    args, kwargs = harness.positional(inputs)
    oracle = Oracle(model)
    with torch.no_grad(), oracle:
        out = model(*args, **kwargs)
    assert oracle.there(out) == there


def test_the_oracle_does_not_count_what_nobody_reads() -> None:
    class Dead(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            (x @ x.mT).softmax(-1) @ x
            return (x @ x.mT).softmax(-1) @ x

    model, x = Dead(), torch.randn(2, 5, 4)
    oracle = Oracle(model)
    with torch.no_grad(), oracle:
        out = model(x)
    assert (oracle.there(out), oracle.softmaxes) == (1, 2)


def test_differences_in_shape_dtype_or_missing_numbers_are_infinite() -> None:
    a = torch.ones(3)
    nan = torch.tensor([1.0, float("nan"), 1.0])
    assert harness.worst([a], [a]) == 0
    assert harness.worst([a], [torch.ones(4)]) == float("inf")
    assert harness.worst([a], [a.double()]) == float("inf")
    assert harness.worst([a], [nan]) == float("inf")
    assert harness.worst([nan], [nan]) == 0
    assert harness.worst([a], []) == float("inf")
