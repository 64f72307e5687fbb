"""What a real tensor holds, as a closed form: the mask that a model keeps in a buffer.

    tril(ones(n, n)).view(1, 1, n, n)    constant along dims 0 and 1, then a function of j - i:  1 up to 0, else 0
    arange(n)                            a function of k:  0 + 1 * k

A tensor is read whole. Dimensions along which it is constant drop out; what remains is a number, a vector, or a matrix
that has the same values along every diagonal (causal, window, band, distance ...), so it is a function of one integer.
That function is a few steps or an arithmetic progression. All comparisons are of bits, so a form is all that is to be
known of the tensor: two tensors of one form are equal, zeros with a sign and NaN included.

Nothing is copied but one row and one column. What fits no form (a prefix, documents, a learned bias) has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.weak import WeakTensorKeyDictionary

from attnpass.masks.expr import Int, Poly, Value
from attnpass.masks.lift import liftable
from attnpass.masks.logic import ge, ite
from attnpass.masks.numeric import literal

_MAX_STEPS = 8
_CHUNK = 1 << 24  # elements compared at a time: on some devices a comparison makes a tensor of its own
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Steps:
    """From each start on (up to the next one) the value whose bits are given; below the second start the first."""

    starts: tuple[int, ...]
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Ramp:
    """first + step * k, all of them integers that the dtype holds exactly."""

    first: int
    step: int


@dataclass(frozen=True)
class Form:
    """The whole content of a tensor, as a function of one integer."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    plus: int | None  # the dimension whose index is that integer ...
    minus: int | None  # ... less the index of this one
    line: Steps | Ramp

    def at(self, index: tuple[Poly, ...]) -> Value:
        """The element at this index, which is taken to lie within the tensor."""
        k = Poly({})
        if self.plus is not None:
            k = k + index[self.plus]
        if self.minus is not None:
            k = k - index[self.minus]
        if isinstance(self.line, Ramp):
            integer = k * self.line.step + self.line.first
            return Int(integer) if self.dtype.is_floating_point else integer
        numbers = [literal(_number(bits, self.dtype), self.dtype) for bits in self.line.bits]
        out: Value = numbers[0]
        for start, number in zip(self.line.starts[1:], numbers[1:], strict=True):
            out = ite(ge(k - start), number, out)
        return out

    def __str__(self) -> str:
        if isinstance(self.line, Ramp):
            text = f"{self.line.first} + {self.line.step} * k"
        else:
            numbers = [f"{_number(bits, self.dtype):g}" for bits in self.line.bits]
            later = zip(self.line.starts[1:], numbers[1:], strict=True)
            text = ", ".join([numbers[0], *(f"from k = {start} on {number}" for start, number in later)])
        if self.plus is None:
            return f"{text} everywhere"
        return f"{text} (k: column {'less row' if self.minus is not None else 'or row'})"


_forms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def forget() -> None:
    """Before a new compilation: writes that are counted nowhere shall not outlive it."""
    _forms.clear()


def form_of(tensor: Tensor) -> Form | None:
    """The form of a tensor, None where it has none. Remembered as long as the tensor is not written."""
    if tensor.is_inference():
        return _form(tensor)  # keeps no count of its writes
    now = (tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride())
    found: tuple[object, Form | None] | None = _forms.get(tensor)  # type: ignore[no-untyped-call]
    if found is None or found[0] != now:
        found = now, _form(tensor)
        _forms[tensor] = found
    return found[1]


def readable(tensor: Tensor) -> bool:
    """An ordinary tensor with numbers in it, in one of the dtypes that masks are made of."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and liftable(tensor.dtype)
        and not tensor.is_meta
        and not tensor.is_neg()
        and tensor.numel() > 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _form(tensor: Tensor) -> Form | None:
    # the pass runs within compilations, where new tensors would be fake
    with unset_fake_temporarily(), torch.no_grad():
        return _read(tensor)


def _read(tensor: Tensor) -> Form | None:
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    varies = [d for d in range(bits.dim()) if not _constant_along(bits, d)]
    for d in range(bits.dim()):
        if d not in varies:
            bits = bits.narrow(d, 0, 1)
    bits = bits.squeeze([d for d in range(bits.dim()) if d not in varies])
    if len(varies) > 2:
        return None
    plus, minus, first = None, None, 0
    if len(varies) == 2:
        if not _same(bits[1:, 1:], bits[:-1, :-1]):
            return None
        minus, plus = varies
        first = 1 - len(bits)
        bits = torch.cat((bits[:, 0].flip(0), bits[0, 1:]))  # from the lowest diagonal to the highest
    elif varies:
        plus = varies[0]
    line = _line(bits.reshape(-1), first, tensor.dtype)
    return None if line is None else Form(tuple(tensor.shape), tensor.dtype, plus, minus, line)


def _constant_along(bits: Tensor, dim: int) -> bool:
    size = bits.shape[dim]
    if size == 1 or bits.stride(dim) == 0:
        return True
    rest = bits.narrow(dim, 1, size - 1)
    return _same(rest, bits.narrow(dim, 0, 1).expand_as(rest))


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal everywhere; looked at piece by piece, so a difference near the beginning is found at once."""
    if a.numel() <= _CHUNK:
        return torch.equal(a, b)
    dim = max(range(a.dim()), key=lambda d: a.shape[d])
    step = max(1, a.shape[dim] * _CHUNK // a.numel())
    starts = range(0, a.shape[dim], step)
    return all(_same(_piece(a, dim, at, step), _piece(b, dim, at, step)) for at in starts)


def _piece(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    return tensor.narrow(dim, start, min(length, tensor.shape[dim] - start))


def _line(bits: Tensor, first: int, dtype: torch.dtype) -> Steps | Ramp | None:
    """A vector as a function of first, first + 1, ..."""
    line = bits.cpu()
    places = (line[1:] != line[:-1]).nonzero().reshape(-1) + 1
    if len(places) < _MAX_STEPS:
        starts = [0, *places.tolist()]
        if dtype.is_floating_point and not _speaks_of_masking(line[starts].view(dtype)):
            return None
        return Steps(tuple(first + k for k in starts), tuple(int(line[k]) for k in starts))
    if dtype == torch.bool:
        return None
    numbers = line[:2].view(dtype).double() if dtype.is_floating_point else line[:2].view(dtype)
    if not bool(torch.isfinite(numbers).all()) or bool((numbers != numbers.trunc()).any()):
        return None
    one, two = (int(number) for number in numbers)
    step = two - one
    last = one + step * (len(line) - 1)
    if max(abs(one), abs(last)) >= 2**53:
        return None
    ramp = torch.arange(len(line), dtype=torch.int64) * step + one
    if not torch.equal(ramp.to(dtype).view(line.dtype), line) or not torch.equal(ramp.to(dtype).to(torch.int64), ramp):
        return None
    return Ramp(one - step * first, step)


def _speaks_of_masking(numbers: Tensor) -> bool:
    """One number, or zero and another one. Other floats (slopes of heads) are data: nothing is proved from them, and as
    data they are recognised for what they are.
    """
    distinct = set(numbers.tolist())
    return len(distinct) == 1 or (len(distinct) == 2 and 0.0 in distinct)


def _number(bits: int, dtype: torch.dtype) -> float:
    """The Python number with these bits."""
    size = torch.empty(0, dtype=dtype).element_size()
    number: float = torch.tensor([bits], dtype=_BITS[size]).view(dtype).item()
    return number
