"""Unmodified models on a GPU: eager attention through inductor, through attnpass, and what the library ships (sdpa).

    python -m benchmarks.gpu [--only NAME ...] [--train] [--json FILE]

Times are medians of CUDA events around one forward call in bfloat16 (with --train: forward and backward), memory is the
peak above what the model itself holds, errors are relative to the same model in float32. All forms of a model are
measured in one process.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
WARM, TIMED = 4, 15


@dataclass(frozen=True)
class Row:
    """One form of one model."""

    model: str
    attention: str
    compiler: str
    train: bool
    ms: float
    mib: float
    error: float
    replaced: str


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 900, (batch, length), device="cuda")


def right_padded(batch: int, length: int) -> torch.Tensor:
    """An attention mask whose rows end at different places; the first is full."""
    mask = torch.ones(batch, length, dtype=torch.long, device="cuda")
    for row in range(1, batch):
        mask[row, length - (row * 37) % (length // 2) :] = 0
    return mask


def llama(attention: str) -> nn.Module:
    from transformers import AutoModel, LlamaConfig

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    return AutoModel.from_config(config, attn_implementation=attention)


def mistral(attention: str) -> nn.Module:
    from transformers import AutoModel, MistralConfig

    config = MistralConfig(
        vocab_size=1000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=1024,
        use_cache=False,
    )
    return AutoModel.from_config(config, attn_implementation=attention)


def gemma2(attention: str) -> nn.Module:
    from transformers import AutoModel, Gemma2Config

    config = Gemma2Config(
        vocab_size=1000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=1024,
        use_cache=False,
    )
    return AutoModel.from_config(config, attn_implementation=attention)


def bert(attention: str) -> nn.Module:
    from transformers import AutoModel, BertConfig

    config = BertConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16
    )
    return AutoModel.from_config(config, attn_implementation=attention)


def gpt2(attention: str) -> nn.Module:
    from transformers import AutoModel, GPT2Config

    config = GPT2Config(vocab_size=1000, n_embd=1024, n_layer=4, n_head=16, n_positions=1024, use_cache=False)
    return AutoModel.from_config(config, attn_implementation=attention)


def t5(attention: str) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=1000, d_model=768, d_kv=64, d_ff=2048, num_layers=4, num_heads=12)
    return T5EncoderModel._from_config(config, attn_implementation=attention)


MODELS: dict[str, tuple[Callable[[str], nn.Module], Callable[[], Inputs]]] = {
    "llama_prefill4k": (llama, lambda: {"input_ids": tokens(2, 4096)}),
    "llama_padded": (llama, lambda: {"input_ids": tokens(4, 2048), "attention_mask": right_padded(4, 2048)}),
    "mistral_sw_8k": (mistral, lambda: {"input_ids": tokens(1, 8192)}),
    "gemma2_4k": (gemma2, lambda: {"input_ids": tokens(2, 4096)}),
    "bert_large_512_pad": (bert, lambda: {"input_ids": tokens(32, 512), "attention_mask": right_padded(32, 512)}),
    "gpt2_1k": (gpt2, lambda: {"input_ids": tokens(8, 1024)}),
    "t5_512": (t5, lambda: {"input_ids": tokens(16, 512)}),
}
FORMS = (("eager", "inductor"), ("eager", "attnpass"), ("sdpa", "inductor"), ("sdpa", "attnpass"))


def measured(call: Callable[[], Any]) -> tuple[float, float]:
    """Median milliseconds and peak MiB of a call."""
    for _ in range(WARM):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times: list[float] = []
    for _ in range(TIMED):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], (torch.cuda.max_memory_allocated() - before) / 2**20


def rows(name: str, *, train: bool) -> list[Row]:
    """All forms of one model."""
    import attnpass
    from attnpass.capture.dynamo import backend

    build, make_inputs = MODELS[name]
    inputs = make_inputs()
    out: list[Row] = []
    true: torch.Tensor | None = None
    for attention, compiler in FORMS:
        torch.manual_seed(1)
        torch._dynamo.reset()
        attnpass.reset()
        model = build(attention).cuda().eval()
        if true is None:
            with torch.no_grad():
                true = model(**inputs).last_hidden_state
        for parameter in model.parameters():  # rotary frequencies stay what a loaded model has: float32
            parameter.data = parameter.data.bfloat16()
        compiled = torch.compile(model, backend=backend if compiler == "attnpass" else "inductor")

        def step(model: nn.Module = model, compiled: Any = compiled) -> torch.Tensor:
            with torch.set_grad_enabled(train):
                result: torch.Tensor = compiled(**inputs).last_hidden_state
                if train:
                    model.zero_grad()
                    result.square().mean().backward()
            return result.detach().float()

        error = ((step() - true).norm() / true.norm()).item()
        ms, mib = measured(step)
        report = attnpass.report()
        kernels = sorted({site.kernel for site in report.sites if site.kernel})
        replaced = f"{report.replaced} replaced by {', '.join(kernels)}" if compiler == "attnpass" else ""
        out.append(Row(name, attention, compiler, train, ms, mib, error, replaced))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", choices=sorted(MODELS), help="only this model (may be repeated)")
    parser.add_argument("--train", action="store_true", help="a forward and a backward pass")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    warnings.filterwarnings("ignore")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    found: list[Row] = []
    for name in asked.only or MODELS:
        for row in rows(name, train=asked.train):
            found.append(row)
            print(
                f"{row.model:20} {row.attention:6} {row.compiler:9} {row.ms:7.2f} ms {row.mib:6.0f} MiB "
                f"error {row.error:.1e}  {row.replaced}",
                flush=True,
            )
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
