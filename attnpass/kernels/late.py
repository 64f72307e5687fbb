"""Packages of kernels: imported when a kernel is asked whether it can run here, never before, never with an error.

Three things go wrong in practice and have different cures: the package is absent; it was built against another torch or
another Python (undefined symbol); it is linked to a CUDA runtime that this machine does not have.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import torch

from attnpass.errors import first_line


@functools.cache
def imported(name: str, package: str, install: str) -> ModuleType | str:
    """A module, or what is missing for it and what to do; `package` is what people call it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a package says of itself is no reason to do without it
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return f"{package} is not installed: {install}"
        return f"{package} cannot be imported, it needs {error.name}"
    except Exception as error:  # a broken build may raise anything
        why = first_line(error)
        if "libcudart" in why:
            library = next((word.strip(":,") for word in why.split() if "libcudart" in word), "libcudart")
            major = library.rpartition(".")[2]
            why += f"; it was built for CUDA {major}: pip install nvidia-cuda-runtime-cu{major}, and preload {library}"
        elif "undefined symbol" in why:
            why += "; it was built for another torch: install a build for this one"
        return f"{package} cannot be imported: {why}"


def version_of(*distributions: str) -> str:
    """The version of the first of these that is installed; nothing is imported."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def build_of(package: str) -> str:
    """What tells builds without a version apart, for tables and caches; nothing is imported."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # it was put in place by hand
        spec = None
    folders = spec.submodule_search_locations if spec is not None else None
    libraries = [path for folder in folders or () for path in Path(folder).glob("*.so")]
    return f"unversioned, {sum(path.stat().st_size for path in libraries)} bytes" if libraries else ""


def at_least(version: str, oldest: tuple[int, int]) -> bool:
    """The first two numbers of a version, compared; without a version: no."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) >= oldest


def unfit_gpu(majors: range, called: str) -> str | None:
    """Why the GPU here is none of those that a kernel was written for: NVIDIA's, by the major compute capability."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return f"needs an NVIDIA GPU ({called})"
    major, minor = torch.cuda.get_device_capability()
    return None if major in majors else f"needs a GPU of {called}; this one has compute capability {major}.{minor}"
