"""What all tests share: fixed seeds, no state left between tests, and the `gpu` marker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attnpass


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_modes() -> Iterator[None]:
    """A test that leaves grad mode or the default dtype changed fails, instead of the tests after it."""
    yield
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    assert grad, "the test left grad mode off"
    assert dtype == torch.float32, f"the test left the default dtype at {dtype}"


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """For tests that compile: nothing compiled before is reused, nothing is left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_attnpass(fresh_dynamo: None) -> Iterator[None]:
    """And no report is left of what was compiled before."""
    attnpass.reset()
    yield
    attnpass.reset()
