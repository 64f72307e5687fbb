# ruff: noqa: E501  (the texts are lines of the package)
"""Ways of breaking the pass on purpose, and the tests that must notice each.

A row replaces one text, which stands exactly once in its file, by another; ``tests`` are arguments of pytest that take
seconds. The rows are spread over all stages: what is recognised, what memory holds, what masks mean, which kernel may
serve, what is written, what is checked, what is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One way of breaking the pass."""

    name: str
    file: str  # below attnpass/
    old: str
    new: str
    tests: tuple[str, ...]


def _zoo(*cases: str) -> tuple[str, ...]:
    """The cases of the zoo whose names hold these texts, through torch.export."""
    chosen = " or ".join(cases)
    return ("tests/test_zoo.py", "-k", f"TestExportedProgram and not twice and ({chosen})")


def _compiled(*cases: str) -> tuple[str, ...]:
    return ("tests/test_zoo.py", "-k", f"torch_compile and ({' or '.join(cases)})")


def _only(file: str, *names: str) -> tuple[str, ...]:
    return (f"tests/{file}", *(("-k", " or ".join(names)) if names else ()))


RECOGNIZE = (
    Mutant(
        "the scale of the scores is dropped",
        "recognize/scores.py",
        "    return at.step(source, w.place(at, source).layout, factor=at.factor.times(factor))",
        "    return at.step(source, w.place(at, source).layout)",
        _zoo("scores-times-a-number"),
    ),
    Mutant(
        "a division multiplies",
        "recognize/scores.py",
        "    return _scaled(w, at, a, b, -1)",
        "    return _scaled(w, at, a, b, 1)",
        _zoo("scores-over-an-integer"),
    ),
    Mutant(
        "a subtracted bias is added",
        "recognize/scores.py",
        '(1, -alpha) if name == "sub"',
        '(1, alpha) if name == "sub"',
        _zoo("a-bias-taken-away"),
    ),
    Mutant(
        "weights of single scores pass for a scale",
        "recognize/scores.py",
        "        if own & keys and own - keys:",
        "        if False:",
        _zoo("a-weight-for-each-score"),
    ),
    Mutant(
        "masked_fill keeps what it should fill",
        "recognize/fills.py",
        'layer = filled(w, at, args["mask"], off=True, fill=fill)',
        'layer = filled(w, at, args["mask"], off=False, fill=fill)',
        _zoo("masked-fill-where-the-mask-is-on"),
    ),
    Mutant(
        "where keeps what it should drop",
        "recognize/fills.py",
        "layer = filled(w, at, condition, off=not in_yes, fill=fill)",
        "layer = filled(w, at, condition, off=in_yes, fill=fill)",
        _zoo("where-keeps-the-scores", "where-drops-the-scores"),
    ),
    Mutant(
        "a mask inside a soft cap masks",
        "recognize/fills.py",
        "    if at.softcap is not None:\n        # tanh of a fill",
        "    if False:\n        # tanh of a fill",
        _zoo("a-mask-inside-a-softcap"),
    ),
    Mutant(
        "a bias inside a soft cap stands outside",
        "recognize/walk.py",
        '        if at.softcap is not None:\n            raise Refuse("term_inside_softcap", at.node)\n        size',
        "        size",
        _zoo("a-bias-inside-a-softcap"),
    ),
    Mutant(
        "a cap may be negative",
        "recognize/scores.py",
        "return factor.number if factor.number > 0 else None",
        "return abs(factor.number)",
        _zoo("a-negative-softcap"),
    ),
    Mutant(
        "infinity times zero is a fill",
        "recognize/fills.py",
        "    if not at.factor.is_number or (at.weighed and fill == -math.inf):",
        "    if not at.factor.is_number:",
        _zoo("infinity-times-zero"),
    ),
    Mutant(
        "a fill that overflows between two factors comes back",
        "recognize/fills.py",
        "    if math.isinf(at.largest(fill, floating(at))):",
        "    if False:",
        _zoo("the-lowest-number-scaled-up-and-down"),
    ),
    Mutant(
        "any tensor is a mask of 0 and 1",
        "recognize/fills.py",
        "            if not is_indicator(w, mask):",
        "            if False:",
        _zoo("openai-gpt-with-a-buffer", "a-soft-gate"),
    ),
    Mutant(
        "the maximum over any axis may be taken away",
        "recognize/scores.py",
        "    if reduced != set(w.axes.resolve_dim(w.over)):\n        return False",
        "    if False:\n        return False",
        _zoo("the-largest-score-of-each-key-taken-away"),
    ),
    Mutant(
        "gradients flow through detach",
        "recognize/scores.py",
        '    if source.meta.get("attnpass_grad", False):\n        raise Refuse("unknown_op", at.node, op="detach',
        '    if False:\n        raise Refuse("unknown_op", at.node, op="detach',
        _zoo("scores-are-detached"),
    ),
    Mutant(
        "dropout on the scores is forgotten",
        "recognize/scores.py",
        '    if args["train"] and args["p"] != 0:\n        raise Refuse("nonlinear_scores", at.node, op="dropout")',
        "    if False:\n        raise",
        _zoo("dropout-on-the-scores-in-training"),
    ),
    Mutant(
        "the softmax always runs over the last dimension",
        "recognize/find.py",
        "    over = tuple(a for d in anchor.dims for a in layout[d])",
        "    over = tuple(layout[-1])",
        _zoo("softmax-over-queries", "softmax-over-dim-minus-two"),
    ),
    Mutant(
        "alpha of baddbmm is dropped",
        "recognize/walk.py",
        "        factor = at.factor.times(self.factor_of(at, product.alpha, 1))",
        "        factor = at.factor",
        _zoo("baddbmm-of-an-empty"),
    ),
    Mutant(
        "what baddbmm adds is never read",
        "recognize/products.py",
        "    ignored = isinstance(beta, int | float) and beta == 0  #",
        "    ignored = True  #",
        _zoo("bloom-alibi"),
    ),
    Mutant(
        "live dropout is dropped",
        "recognize/weights.py",
        '            self.out.dropout = args["p"]',
        "            self.out.dropout = 0.0",
        _zoo("dropout-in-training"),
    ),
    Mutant(
        "probabilities may be scaled by the second product",
        "recognize/weights.py",
        "        if product.extra is not None or product.alpha != 1:",
        "        if False:",
        _zoo("values-joined-with-a-residual"),
    ),
    Mutant(
        "the scale of q is dropped",
        "recognize/operands.py",
        "        scale *= factor",
        "        scale *= 1.0",
        _zoo("query-times-a-number"),
    ),
    Mutant(
        "a narrowing cast of q is undone",
        "recognize/operands.py",
        "before.device != val.device or not widens(before.dtype, val.dtype):",
        "before.device != val.device:",
        _only("recognize/test_operands.py"),
    ),
    Mutant(
        "products in float32 are computed in bfloat16",
        "recognize/assemble.py",
        "        narrow = scores == torch.float32 and all(",
        "        narrow = True or all(",
        _zoo("everything-widened-and-left-wide", "queries-changed-in-float32", "scores-in-double"),
    ),
    Mutant(
        "repeat_interleave lays the copies one after the other",
        "recognize/views.py",
        "    major, _ = axes.regroup((layout[at],), (shape[at], times))",
        "    _, major = axes.regroup((layout[at],), (times, shape[at]))",
        _zoo("repeat-kv-by-repeat-interleave"),
    ),
    Mutant(
        "repeat lays each copy beside its original",
        "recognize/views.py",
        "axes.regroup((dim,), (times, size))[1])",
        "axes.regroup((dim,), (size, times))[0])",
        _zoo("key-heads-tiled"),
    ),
    Mutant(
        "an axis is cut where it does not divide",
        "recognize/axes.py",
        "        if not same(major * minor, size):",
        "        if False:",
        _only("recognize/test_axes.py"),
    ),
    Mutant(
        "a weak fill is a mask",
        "recognize/meaning.py",
        '            obstacles.append(reason("weak_fill", fill=f"{fill.value:g}"))',
        "            pass",
        _zoo("a-fill-of-minus-ten-thousand"),
    ),
    Mutant(
        "weights that are read elsewhere are no obstacle",
        "recognize/assemble.py",
        ", *_used(others, out)),",
        "),",
        _zoo("the-weights-are-returned"),
    ),
    Mutant(
        "exp without the row maximum gives a mean, too",
        "recognize/assemble.py",
        "    low = EmptyRow.MEAN if found.at.centred else anchor.low",
        "    low = EmptyRow.MEAN",
        _zoo("exp-over-sum-of-a-finite", "exp-minus-logsumexp-of-a"),
    ),
)

