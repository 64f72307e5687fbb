"""Threads, processes, and the modes of torch that a compilation may happen in."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, Dataset

import attnpass
from attnpass import Policy, Rule
from attnpass.capture.dynamo import backend


@pytest.fixture(autouse=True)
def _fresh(fresh_attnpass: None) -> None:
    pass


class Attention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        keep = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
        return (q @ k.mT * 0.2).masked_fill(~keep, -torch.inf).softmax(-1) @ v


def sample() -> Tensor:
    return torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))


FUSED = {
    "native": "aten.scaled_dot_product_attention.default",
    "native_math": "aten._scaled_dot_product_attention_math.default",
    "keep": "softmax",
}


class Spy:
    """Runs graphs as they are, and tells which kernels are in them."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    def __call__(self, gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        self.targets += [getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes]
        self.targets += [str(n.target) for n in gm.graph.nodes]
        return gm.forward


# -- threads -----------------------------------------------------------------------------------------------------------


def test_each_thread_compiles_by_its_own_policy() -> None:
    rounds = 3
    start = threading.Barrier(3)
    wrong: list[str] = []

    def work(kernel: str) -> None:
        start.wait()
        for _ in range(rounds):
            spy, model = Spy(), Attention()
            with attnpass.policy(kernel=kernel):
                # a function of its own: what one thread has compiled is used by all that call the same code
                def own(x: Tensor, model: nn.Module = model) -> Tensor:
                    return model(x)

                own.__code__ = own.__code__.replace(co_name=f"own_{kernel}")
                x = sample().clone()
                got = torch.compile(own, backend=backend, options={"inner": spy})(x)
            if not torch.allclose(got, model(x), atol=1e-5):
                wrong.append(f"{kernel}: other results")
            for name, target in FUSED.items():
                if (target in spy.targets) != (name == kernel):
                    wrong.append(f"{kernel}: {target} {'was' if target in spy.targets else 'was not'} compiled")

    threads = [threading.Thread(target=work, args=(kernel,)) for kernel in FUSED]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    report = attnpass.report()
    assert sorted(site.kernel or "keep" for site in report.sites) == sorted([*FUSED] * rounds)
    assert len({site.graph for site in report.sites}) == 3 * rounds  # no number was given twice


def test_a_policy_around_is_of_its_thread_only() -> None:
    seen: list[Any] = []
    with attnpass.policy(kernel="native_math"):
        thread = threading.Thread(target=lambda: seen.append(attnpass.audit(Attention(), sample()).sites[0].kernel))
        thread.start()
        thread.join(60)
        seen.append(attnpass.audit(Attention(), sample()).sites[0].kernel)
    assert seen == ["native", "native_math"]


# -- processes ---------------------------------------------------------------------------------------------------------


def child(model: Any, x: Tensor, answers: Any) -> None:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    attnpass.reset()
    compiled = torch.compile(model, backend=backend, options={"inner": "eager", "kernel": "native_math"})
    answers.put((compiled(x).detach().numpy(), pickle.dumps(attnpass.report())))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_compiles_for_itself(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"there is no {method} here")
    torch.set_num_threads(1)
    model, x = Attention(), sample()
    torch.compile(model, backend=backend, options={"inner": "eager"})(x)
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forks beside threads
        process = context.Process(target=child, args=(model, x, answers))
        process.start()
    got, report = answers.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), atol=1e-5, rtol=1e-4)
    assert pickle.loads(report).sites[0].kernel == "native_math"
    assert [site.kernel for site in attnpass.report().sites] == ["native"]  # the parent's is the parent's


class Computed(Dataset[Tensor]):
    """Items that a compiled model makes, in the worker."""

    def __init__(self) -> None:
        self.model = torch.compile(Attention(), backend=backend, options={"inner": "eager"})

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(sample() + index)


@pytest.mark.slow
@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_compiled_model_in_workers_of_a_loader(compiled_before: bool) -> None:
    data = Computed()
    if compiled_before:
        data[0]
    wanted = [Attention()(sample() + i).detach() for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        got = list(DataLoader(data, batch_size=None, num_workers=2, timeout=120))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


# -- pickles -----------------------------------------------------------------------------------------------------------


def wide(spec: Any) -> bool:
    return bool(spec.qk_width > 8)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy(kernel=["native", "keep"], rules={"a.*": "flash", "b.py:3": "keep"}, strict=True),
        Policy(rules=[Rule(wide, "native")]),
    ],
    ids=["default", "rules", "predicate"],
)
def test_a_policy_is_pickled(policy: Policy) -> None:
    again = pickle.loads(pickle.dumps(policy))
    assert again == policy
    assert again.each_rule() == policy.each_rule()


def test_a_report_is_pickled_and_says_the_same() -> None:
    compiled = torch.compile(Attention(), backend=backend, options={"inner": "eager"}, dynamic=True)
    compiled(sample())
    report = attnpass.report()
    assert report.sites
    again = pickle.loads(pickle.dumps(report))
    assert again == report
    assert again.to_json() == report.to_json()
    assert str(again) == str(report)


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_compiled_and_called_in_a_mode(mode: Any, inner: str) -> None:
    model, x = Attention(), sample()
    with mode():
        compiled = torch.compile(model, backend=backend, options={"inner": inner})
        inside = sample()  # an inference tensor, in that mode
        torch.testing.assert_close(compiled(inside), model(inside))
    assert [(site.replaced, site.spec.grad) for site in attnpass.report().sites] == [(True, False)]
    # outside of it another graph is compiled, whose gradients are right
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(
        got, torch.autograd.grad(model(x).square().sum(), list(model.parameters())), atol=1e-5, rtol=1e-4
    )
    assert [site.spec.grad for site in attnpass.report().sites] == [False, True]


def left_alone(codes: tuple[str, ...]) -> None:
    report = attnpass.report()
    assert not report.failures
    reasons = [site.reason for site in report.sites if not site.replaced] + [miss.reason for miss in report.misses]
    assert report.sites or report.misses
    assert not report.replaced
    assert {one.code for one in reasons if one is not None} <= set(codes), reasons


@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_functorch(transform: str, where: str) -> None:
    """Transforms inside what is compiled, and around it: right results; what cannot be replaced is told of."""
    model = Attention()

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    def apply(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        if transform == "vmap":
            return torch.vmap(f)
        if transform == "grad":
            return torch.func.grad(f)
        return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    plain = apply(loss)
    options = {"inner": "eager"}
    if where == "inside":
        got = torch.compile(lambda x: plain(x), backend=backend, options=options)(sample())
        left_alone(("functorch", "not_lowered"))
    else:
        # Dynamo does not compile under a transform that it does not see; it runs the function as it is
        got = apply(torch.compile(loss, backend=backend, options=options))(sample())
    torch.testing.assert_close(got, plain(sample()), atol=1e-5, rtol=1e-4)
