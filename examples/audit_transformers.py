"""Audit a model of the transformers library: which attention would be replaced, which not, and why.

The model is built from a configuration with random weights, so nothing is downloaded. Eager attention is asked for:
that is the implementation written out in PyTorch, which models fall back to whenever another does not support them.

Run it: python examples/audit_transformers.py
"""

import json

import torch

import attnpass


def main() -> None:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except (ImportError, RuntimeError) as error:  # a broken install of what it imports is a RuntimeError
        print(f"skipped: transformers cannot be imported here ({error}); pip install transformers")
        return

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 256, (2, 64))
    padding = torch.ones_like(tokens)
    padding[0, :9] = 0  # left padding

    report = attnpass.audit(model, input_ids=tokens, attention_mask=padding, use_cache=False)
    print(report)
    assert report.replaced == len(report.sites) == config.num_hidden_layers

    # The same for programs: docs/audit.md documents every field.
    first = json.loads(report.to_json())["sites"][0]
    print("\none site as data:", json.dumps({key: first[key] for key in ("where", "kernel", "saves")}, indent=2))
    assert first["spec"]["groups"] == 4, "eight query heads share two key/value heads; they are not repeated"

    # Asking for the attention weights keeps the big tensors alive: the report says so, and what to do.
    with_weights = attnpass.audit(model, input_ids=tokens, use_cache=False, output_attentions=True)
    print("\nwith output_attentions=True:\n")
    print(with_weights)
    assert with_weights.replaced == 0


if __name__ == "__main__":
    main()