MEMORY = (
    Mutant(
        "writes before the fused call are not looked for",
        "recognize/purity.py",
        "        if any(start < position < stop for position, _, _ in self.writers.get(group, ())):\n            return False",
        "        pass",
        _zoo("queries-written-between", "the-bias-is-written-after", "the-keys-are-overwritten"),
    ),
    Mutant(
        "a write to one input is none to another",
        "recognize/purity.py",
        "        return not (group in self._external and any(start < position < stop for position in self._external_writes))",
        "        return True",
        _only("recognize/test_purity.py"),
    ),
    Mutant(
        "a write to a part is a write to the whole",
        "recognize/purity.py",
        "        if target is None or _writes_and_alias(writer.target) is None or self._origin(target) is not self._origin(node):",
        "        if False:",
        _zoo("part-of-the-scores-set", "keys-written-through-a-view"),
    ),
    Mutant(
        "operands are read earlier than they were",
        "recognize/operands.py",
        "        if not effects.unchanged(node, effects.position[node_before] - 1, stop):\n            return out",
        "        pass",
        _zoo("keys-written-before-they-are-read", "a-call-whose-keys-are-written"),
    ),
    Mutant(
        "no gradient is asked of inputs",
        "recognize/gradients.py",
        '        return recorded or bool(node.meta.get("attnpass_grad", False))',
        "        return False",
        _only("recognize/test_gradients.py"),
    ),
    Mutant(
        "a result that is written later is the kernel's own",
        "emit.py",
        "if site.output_written and site.spec.grad else out",
        "if False else out",
        _zoo("the-output-is-written-in-place"),
    ),
)

