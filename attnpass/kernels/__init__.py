"""The kernels that a site may be given to, in the order in which they are asked."""

from __future__ import annotations

import threading

from attnpass.errors import AttnpassError
from attnpass.kernels import plugins
from attnpass.kernels.aiter import Aiter
from attnpass.kernels.base import Capabilities, Kernel
from attnpass.kernels.flash import Flash, FlashVarlen
from attnpass.kernels.flash3 import Flash3, Flash3Hub, FlashVarlen3
from attnpass.kernels.flash4 import Flash4, FlashVarlen4
from attnpass.kernels.flex import Flex
from attnpass.kernels.native import Native
from attnpass.kernels.native_named import NativeCudnn, NativeEfficient, NativeFlash, NativeMath
from attnpass.kernels.native_varlen import NativeVarlen
from attnpass.kernels.npu import NativeNpu
from attnpass.kernels.sage import Sage, SageFp8Cuda, SageFp8CudaSm90, SageFp16Cuda, SageFp16Triton, SageVarlen
from attnpass.kernels.xformers import Xformers
from attnpass.kernels.xla import NativeXla
from attnpass.names import ALIASES, KEEP, plain
from attnpass.warn import warned

__all__ = ["Capabilities", "Kernel", "kernels", "register_kernel", "unregister_kernel"]

# Where two are expected to take as long, the first is taken.
_registered: list[Kernel] = [
    Native(),
    Flex(),
    Flash3(),
    Flash4(),
    Flash(),
    NativeVarlen(),
    FlashVarlen3(),
    FlashVarlen4(),
    FlashVarlen(),
    Xformers(),
    Sage(),
    SageVarlen(),
    Flash3Hub(),
    SageFp16Triton(),
    SageFp16Cuda(),
    SageFp8Cuda(),
    SageFp8CudaSm90(),
    NativeMath(),
    NativeFlash(),
    NativeEfficient(),
    NativeCudnn(),
    Aiter(),
    NativeNpu(),
    NativeXla(),
]

_lock = threading.RLock()  # a plugin may list kernels while it is loaded
_plugins_loaded = False


def kernels() -> tuple[Kernel, ...]:
    """All registered kernels, whether they can run here or not; those of other packages are loaded now."""
    global _plugins_loaded
    with _lock:
        if not _plugins_loaded:
            _plugins_loaded = True
            for kernel in plugins.found():
                try:
                    register_kernel(kernel)
                except AttnpassError as error:
                    warned(f"a kernel of an entry point was left out: {error}")
        return tuple(_registered)


def register_kernel(kernel: Kernel) -> Kernel:
    """Add a kernel; it is asked before those that are there. Its name must be new."""
    if not isinstance(kernel, Kernel):
        raise AttnpassError(f"register_kernel takes an instance of attnpass.Kernel, not {kernel!r}")
    if not isinstance(getattr(kernel, "name", None), str):
        raise AttnpassError(f"{type(kernel).__name__} has no name")
    name = plain(kernel.name)
    if name in ALIASES or name in (KEEP, ""):
        raise AttnpassError(f"a kernel cannot be named {kernel.name!r}, which has a meaning already")
    with _lock:
        if any(name == plain(other.name) for other in _registered):
            raise AttnpassError(f"a kernel named {kernel.name!r} is registered already")
        _registered.insert(0, kernel)
    return kernel


def unregister_kernel(name: str) -> None:
    """Take a registered kernel out again."""
    for kernel in kernels():
        if kernel.name == name:
            _registered.remove(kernel)
            return
    raise AttnpassError(f"no kernel named {name!r} is registered")
