"""What must become of a program that is whole: it is replaced, unless a limit that docs/ states stands in the way."""

from __future__ import annotations

from collections.abc import Container

from tests.fuzz.masks import keeps
from tests.fuzz.programs import Bias, Cap, Floor, Mask, Number, Program, Scale, Step, ToFloat
from tests.fuzz.spelled import MODULE_SCALES, SCALES, TENSOR_SCALES

# What flash-attn and its kind have arguments for, alone.
_FORMS = {"nothing", "causal", "window", "two-sided"}
_KEYS = {"padding", "lengths"}
_COMPUTED = {"alibi", "alibi of a buffer", "distance"}


def limit(program: Program, device: str = "cpu") -> str | None:
    """Why this program need not be replaced; None: it must be."""
    p = program
    if p.damage is not None:
        return "damaged"
    if p.called is not None:
        return "a call that is there already is replaced only where that gains"
    if p.dropout == "live":
        return "live dropout has no fused form on the CPU, and draws other numbers elsewhere"
    if device == "cpu" and max(p.shape.width, p.shape.v_width) > 2 * min(p.shape.width, p.shape.v_width):
        return "widths too unlike for the CPU's kernel"
    narrow = p.dtype != "float32" or p.autocast
    if device == "cuda" and any(width % (8 if narrow else 4) for width in (p.shape.width, p.shape.v_width)):
        return "a width that torch's CUDA kernels do not load"
    if device == "cuda" and narrow and _wide_bias(p):
        return "a bias of float32 that CUDA's kernels of half precision would round"
    if any(abs(number) >= 6e4 for number in p.numbers):
        return "scores may be lost beside a number"
    if p.numbers and p.softmax == "by hand, no maximum":
        return "bare exponentials may not bear a number"
    if p.sink and (p.numbers or any(isinstance(step, Floor) for step in p.steps)):
        return "a constant beside a sink is no constant, nor is a sink clamped"
    if _inside_a_cap(p):
        return "a number inside a soft cap moves scores before they are bent"
    if _clamped_before(p):
        return "a clamp that is not the last step"
    if narrow and any(mask.apply == "add where, in float32" for mask in p.masks):
        return "a sum in float32 that is cast to a narrower type"
    if p.dtype == "float16" and any(mask.fill == "half of min" for mask in p.masks):
        return "a fill that ordinary scores may outweigh"
    if any(mask.fill == "-10000" for mask in p.masks):
        return "a fill that ordinary scores may outweigh"
    if p.dtype == "float16" and any(m.fill.startswith("min") for m in p.masks) and _scaled_afterwards(p, SCALES):
        return "float16's lowest number, scaled down, is a fill that ordinary scores may outweigh"
    if p.dtype == "float16" and any(m.fill == "min of q" for m in p.masks) and (p.upcast or ToFloat() in p.steps):
        return "float16's lowest number is a fill that scores in float32 may outweigh"
    if p.dtype == "float16" and _data_scaled_afterwards(p):
        return "scores that float16 may lose beside data that are added and scaled down afterwards"
    added = any(map(_is_added, p.steps))
    if added and any(isinstance(step, Scale) and step.form == "twice" for step in p.steps):
        return "what is added may be -inf between two factors"
    if _scaled_down_together(p):
        return "what is added in several places may together be -inf before it is scaled"
    if p.dtype == "float16" and _widened_between(p):
        return "scores lost in float16 are not lost in a later sum in float32"
    if p.autocast and p.front == "export" and p.softmax == "clamped":
        return "a tensor written in the code of an autocast region is an input of that region when it is exported"
    if _scaled_afterwards(p, MODULE_SCALES | TENSOR_SCALES):
        return "a tensor that multiplies masked or capped scores may be zero or negative"
    if device == "cpu" and p.grad and any(bias.kind == "table" for bias in p.biases) and p.kernel != "fuzz_tensor":
        return "a bias that needs a gradient has no fused form on the CPU"
    if _added_inside_a_product(p):
        return "what is added inside a mask by multiplication may be infinite, and infinity times zero is no number"
    low = added or any(mask.fill != "-inf" for mask in p.masks)
    if low and p.softmax in ("by hand, no maximum", "log-sum-exp"):
        return "these spellings of softmax have no simple answer beside low numbers"
    if p.sink and any(bias.kind == "number" for bias in p.biases):
        return "a constant beside a sink is no constant"
    if p.cap or p.sink:
        return _by_a_kernel_with(p)
    return None


