"""The masks that transformers' own functions make, as torch.export sees them, with and without padding."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, arange
from torch.export import Dim

from attnpass.masks import MaskProof
from attnpass.spec import MaskSpec
from tests.masks.harness import Traced, analyse, traced
from tests.models import torchvision_stub

if find_spec("torchvision") is not None:  # transformers imports it where it is there
    torchvision_stub.ensure()
masking = pytest.importorskip("transformers.masking_utils")
LlamaConfig = pytest.importorskip("transformers").LlamaConfig

BATCH, LENGTH, MAX = 3, 19, 1 << 20
EAGER_AND_SDPA = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
BOTH = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
PLAIN: dict[str, tuple[str, dict[str, Any], MaskSpec]] = {
    "llama, gpt2, qwen": ("create_causal_mask", {}, MaskSpec(causal=0)),
    "mistral, gemma2, gpt-oss": (
        "create_sliding_window_causal_mask",
        {"sliding_window": 7},
        MaskSpec(causal=0, window=(6, None)),
    ),
    "llama4": ("create_chunked_causal_mask", {"attention_chunk_size": 8}, MaskSpec(causal=0, chunk=8)),
    "bert, t5 encoder": ("create_bidirectional_mask", {"is_causal": False}, MaskSpec()),
    "modernbert, embeddinggemma": (
        "create_bidirectional_sliding_window_mask",
        {"sliding_window": 5, "is_causal": False},
        MaskSpec(window=(5, 5)),
    ),
}


def config(implementation: str, **fields: Any) -> Any:
    out = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=50, **fields)
    out._attn_implementation = implementation
    return out


def made(name: str, cfg: Any, *, padded: bool, dynamic: bool, positions: bool = False) -> Traced:
    """The traced mask function; position ids are made in the graph, as models do when they are given none."""
    make: Callable[..., Tensor] = getattr(masking, name)

    def run(x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        more = {}
        if positions:
            more = {"position_ids": arange(x.shape[1])[None]}
        if not name.startswith("create_bidirectional"):
            more["past_key_values"] = None
        mask = make(cfg, x, attention_mask if padded else None, **more)
        return torch.ones((), dtype=torch.bool).expand(1, 1, x.shape[1], x.shape[1]) if mask is None else mask

    x = torch.zeros(BATCH, LENGTH, 32)
    inputs = (x, torch.ones(BATCH, LENGTH, dtype=torch.long)) if padded else (x,)
    batch, length = Dim("B", max=64), Dim("S", max=MAX)
    return traced(run, *inputs, dynamic=[{0: batch, 1: length}] * len(inputs) if dynamic else None)


def proof_of(t: Traced) -> MaskProof:
    batch = t.result.meta["val"].shape[0]
    proof = analyse(t, heads=4, batch=batch)
    assert proof.check.startswith("agreed"), proof.steps
    return proof


@BOTH
@EAGER_AND_SDPA
@pytest.mark.parametrize("name", PLAIN)
def test_without_padding(name: str, implementation: str, dynamic: bool) -> None:
    function, fields, spec = PLAIN[name]
    proof = proof_of(made(function, config(implementation, **fields), padded=False, dynamic=dynamic))
    assert proof.spec == spec, proof.steps
    assert proof.empty_rows == "impossible"
    assert not proof.loads


@BOTH
@pytest.mark.parametrize("name", [n for n in PLAIN if not n.startswith(("bert", "modernbert"))])
def test_the_packed_test_of_plain_positions_disappears(name: str, dynamic: bool) -> None:
    function, fields, spec = PLAIN[name]
    cfg = config("eager", **fields)
    proof = proof_of(made(function, cfg, padded=False, dynamic=dynamic, positions=True))
    assert proof.spec == spec, proof.steps
    assert not proof.loads


@BOTH
@EAGER_AND_SDPA
@pytest.mark.parametrize("name", PLAIN)
def test_with_padding(name: str, implementation: str, dynamic: bool) -> None:
    function, fields, spec = PLAIN[name]
    proof = proof_of(made(function, config(implementation, **fields), padded=True, dynamic=dynamic))
    if name == "llama4":  # its chunks begin at each row's first token
        assert proof.spec == MaskSpec(causal=0, document=True, key_padding=True)
    else:
        assert proof.spec == MaskSpec(causal=spec.causal, window=spec.window, key_padding=True), proof.steps
    assert proof.empty_rows == "possible"
    assert {load.source for _, load in proof.loads} >= {"to"} or proof.loads
    fill = torch.finfo(torch.float32).min if implementation == "eager" else float("-inf")
    assert proof.fills == (fill,)


@BOTH
def test_packed_sequences_stay_documents(dynamic: bool) -> None:
    """Given position ids are data: which tokens belong together is kept, as equality of ids."""
    cfg = config("eager")

    def run(x: Tensor, positions: Tensor) -> Tensor:
        return masking.create_causal_mask(cfg, x, None, None, position_ids=positions)

    x, positions = torch.zeros(BATCH, LENGTH, 32), torch.arange(LENGTH)[None].repeat(BATCH, 1)
    shapes = [{0: Dim("B", max=64), 1: Dim("S", max=MAX)}] * 2 if dynamic else None
    proof = proof_of(traced(run, x, positions, dynamic=shapes))
    assert proof.spec.document
    assert proof.spec.dense  # causal among positions that are data
    assert proof.spec.causal is None
    assert proof.empty_rows == "impossible"  # every token sees itself


def test_blocks_of_image_tokens_stay_dense() -> None:
    cfg = config("eager")

    def run(x: Tensor, blocks: Tensor) -> Tensor:
        return masking.create_causal_mask(cfg, x, None, None, block_sequence_ids=blocks)

    proof = proof_of(traced(run, torch.zeros(BATCH, LENGTH, 32), torch.zeros(BATCH, LENGTH, dtype=torch.long)))
    assert proof.spec == MaskSpec(dense=True)
    assert proof.empty_rows == "impossible"


@EAGER_AND_SDPA
def test_a_cache_moves_the_diagonal(implementation: str) -> None:
    def run(x: Tensor) -> Tensor:
        mask = masking.AttentionMaskInterface()[implementation](
            BATCH, x.shape[1], x.shape[1] + 5, q_offset=5, dtype=x.dtype, allow_is_causal_skip=False
        )
        assert mask is not None
        return mask

    for dynamic in (False, True):
        shapes = [{1: Dim("S", max=MAX)}] if dynamic else None
        proof = proof_of(traced(run, torch.zeros(BATCH, LENGTH, 32), dynamic=shapes))
        assert proof.spec == MaskSpec(causal=5)
        assert proof.structure.upper == proof.frame.keys - proof.frame.queries


def test_a_static_cache_has_its_offset_in_a_tensor() -> None:
    def run(x: Tensor, seen: Tensor) -> Tensor:
        return masking.sdpa_mask(BATCH, x.shape[1], 64, q_offset=seen, allow_is_causal_skip=False)

    proof = proof_of(traced(run, torch.zeros(BATCH, LENGTH, 32), torch.tensor(3)))
    assert proof.spec == MaskSpec(limited=True)
    assert [load.source for _, load in proof.loads] == ["inputs_1"]


def test_masks_under_vmap() -> None:
    def run(x: Tensor) -> Tensor:
        return masking.sdpa_mask(BATCH, x.shape[1], x.shape[1], use_vmap=True, allow_is_causal_skip=False)

    proof = proof_of(traced(run, torch.zeros(BATCH, LENGTH, 32)))
    assert proof.spec == MaskSpec(causal=0), proof.steps
