"""Writes the audit that README.md shows: ``python -m tests.audit_in_readme`` (``--print`` only shows it)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

import attnpass
from tests.models import torchvision_stub

README = Path(__file__).resolve().parents[1] / "README.md"
_BLOCK = re.compile(r"(<!-- written by `python -m tests\.audit_in_readme` -->\n```\n)(.*?)(```\n)", re.S)


def audit_text() -> str:
    """The audit of a Mixtral with random weights; the version of torch without its build."""
    torchvision_stub.ensure()
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=4,
        attn_implementation="eager",
    )
    model = MixtralForCausalLM(config).eval()
    tokens = torch.randint(0, 256, (2, 256))
    padding = torch.ones_like(tokens)
    padding[0, :40] = 0
    with torch.no_grad():
        report = attnpass.audit(model, input_ids=tokens, attention_mask=padding, use_cache=False)
    return re.sub(r"\+\w+\)", ")", str(report)) + "\n"


def shown() -> str:
    """What the README shows now."""
    found = _BLOCK.search(README.read_text())
    assert found is not None
    return found[2]


def main() -> None:
    text = audit_text()
    print(text, end="")
    if "--print" not in sys.argv:
        page = README.read_text()
        README.write_text(_BLOCK.sub(lambda found: found[1] + text + found[3], page))


if __name__ == "__main__":
    main()