MASKS = (
    Mutant(
        "an upper bound is one key further",
        "masks/structure.py",
        "                return replace(out, upper=offset)",
        "                return replace(out, upper=offset + 1)",
        _only("masks/test_closed_forms.py", "causal and tril and ones"),
    ),
    Mutant(
        "a window is one key longer",
        "masks/structure.py",
        "                return replace(out, lower=offset)",
        "                return replace(out, lower=offset + 1)",
        _only("masks/test_closed_forms.py", "window and triangle"),
    ),
    Mutant(
        "any diagonal is the causal flag",
        "spec.py",
        "    return spec.mask == MaskSpec(causal=0) and not spec.bias",
        "    return spec.mask.causal is not None and not spec.bias",
        _zoo("causal-from-the-bottom-right"),
    ),
    Mutant(
        "a proof that disagrees is believed",
        "prove.py",
        "    if proof.agreed is False:",
        "    if False:",
        _only("test_prove.py", "mistake"),
    ),
    Mutant(
        "any bias is taken for an ordinary one",
        "prove.py",
        "    if not all(_ordinary(added, tame) for added in proof.biases):\n        return None",
        "    pass",
        _zoo("a-bias-inside-a-finite-fill", "a-bias-outside-a-finite-fill", "a-bias-as-large", "bert-extended"),
    ),
    Mutant(
        "a row of infinities beside a bias gives the mean",
        "prove.py",
        "    return site.hollow if fill == -math.inf else EmptyRow.MEAN",
        "    return EmptyRow.MEAN",
        _only("test_prove.py", "beside_a_bias"),
    ),
    Mutant(
        "a witness need not be a key",
        "masks/empty.py",
        "        in_range = both(ge(witness), ge(frame.keys - 1 - witness))",
        "        in_range = TRUE",
        _only("masks/test_alignment.py", "empty", "empties", "padding_on_the_left"),
    ),
    Mutant(
        "infinite data is a constant of its row",
        "masks/bias.py",
        'return self.kind == "none" or (self.kind == "row" and finite)',
        'return self.kind in ("none", "row")',
        _zoo("a-bias-over-queries-alone"),
    ),
    Mutant(
        "rows without a key are not repaired",
        "layers.py",
        "    if dense.alive is None:\n        return out",
        "    return out",
        _zoo("a-row-without-keys"),
    ),
    Mutant(
        "the kernel sees rows without a key",
        "layers.py",
        "    return alive, b.call(aten.logical_or.default, keep, b.call(aten.logical_not.default, alive))",
        "    return alive, keep",
        _zoo("a-row-without-keys"),
    ),
    Mutant(
        "masks lose their polarity when written",
        "layers.py",
        "    return b.call(aten.logical_not.default, mask) if fill.off else mask",
        "    return mask if fill.off else b.call(aten.logical_not.default, mask)",
        _zoo("masked-fill-where-the-mask"),
    ),
    Mutant(
        "gradients through empty rows are dropped",
        "layers.py",
        "    if dense.flows:\n        mean =",
        "    if False:\n        mean =",
        _zoo("an-added-mask-of-the-lowest-number"),
    ),
    Mutant(
        "the factor of a bias is dropped",
        "layers.py",
        "    if factor.number != 1.0:",
        "    if False:",
        _zoo("a-bias-added-with-alpha"),
    ),
    Mutant(
        "bounds are counted from the start",
        "closed.py",
        "None if structure.upper is None else structure.upper - ahead",
        "None if structure.upper is None else structure.upper",
        _only("test_closed.py", "bounds", "diagonal"),
    ),
    Mutant(
        "padded keys are packed beside a window",
        "closed.py",
        "        if proof.structure.keys != TRUE and bounded:",
        "        if False:",
        _only("test_closed.py", "no_such_form"),
    ),
    Mutant(
        "the sink is ignored",
        "lse.py",
        "    return b.call(aten.to.dtype, b.call(aten.mul.Tensor, out, share), val.dtype)",
        "    return out",
        _only("test_flex.py", "form_for_cuda and sink"),
    ),
    Mutant(
        "a cap is applied upside down",
        "functions.py",
        "f.call(aten.tanh.default, f.call(aten.div.Tensor, x, cap)), cap)",
        "f.call(aten.tanh.default, f.call(aten.mul.Tensor, x, cap)), cap)",
        _only("test_flex.py", "form_for_cuda and cap"),
    ),
)

