"""The policy that holds where none is given, field by field: the nearest place that speaks of a field decides it.

    options={...}, policy=Policy(...)     in code
    with attnpass.policy(...)             around it; inner ones before outer ones
    ATTNPASS_POLICY                       a JSON file, or JSON itself
    ATTNPASS_KERNEL                       a name, or several with commas between them
    the defaults

It is looked up when a graph is compiled or rewritten. torch.compile does that at the first call (and again when it
compiles anew for other shapes), so that call has to be made inside the ``with`` block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from attnpass.errors import AttnpassError
from attnpass.files import read_bounded
from attnpass.policy import Policy

KERNEL, POLICY = "ATTNPASS_KERNEL", "ATTNPASS_POLICY"
_LONGEST = 1 << 20  # bytes of a policy

_around: ContextVar[Mapping[str, Any]] = ContextVar("attnpass_policy", default=MappingProxyType({}))


@contextlib.contextmanager
def policy(**options: Any) -> Iterator[Policy]:
    """What is compiled or rewritten inside, in this thread, goes by these options where code gives no others.

    What has been compiled before stays as it is, and what is compiled inside is used outside, too.
    """
    inner = {**_around.get(), **options}
    Policy.from_options(inner)  # a wrong option is an error here, not at a compilation somewhere below
    token = _around.set(inner)
    try:
        yield resolved()
    finally:
        _around.reset(token)


def resolved(given: Policy | Mapping[str, Any] | None = None) -> Policy:
    """What is given, and for every field of which it does not speak what holds around it.

    Options speak of the fields that they name; a Policy speaks of those in which it differs from ``Policy()``.
    """
    return Policy.from_options({**_environment(), **_around.get(), **_said(given)})


def _said(given: Policy | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if not isinstance(given, Policy):
        return given or {}
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    default = Policy()
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _environment() -> dict[str, Any]:
    said: dict[str, Any] = {}
    for name, read in ((KERNEL, lambda text: {"kernel": text}), (POLICY, from_text)):
        text = os.environ.get(name, "").strip()
        if text:
            try:
                options = read(text)
                Policy.from_options(options)
            except AttnpassError as error:
                raise AttnpassError(f"{name}: {error}") from error
            said |= options
    return said


def from_text(text: str) -> dict[str, Any]:
    """Options in JSON, or from the JSON file of this name."""
    written, shown = text, "the text"
    if not text.startswith("{"):
        shown = text
        try:
            written = read_bounded(text, _LONGEST)
        except OSError as error:
            raise AttnpassError(f"{text} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise AttnpassError(f"{text} is no text") from error
        except ValueError as error:
            raise AttnpassError(f"{text!r} is no policy: {error}") from error
    try:
        options = json.loads(written)
    except json.JSONDecodeError as error:
        what = "is empty" if not written.strip() else f"is no JSON, or only part of it: {error}"
        raise AttnpassError(f"{shown} {what}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
        raise AttnpassError(f"{shown} is no policy: {error}") from error
    if not isinstance(options, dict):
        raise AttnpassError(f'{shown} is no JSON object such as {{"kernel": "flash"}}')
    return options
