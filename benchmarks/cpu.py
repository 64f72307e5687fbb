"""Unmodified models on the CPU: through inductor, and through the pass and inductor, from eager attention and sdpa.

    python -m benchmarks.cpu [--only NAME ...] [--dtype float32] [--train] [--repeat 7] [--json FILE]

Two layers, all forms of a model in one process, their calls taking turns so that a busy machine slows all of them
alike; medians of forward passes, with --train of forward and backward. The ratio is inductor's time over that of the
pass, for the same unmodified form of the model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import Inputs, Model, decoder, right_padded, tokens

TWO = {"num_hidden_layers": 2}
BERT = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, **TWO}
LLAMA = {**decoder(512, 1024, 8, 2), **TWO}
MODELS = {
    "bert_128_pad": Model(
        "BertConfig", BERT, lambda: {"input_ids": tokens(16, 128), "attention_mask": right_padded(16, 128)}
    ),
    "llama_128": Model("LlamaConfig", LLAMA, lambda: {"input_ids": tokens(16, 128)}),
    "bert_512": Model("BertConfig", BERT, lambda: {"input_ids": tokens(4, 512)}),
    "bert_512_pad": Model(
        "BertConfig", BERT, lambda: {"input_ids": tokens(4, 512), "attention_mask": right_padded(4, 512)}
    ),
    "gpt2_1k": Model(
        "GPT2Config",
        {"vocab_size": 1000, "n_embd": 512, "n_layer": 2, "n_head": 8, "n_positions": 1024, "use_cache": False},
        lambda: {"input_ids": tokens(2, 1024)},
    ),
    "llama_2k": Model("LlamaConfig", LLAMA, lambda: {"input_ids": tokens(1, 2048)}),
    "llama_1k_pad": Model(
        "LlamaConfig", LLAMA, lambda: {"input_ids": tokens(2, 1024), "attention_mask": right_padded(2, 1024)}
    ),
    "mistral_sw_2k": Model(
        "MistralConfig",
        {**decoder(512, 1024, 8, 2, head_dim=64, sliding_window=256), **TWO},
        lambda: {"input_ids": tokens(1, 2048)},
    ),
    "gemma2_1k": Model(
        "Gemma2Config",
        {**decoder(512, 1024, 4, 2, head_dim=64, sliding_window=256), **TWO},
        lambda: {"input_ids": tokens(2, 1024)},
    ),
    "t5_512": Model(
        "T5Config",
        {"vocab_size": 1000, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 8},
        lambda: {"input_ids": tokens(4, 512)},
        cls="T5EncoderModel",
    ),
    "vit_577": Model(
        "ViTConfig",
        {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "image_size": 384, **TWO},
        lambda: {"pixel_values": torch.randn(4, 3, 384, 384)},
    ),
}
FORMS = {"gemma2_1k": ("eager",)}  # its sdpa form leaves the soft cap out


@dataclass(frozen=True)
class Row:
    """One form of one model."""

    model: str
    attention: str
    dtype: str
    train: bool
    inductor_ms: float
    attnpass_ms: float
    error: float  # relative, between the two
    kernels: str

    @property
    def ratio(self) -> float:
        return self.inductor_ms / self.attnpass_ms


def rows(name: str, dtype: str, repeat: int, *, train: bool) -> Iterator[Row]:
    """The model as eager attention and as transformers ships it."""
    import attnpass
    from attnpass.capture.dynamo import backend

    torch.manual_seed(0)
    like = getattr(torch, dtype)
    inputs = {key: x.to(like) if x.is_floating_point() else x for key, x in MODELS[name].inputs().items()}
    for attention in FORMS.get(name, ("eager", "sdpa")):
        torch._dynamo.reset()
        attnpass.reset()
        plain = torch.compile(_model(name, attention).to(like), backend="inductor")
        mine = torch.compile(_model(name, attention).to(like), backend=backend)
        a, b = (_run(call, inputs, train=train).float() for call in (plain, mine))
        times: dict[str, list[float]] = {"plain": [], "mine": []}
        for turn in range(repeat + 1):
            for which, call in (("plain", plain), ("mine", mine)):
                start = time.perf_counter()
                _run(call, inputs, train=train)
                if turn:
                    times[which].append(time.perf_counter() - start)
        ms = {which: statistics.median(found) * 1e3 for which, found in times.items()}
        used = sorted({site.kernel or "left alone" for site in attnpass.report().sites})
        error = ((a - b).norm() / a.norm()).item()
        yield Row(name, attention, dtype, train, ms["plain"], ms["mine"], error, ", ".join(used))


def _model(name: str, attention: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name].build(attention).eval()


def _run(model: Any, inputs: Inputs, *, train: bool) -> torch.Tensor:
    with torch.set_grad_enabled(train):
        out: torch.Tensor = model(**inputs).last_hidden_state
        if train:
            model.zero_grad()
            out.square().mean().backward()
    return out.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", choices=sorted(MODELS), help="only this model (may be repeated)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--train", action="store_true", help="a forward and a backward pass")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    found: list[Row] = []
    for name in asked.only or MODELS:
        for row in rows(name, asked.dtype, asked.repeat, train=asked.train):
            found.append(row)
            print(
                f"{row.model:14} {row.attention:6} {row.inductor_ms:8.1f} ms, with attnpass {row.attnpass_ms:8.1f} ms, "
                f"ratio {row.ratio:5.2f}, difference {row.error:.0e}, {row.kernels}",
                flush=True,
            )
    for attention in ("eager", "sdpa"):
        ratios = [row.ratio for row in found if row.attention == attention]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            print(f"from {attention}: geometric mean {mean:.2f}, least {min(ratios):.2f}")
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
