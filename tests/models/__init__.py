"""Real models, randomly initialised from tiny configurations with every feature on, one per architecture.

    cases.py ─ transformers_cases, timm_cases, diffusers_cases, torch_cases, handwritten_cases   what is built
    oracle.py                                   how much attention is there, found without the pass
    harness.py                                  one model: eager, captured, rewritten, compared
    expected.json                               what the pass makes of each model; a change shows in the diff

Weights are drawn anew so that attention is far from uniform (the usual initialisation makes all scores nearly zero,
and a wrong scale would not show), queries outnumber key/value heads, windows are shorter than the sequence, soft caps
are set, batch and lengths are odd, and padding is on both sides, so some queries of causal models see no key at all.
"""