KERNELS = (
    Mutant(
        "no kernel refuses a soft cap",
        "kernels/base.py",
        "        if spec.softcap is not None and not can.softcap:",
        "        if False:",
        _zoo("gemma2-softcap"),
    ),
    Mutant(
        "no kernel refuses a sink",
        "kernels/base.py",
        "        if spec.sink and not can.sink:",
        "        if False:",
        _zoo("gpt-oss-sink"),
    ),
    Mutant(
        "the gradient of a bias is dropped",
        "kernels/base.py",
        "        if any(bias.grad for bias in spec.bias) and not can.bias_gradient:",
        "        if False:",
        _only("kernels/test_native_named.py", "what_each_refuses"),
    ),
    Mutant(
        "a kernel without a backward trains",
        "kernels/base.py",
        "        if spec.grad and not can.backward:",
        "        if False:",
        _only("kernels/test_sage.py", "grad", "backward", "train"),
    ),
    Mutant(
        "torch's unfused dropout counts as fused",
        "kernels/native.py",
        "    if spec.dropout != 0.0:\n        yield",
        "    if False:\n        yield",
        _zoo("dropout-in-training"),
    ),
    Mutant(
        "shared heads are not shared",
        "kernels/native.py",
        '                extra["enable_gqa"] = True',
        "                pass",
        _zoo("repeat-kv-by-expand"),
    ),
    Mutant(
        "heads are repeated one after the other",
        "kernels/operands.py",
        "node if groups == 1 else b.call(aten.repeat_interleave.self_int, node, groups, 1)",
        "node if groups == 1 else b.call(aten.repeat.default, node, [1, groups, 1, 1])",
        _only("kernels/test_native_named.py", "shared_heads"),
    ),
    Mutant(
        "columns that padding made are kept",
        "kernels/operands.py",
        "    padded = isinstance(width, int) and val.shape[-1] != width",
        "    padded = False",
        _zoo("values-narrower-than-keys"),
    ),
    Mutant(
        "the log-sum-exp of rows without a key is a number",
        "kernels/flash_base.py",
        "        if self.vendor.empty != -math.inf:",
        "        if False:",
        _only("kernels/test_flash.py", "key"),
    ),
)