def _wide_bias(p: Program) -> bool:
    """One that is computed in float32, added where the scores are of float32 as well."""
    at = 0 if p.upcast else next((n for n, step in enumerate(p.steps) if isinstance(step, ToFloat)), len(p.steps))
    added = (step for step in p.steps[at:] if isinstance(step, Bias))
    return any(bias.kind in _COMPUTED or bias.form == "torch.add" for bias in added)


def _widened_between(p: Program) -> bool:
    at = next((n for n, step in enumerate(p.steps) if isinstance(step, ToFloat)), len(p.steps))
    return any(map(_is_added, p.steps[:at])) and any(isinstance(s, Bias | Mask) for s in p.steps[at:])


def _scaled_down_together(p: Program) -> bool:
    last = max((at for at, step in enumerate(p.steps) if isinstance(step, Scale)), default=0)
    inside = [step for step in p.steps[:last] if isinstance(step, Bias | Mask)]
    return len(inside) > 1 and any(map(_is_added, inside[1:]))


def _data_scaled_afterwards(p: Program) -> bool:
    data = (at for at, step in enumerate(p.steps) if isinstance(step, Bias) and step.kind != "number")
    return any(isinstance(step, Scale) for step in p.steps[next(data, len(p.steps)) :])


def _inside_a_cap(p: Program) -> bool:
    first = next((at for at, step in enumerate(p.steps) if isinstance(step, Number)), len(p.steps))
    return any(isinstance(step, Cap) for step in p.steps[first:])


def _clamped_before(p: Program) -> bool:
    first = next((at for at, step in enumerate(p.steps) if isinstance(step, Floor)), len(p.steps))
    return any(isinstance(step, Scale | Mask | Bias | Cap) for step in p.steps[first:])


def _added_inside_a_product(p: Program) -> bool:
    at = next(
        (n for n, s in reversed(list(enumerate(p.steps))) if isinstance(s, Mask) and s.apply.startswith("mult")), 0
    )
    return any(_is_added(s) or (isinstance(s, Mask) and s.fill == "-inf") for s in p.steps[:at])


def _is_added(step: Step) -> bool:
    return isinstance(step, Bias) or (isinstance(step, Mask) and step.apply.startswith(("add", "sub")))


def _scaled_afterwards(p: Program, forms: Container[str]) -> bool:
    first = next((at for at, step in enumerate(p.steps) if isinstance(step, Mask | Cap)), len(p.steps))
    return any(isinstance(step, Scale) and step.form in forms for step in p.steps[first:])


def _by_a_kernel_with(p: Program) -> str | None:
    """Soft caps and sinks are served by few kernels, each with masks of its own."""
    kinds = {mask.kind for mask in p.masks}
    clamped = p.softmax == "clamped" or any(isinstance(step, Floor) for step in p.steps)
    if p.cap and p.grad and (p.masks or (p.biases and clamped)):
        return "gradients through the soft cap of a row without a key"
    if p.kernel == "fuzz_tensor":
        return "no kernel has a sink and takes any mask" if p.sink else None
    if p.kernel == "fuzz_forms":
        spelled = [keeps(mask.kind, mask.spelling) for mask in p.masks]
        if any(one.needs == "causal_buffer" for one in spelled):
            return "a mask in a buffer is data, which flash-attn has no argument for"
        if clamped and kinds & _KEYS:
            return "what a query without any key gets behind a clamp depends on the order, and is no argument"
        if p.biases or len(p.masks) > 1 or not (kinds <= _FORMS or kinds <= _KEYS):
            return "a mask or bias that flash-attn has no argument for"
        return None
    if p.kernel == "fuzz_functions":
        if p.front != "compile":
            return "functions are fused only where inductor compiles"
        if any(mask.kind == "no key" and _is_added(mask) for mask in p.masks):
            return "an addition that masks every key is no function"
        if p.dtype == "float16" and p.biases:
            return "a bias that is data is no function in float16, whose lowest number is an ordinary one in float32"
        if clamped and (p.biases or p.masks):
            return "data that may be -inf, clamped, is no function"
        return "masks of several kinds are no function" if len(p.masks) + len(p.biases) > 1 else None
    return "torch's own kernel has no soft cap and no sink"
