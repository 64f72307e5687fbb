"""Real models under verify: nothing that the pass does to them is worse than what they were, and nothing is untried."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch

import attnpass
from attnpass.trial.inputs import PADDING, REAL
from tests.models.suites import find

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # whatever the models do
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers"),
]

MODELS = (
    "llama", "mistral", "gemma2", "qwen3", "gpt2", "gpt_neo", "gptj", "bloom", "mpt", "gpt_oss", "mixtral", "bert",
    "modernbert", "t5", "bart", "whisper", "vit", "swin", "clip", "wav2vec2",
)  # fmt: skip


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_no_site_is_put_back(name: str, train: bool, fresh_dynamo: None) -> None:
    model, inputs = find("transformers", name).build()
    model.train(train)
    with contextlib.nullcontext() if train else torch.no_grad():
        before, report = attnpass.audit(model, **inputs), attnpass.verify(model, **inputs)
    assert not report.failures
    assert report.replaced == before.replaced, [site.reason for site in report.sites]
    for site in report.sites:
        if site.replaced:
            assert site.untried is None
            assert any(trial.inputs == REAL for trial in site.trials)
            assert not any(trial.worse for trial in site.trials if trial.inputs not in PADDING)


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_no_site_of_an_exported_model_is_put_back(name: str) -> None:
    model, inputs = find("transformers", name).build()
    with torch.no_grad():
        program = torch.export.export(model.eval(), (), inputs, strict=False)
        report = attnpass.verify(program)
    assert report.replaced > 0
    assert all(site.replaced for site in report.sites if site.trials)
    assert all(site.untried is None for site in report.sites)
