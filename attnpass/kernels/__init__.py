"""The kernels that a site may be given to, in the order in which they are asked."""

from __future__ import annotations

from attnpass.errors import AttnpassError
from attnpass.kernels.base import Capabilities, Kernel
from attnpass.kernels.flex import Flex
from attnpass.kernels.native import Native

__all__ = ["Capabilities", "Kernel", "kernels", "register_kernel", "unregister_kernel"]

_registered: list[Kernel] = [Native(), Flex()]


def kernels() -> tuple[Kernel, ...]:
    """All registered kernels, whether they can run here or not."""
    return tuple(_registered)


def register_kernel(kernel: Kernel) -> Kernel:
    """Add a kernel; it is asked before those that are there. Its name must be new."""
    if not isinstance(kernel, Kernel):
        raise AttnpassError(f"register_kernel takes an instance of attnpass.Kernel, not {kernel!r}")
    if any(kernel.name == other.name for other in _registered):
        raise AttnpassError(f"a kernel named {kernel.name!r} is registered already")
    _registered.insert(0, kernel)
    return kernel


def unregister_kernel(name: str) -> None:
    """Take a registered kernel out again."""
    for kernel in _registered:
        if kernel.name == name:
            _registered.remove(kernel)
            return
    raise AttnpassError(f"no kernel named {name!r} is registered")
