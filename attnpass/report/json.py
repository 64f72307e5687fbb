"""The stable form of a report, for programs. docs/audit.md documents it field by field.

Every key is always present: what is unknown is null, never absent. Within version 1 keys may be added but none is
removed or changes its meaning, so readers should ignore keys that they do not know. The text is strict JSON: a number
that is not finite becomes null, or its name where the field may hold text.
"""

from __future__ import annotations

import json
import math
from typing import Any

from attnpass.ledger import Decision, Failure, Miss, Report, Trial, Verdict, Where
from attnpass.reasons import Reason
from attnpass.spec import AttentionSpec, BiasSpec, MaskSpec

VERSION = 1


def to_json(report: Report, *, indent: int | None = 2) -> str:
    """Strict JSON; `indent=None` gives one line."""
    return json.dumps(to_dict(report), indent=indent, allow_nan=False)


def to_dict(report: Report) -> dict[str, Any]:
    """The same as plain dictionaries, lists, texts and numbers."""
    return {
        "version": VERSION,
        "torch": report.torch,
        "sites": [_site(site) for site in report.sites],
        "misses": [_miss(miss) for miss in report.misses],
        "failures": [_failure(failure) for failure in report.failures],
        "notes": list(report.notes),
    }


def _site(site: Decision) -> dict[str, Any]:
    return {
        "id": site.id,
        "graph": site.graph,
        "where": _where(site.where),
        "spec": _spec(site.spec),
        "replaced": site.replaced,
        "kernel": site.kernel,
        "asked": list(site.asked),
        "reason": None if site.reason is None else _reason(site.reason),
        "verdicts": [_verdict(verdict) for verdict in site.verdicts],
        "assumptions": list(site.assumptions),
        "proofs": list(site.proofs),
        "saves": {"bytes": site.saves.bytes, "us": finite(site.saves.us)},
        "trials": [_trial(trial) for trial in site.trials],
        "untried": site.untried,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "inputs": trial.inputs,
        "what": trial.what,
        "original": finite(trial.original),
        "replacement": finite(trial.replacement),
        "allowed": finite(trial.allowed),
        "worse": trial.worse,
        "detail": trial.detail,
    }


def _miss(miss: Miss) -> dict[str, Any]:
    return {
        "id": miss.id,
        "graph": miss.graph,
        "where": _where(miss.where),
        "reached": list(miss.reached),
        "reason": _reason(miss.reason),
        "shape_hash": miss.shape_hash,
    }


def _failure(failure: Failure) -> dict[str, Any]:
    return {"graph": failure.graph, "part": failure.part, "stage": failure.stage, "text": failure.text}


def _where(where: Where) -> dict[str, Any]:
    return {
        "module": where.module,
        "class": where.cls,
        "file": where.file,
        "line": where.line,
        "code": where.code,
    }


def _reason(reason: Reason) -> dict[str, Any]:
    return {"code": reason.code, "text": reason.text}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "kernel": verdict.kernel,
        "refusals": [_reason(refusal) for refusal in verdict.refusals],
        "cost_us": finite(verdict.cost_us),
        "timed": verdict.timed,
    }


def _spec(spec: AttentionSpec) -> dict[str, Any]:
    return {
        "q": list(spec.q),
        "k": list(spec.k),
        "v": list(spec.v),
        "dtype": spec.dtype,
        "device": spec.device,
        "scale": _number_or_text(spec.scale),
        "groups": spec.groups,
        "softmax_dtype": spec.softmax_dtype,
        "dropout": _number_or_text(spec.dropout),
        "softcap": spec.softcap if isinstance(spec.softcap, str) else finite(spec.softcap),
        "sink": spec.sink,
        "bias": [_bias(bias) for bias in spec.bias],
        "mask": _mask(spec.mask),
        "empty_rows": spec.empty_rows.value,
        "grad": spec.grad,
        "inference": spec.inference,
        "deterministic": spec.deterministic,
        "weights_used": spec.weights_used,
    }


def _bias(bias: BiasSpec) -> dict[str, Any]:
    return {"shape": list(bias.shape), "dtype": bias.dtype, "grad": bias.grad, "exact": bias.exact}


def _mask(mask: MaskSpec) -> dict[str, Any]:
    return {
        "causal": mask.causal,
        "window": None if mask.window is None else list(mask.window),
        "prefix": mask.prefix,
        "chunk": mask.chunk,
        "document": mask.document,
        "limited": mask.limited,
        "key_padding": mask.key_padding,
        "dense": mask.dense,
    }


def finite(number: float | None) -> float | None:
    """The number, or None where it is none that JSON has."""
    return number if number is not None and math.isfinite(number) else None


def _number_or_text(number: float | str) -> float | str:
    return number if isinstance(number, str) or math.isfinite(number) else str(number)