EMIT = (
    Mutant(
        "a factor of q divides where it multiplies",
        "layers.py",
        "        other = arrange(b, placed, target, sizes, expand=False)\n        node = b.call(aten.mul.Tensor if power > 0",
        "        other = arrange(b, placed, target, sizes, expand=False)\n        node = b.call(aten.mul.Tensor if power < 0",
        _zoo("a-scale-for-each-head"),
    ),
    Mutant(
        "strides are not compared",
        "verify.py",
        "    if _same_strides(was, now) or _strides_vanish(b, old, now):",
        "    if True:",
        _only("test_checked.py"),
    ),
    Mutant(
        "copies and views are not told apart",
        "verify.py",
        "                if _may_copy(user) and _written(user):\n                    return False",
        "                pass #",
        _only("test_checked.py"),
    ),
    Mutant(
        "a result of another dtype is taken",
        "verify.py",
        "    if was.dtype != now.dtype or was.device != now.device:",
        "    if was.device != now.device:",
        _only("test_checked.py"),
    ),
    Mutant(
        "the buffer's count of writes is not looked at",
        "capture/held.py",
        "                or tensor._version != entry[1]\n",
        "",
        _only("test_held.py", "changed_mask_is_seen"),
    ),
    Mutant(
        "the buffer's address is not looked at",
        "capture/held.py",
        "                or tensor.data_ptr() != entry[2]\n",
        "",
        _only("test_held.py", "changed_mask_is_seen"),
    ),
    Mutant(
        "another tensor at the same place is the same buffer",
        "capture/held.py",
        "        holds = form_of(tensor) == self.form",
        "        holds = True",
        _only("test_held.py", "changed_mask_is_seen", "share_compiled"),
    ),
    Mutant(
        "buffers of a program are trusted unasked",
        "capture/exported.py",
        "        if not self.policy.trust_buffers or self.policy.strict:",
        "        if self.policy.strict:",
        _only("test_held.py", "buffers_of_a_program_are_data"),
    ),
    Mutant(
        "calls with effects are swept away",
        "capture/splice.py",
        "            if node in self.opened or (gone and node not in self.shadow.opaque):",
        "            if True:",
        _compiled("buffers-updated-beside", "the-output-is-copied-into-an-input"),
    ),
)

CHOICE = (
    Mutant(
        "approximate kernels need no leave",
        "choose.py",
        "    if kernel.can.approximate and not policy.allow_approximate:",
        "    if False:",
        _only("test_choose.py", "approximate"),
    ),
    Mutant(
        "gradients of rows without a key pass by a soft cap",
        "choose.py",
        '    if kernel.takes == "tensor" and site.bent:',
        "    if False:",
        _only("fuzz/test_fuzz.py", "found_stays_mended"),
    ),
    Mutant(
        "strict allows assumptions",
        "choose.py",
        "    if policy.strict and site.assumptions:",
        "    if False:",
        _only("test_prove.py", "strict"),
    ),
    Mutant(
        "fuel is never used up",
        "choose.py",
        "    if fuel is not None and fuel <= 0:",
        "    if False:",
        _only("test_exported.py", "policy_is_honoured"),
    ),
    Mutant(
        "an obstacle is no reason",
        "choose.py",
        "    if site.obstacles:\n        return site.obstacles[0]",
        "    pass",
        _zoo("the-weights-are-returned"),
    ),
    Mutant(
        "functions are given to what does not compile them",
        "choose.py",
        '        uncompiled = () if compiled else (reason("not_compiled"),)',
        "        uncompiled = ()",
        _only("test_flex.py", "would_not_fuse_it", "exported_program"),
    ),
    Mutant(
        "the last rule wins",
        "policy.py",
        "        for rule in self.each_rule():",
        "        for rule in reversed(self.each_rule()):",
        _only("test_policy.py", "first_rule"),
    ),
    Mutant(
        "a mask in a call may be dropped where rows are empty",
        "gain.py",
        "    if mask is not None and (proved.unmasked or (kernel.can.causal and proved.causal)):\n        return sure",
        "    if mask is not None:\n        return True",
        _zoo("a-call-with-a-mask-from-outside", "a-call-behind-repeat-kv-under-a-mask"),
    ),
)

MUTANTS = (*RECOGNIZE, *MEMORY, *MASKS, *KERNELS, *EMIT, *CHOICE)
