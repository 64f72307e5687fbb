"""Expectations against the JSON form of a report: every difference, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from tests.zoo.case import TEXT, Case, Site

STRUCTURE = ("causal", "window", "prefix", "chunk", "document", "limited", "key_padding", "dense")


def differences(case: Case, report: dict[str, Any], *, grad: bool) -> list[str]:
    """What the report says otherwise than the case expects; empty when all is well. `grad`: something needs one."""
    sites, misses = report["sites"], report["misses"]
    found = [f"unexpected failure: {failure}" for failure in report.get("failures", ())]
    if len(sites) != len(case.sites):
        found.append(f"{len(sites)} sites, expected {len(case.sites)}")
    for index, (expected, site) in enumerate(zip(case.sites, sites, strict=False)):
        found += [f"site {index}: {text}" for text in _site(expected, site, grad)]
    codes, expected_codes = [m["reason"]["code"] for m in misses], [m.reason for m in case.misses]
    if codes != expected_codes:
        texts = "; ".join(m["reason"]["text"] for m in misses)
        found.append(f"misses {codes}, expected {expected_codes} ({texts})")
    return found


def _site(expected: Site, site: dict[str, Any], grad: bool) -> Iterable[str]:
    spec, reason = site["spec"], site["reason"]
    wanted: dict[str, Any] = {
        "q": list(expected.q),
        "k": list(expected.k),
        "v": list(expected.v),
        "dtype": expected.dtype,
        "groups": expected.groups,
        "scale": expected.scale,
        "softmax_dtype": expected.softmax_dtype,
        "dropout": expected.dropout,
        "softcap": expected.softcap,
        "sink": expected.sink,
        "empty_rows": expected.empty_rows,
        "mask": {name: _listed(getattr(expected, name)) for name in STRUCTURE},
        "bias": sorted(list(shape) for shape in expected.bias),
    }
    got = {name: spec[name] for name in wanted} | {"bias": sorted(list(bias["shape"]) for bias in spec["bias"])}
    for name, value in wanted.items():
        if not _agree(value, got[name]):
            yield f"{name} is {got[name]}, expected {value}"
    if site["replaced"] != expected.replaced or (reason["code"] if reason else None) != expected.reason:
        said = f"{reason['code']}: {reason['text']}" if reason else "no reason"
        refusals = [f"{v['kernel']}: {r['code']} {r['text']}" for v in site["verdicts"] for r in v["refusals"]]
        yield f"replaced is {site['replaced']} ({said} {refusals}), expected {expected.replaced} ({expected.reason})"
    if expected.replaced and not site["kernel"]:
        yield "replaced by no kernel"
    if expected.replaced:
        wanted_words = ["far above"] * expected.assumed
        # kernels keep no probabilities but their log-sum-exp, which a bias of finfo.min swallows
        wanted_words += ["no gradient"] * (
            grad and (bool(expected.bias) or expected.ungraded) and expected.empty_rows != "impossible"
        )
        said = site["assumptions"]
        if len(said) != len(wanted_words) or not all(any(w in text for text in said) for w in wanted_words):
            yield f"assumptions are {said}, expected {wanted_words}"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _agree(wanted: Any, got: Any) -> bool:
    if wanted == TEXT:
        return isinstance(got, str)
    if isinstance(wanted, list):
        return isinstance(got, list) and len(got) == len(wanted) and all(map(_agree, wanted, got))
    if isinstance(wanted, float):
        # a float32 tensor holds its scale to seven digits
        return isinstance(got, int | float) and math.isclose(wanted, got, rel_tol=1e-6)
    return bool(wanted == got)


_NAMES = ("softmax", "_softmax", "_safe_softmax", "special_softmax", "scaled_dot_product_attention")


def softmaxes(program: ExportedProgram) -> int:
    """How many operators called softmax (or the fused call) a program holds, its nested graphs included."""
    return sum(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.removeprefix("aten::") in _NAMES
        for module in program.graph_module.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
    )
