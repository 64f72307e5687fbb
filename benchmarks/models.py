"""Models of transformers with random weights, and what they are called with, for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from tests.models import torchvision_stub

Inputs = dict[str, Any]
ROOM = 128  # for the steps of a benchmark; each call is one


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 900, (batch, length))


def right_padded(batch: int, length: int) -> torch.Tensor:
    """An attention mask whose rows end at different places; the first is full."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, length - (row * 37) % (length // 2) :] = 0
    return mask


@dataclass(frozen=True)
class Model:
    """A model of transformers, four layers of its usual width, and what it is called with."""

    config: str
    sizes: dict[str, Any]
    inputs: Callable[[], Inputs]
    cls: str = "AutoModel"
    cache: int = 0  # decoding: the room of a static cache, nearly all of it filled

    def build(self, attention: str) -> nn.Module:
        if find_spec("torchvision") is not None:  # transformers imports it where it is there
            torchvision_stub.ensure()
        import transformers

        config = getattr(transformers, self.config)(**self.sizes)
        cls = getattr(transformers, self.cls)
        make = cls.from_config if self.cls == "AutoModel" else cls._from_config
        model: nn.Module = make(config, attn_implementation=attention)
        return model

    def state(self, model: nn.Module, inputs: Inputs) -> dict[str, Any]:
        """What a call is given beside its inputs: a cache of random keys and values, in the model's dtype."""
        if not self.cache:
            return {}
        import transformers

        config: Any = model.config
        parameter = next(model.parameters())
        like = {"dtype": parameter.dtype, "device": parameter.device}
        cache = transformers.StaticCache(config, max_cache_len=self.cache)
        width = config.hidden_size // config.num_attention_heads
        cache.early_initialization(inputs["input_ids"].shape[0], config.num_key_value_heads, width, **like)
        generator = torch.Generator(parameter.device).manual_seed(2)
        for layer in cache.layers:
            for held in (layer.keys, layer.values):
                held.copy_(torch.randn(held.shape, generator=generator, device=parameter.device))
            layer.cumulative_length.fill_(self.cache - ROOM)
        return {"past_key_values": cache}


def decoder(hidden: int, inner: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """The sizes of a decoder with grouped heads."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "vocab_size": 1000,
        "num_hidden_layers": 4,
        "use_cache": False,
        **dict(zip(names, (hidden, inner, heads, kv_heads), strict=True)),
        **more,
    }
