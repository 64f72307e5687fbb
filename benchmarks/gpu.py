"""Unmodified models on a GPU: eager attention through inductor, through attnpass, and what the library ships (sdpa).

    python -m benchmarks.gpu [--only NAME ...] [--train] [--by-hand] [--json FILE]

Times are medians of CUDA events around one forward call in bfloat16 (with --train: forward and backward), memory is the
peak above what the model itself holds, errors are relative to the same model in float32. All forms of a model are
measured in one process. The rows called decode are one step behind a static cache that is nearly full.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnpass.errors import first_line
from benchmarks.models import Inputs, Model, decoder, right_padded, tokens
from benchmarks.timing import median_ms, peak_mib


@dataclass(frozen=True)
class Row:
    """One form of one model."""

    model: str
    attention: str
    compiler: str
    train: bool
    ms: float | None = None
    mib: float | None = None
    error: float | None = None
    note: str = ""


LLAMA = decoder(2048, 5632, 32, 8)
BERT = {"vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
MODELS = {
    "llama_prefill4k": Model("LlamaConfig", LLAMA, lambda: {"input_ids": tokens(2, 4096)}),
    "llama_padded": Model(
        "LlamaConfig", LLAMA, lambda: {"input_ids": tokens(4, 2048), "attention_mask": right_padded(4, 2048)}
    ),
    "mistral_sw_8k": Model(
        "MistralConfig",
        decoder(2048, 5632, 16, 8, head_dim=128, sliding_window=1024),
        lambda: {"input_ids": tokens(1, 8192)},
    ),
    "gemma2_4k": Model(
        "Gemma2Config",
        decoder(2048, 8192, 8, 4, head_dim=256, sliding_window=1024),
        lambda: {"input_ids": tokens(2, 4096)},
    ),
    "bert_large_512_pad": Model(
        "BertConfig",
        {**BERT, "num_attention_heads": 16},
        lambda: {"input_ids": tokens(32, 512), "attention_mask": right_padded(32, 512)},
    ),
    "vit_l_384": Model(
        "ViTConfig",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "image_size": 384,
        },
        lambda: {"pixel_values": torch.randn(32, 3, 384, 384)},
    ),
    "gpt2_1k": Model(
        "GPT2Config",
        {"vocab_size": 1000, "n_embd": 1024, "n_layer": 4, "n_head": 16, "n_positions": 1024, "use_cache": False},
        lambda: {"input_ids": tokens(8, 1024)},
    ),
    "t5_512": Model(
        "T5Config",
        {"vocab_size": 1000, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 4, "num_heads": 12},
        lambda: {"input_ids": tokens(16, 512)},
        cls="T5EncoderModel",
    ),
}
LLAMA_8B = decoder(4096, 14336, 32, 8, use_cache=True)
for batch, length in ((1, 2048), (1, 32768), (16, 8192), (8, 32768)):
    MODELS[f"decode_{batch}x{length // 1024}k"] = Model(
        "LlamaConfig", LLAMA_8B, functools.partial(lambda batch: {"input_ids": tokens(batch, 1)}, batch), cache=length
    )
FORMS = (("eager", "inductor"), ("eager", "attnpass"), ("sdpa", "inductor"), ("sdpa", "attnpass"))
BY_HAND = (("flash_attention_2", "inductor"), ("flex_attention", "inductor"))


def rows(name: str, forms: Sequence[tuple[str, str]], *, train: bool) -> Iterator[Row]:
    """The forms of one model."""
    torch.manual_seed(0)
    inputs = {key: x.cuda() for key, x in MODELS[name].inputs().items()}
    exact = _model(name, "eager")
    true = _run(exact, inputs | MODELS[name].state(exact, inputs), train=False)
    del exact
    for attention, compiler in forms:
        try:
            yield _row(name, attention, compiler, inputs, true, train=train)
        except Exception as failure:  # not every model has every integration
            yield Row(name, attention, compiler, train, note=f"{type(failure).__name__}: {first_line(failure)[:100]}")


def _row(name: str, attention: str, compiler: str, inputs: Inputs, true: torch.Tensor, *, train: bool) -> Row:
    import attnpass
    from attnpass.capture.dynamo import backend

    torch._dynamo.reset()
    attnpass.reset()
    model = _model(name, attention)
    for parameter in model.parameters():  # rotary frequencies stay what a loaded model has: float32
        parameter.data = parameter.data.bfloat16()
    inputs = inputs | MODELS[name].state(model, inputs)
    compiled = torch.compile(model, backend=backend if compiler == "attnpass" else "inductor")
    out = _run(compiled, inputs, train=train)
    error = ((out.float() - true).norm() / true.norm()).item()
    del out
    ms = median_ms(lambda: _run(compiled, inputs, train=train))
    mib = peak_mib(lambda: _run(compiled, inputs, train=train))
    report = attnpass.report()
    kernels = sorted({site.kernel for site in report.sites if site.kernel})
    note = f"{report.replaced} replaced by {', '.join(kernels)}" if compiler == "attnpass" else ""
    return Row(name, attention, compiler, train, ms, mib, error, note)


def _model(name: str, attention: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name].build(attention).cuda().eval()


def _run(model: Any, inputs: Inputs, *, train: bool) -> torch.Tensor:
    with torch.set_grad_enabled(train):
        result: torch.Tensor = model(**inputs).last_hidden_state
        if train:
            model.zero_grad()
            result.square().mean().backward()
    return result.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", choices=sorted(MODELS), help="only this model (may be repeated)")
    parser.add_argument("--train", action="store_true", help="a forward and a backward pass")
    parser.add_argument("--by-hand", action="store_true", help="the library's other integrations as well")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    warnings.filterwarnings("ignore")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    found: list[Row] = []
    for name in asked.only or MODELS:
        for row in rows(name, FORMS + (BY_HAND if asked.by_hand else ()), train=asked.train):
            found.append(row)
            figures = "" if row.ms is None else f"{row.ms:7.2f} ms {row.mib:6.0f} MiB error {row.error:.1e}"
            print(f"{row.model:20} {row.attention:18} {row.compiler:9} {figures}  {row.note}", flush=True)
            if asked.json:  # after each row: what was measured survives a limit of time
                asked.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
