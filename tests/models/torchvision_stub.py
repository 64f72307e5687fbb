"""torchvision importable although its binary operators do not fit the installed torch.

timm and torchvision's own transformers need only its Python code. When the extension cannot be loaded, the import
fails on a missing operator schema; declaring the schemas (without kernels) is enough. Nothing is done where torchvision
imports by itself.
"""

from __future__ import annotations

import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[torch.library.Library] = []


def ensure() -> None:
    """Make `import torchvision` work, once."""
    if "torchvision" in sys.modules:
        return
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _kept.append(library)
        import torchvision  # noqa: F401
