"""The one catalogue of reasons: why a softmax is no site, why a kernel cannot serve one, why a site was left alone.

A reason is a code (stable, for programs), a text (for people, with the particulars filled in) and an advice. The page
docs/reasons.md is generated from this table (``python -m attnpass.reasons``); a code that is not in it cannot be used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One row of the catalogue."""

    kind: str  # "recognition", "kernel" or "decision"
    text: str  # may name {details}
    advice: str  # what it means and what a user can do


@dataclass(frozen=True)
class Reason:
    """A reason as the ledger keeps it."""

    code: str
    text: str


_R, _K, _D = "recognition", "kernel", "decision"

CATALOGUE: dict[str, Entry] = {
    # --- recognition: this softmax is not (provably) an attention site -------------------------------------------
    "no_product_before": Entry(
        _R,
        "the scores do not come from a product of queries and keys (met {op})",
        "A router, a gate, a classifier or a codebook: a softmax that is no attention. Nothing to do.",
    ),
    "no_product_after": Entry(
        _R,
        "the probabilities are not multiplied with values (met {op})",
        "The softmax is not followed by a weighted sum. If it is attention in a spelling not yet known, add an idiom.",
    ),
    "unknown_op": Entry(
        _R,
        "an operation between the products is not understood: {op}",
        "Whatever is not understood is left alone. A rule for this operation can be added (docs/extending.md).",
    ),
    "unknown_arguments": Entry(
        _R,
        "{op} is called in a form that is not understood: {detail}",
        "Left alone, because only documented forms of each operation are trusted.",
    ),
    "mutated": Entry(
        _R,
        "{what} is written in place between its use and the fused call",
        "Replacing would read other values. Write the operation out of place if you want this site replaced.",
    ),
    "axes_mixed": Entry(
        _R,
        "{op} mixes axes so that queries, keys and heads cannot be told apart: {detail}",
        "Axes are tracked exactly; a reshape that tears them cannot be undone.",
    ),
    "softmax_not_over_keys": Entry(
        _R,
        "the softmax runs over an axis that is not the one the values are summed over",
        "Not attention: for instance a softmax over queries or over heads.",
    ),
    "not_a_query_key_product": Entry(
        _R,
        "the product behind the scores does not pair queries with keys: {detail}",
        "Both operands carry the key axis, or none does.",
    ),
    "values_depend_on_query": Entry(
        _R,
        "the values differ from query to query",
        "Relative-position values and the like have no fused form.",
    ),
    "projected_scores": Entry(
        _R,
        "the scores are a linear layer's output, not a product of two activations",
        "A router or a classifier, or attention over learned keys; left alone.",
    ),
    "mixes_heads": Entry(
        _R,
        "heads are mixed before or after the softmax ({op})",
        "Talking heads: no fused kernel computes it.",
    ),
    "probabilities_changed": Entry(
        _R,
        "the probabilities are changed before they meet the values: {op}",
        "A gate, a renormalisation or a difference of two maps: no fused kernel computes it.",
    ),
    "two_score_tensors": Entry(
        _R,
        "the scores are a sum, a choice or a concatenation of two products",
        "Content plus position products, for example: only one may be the query-key product; "
        "the other would have to be computed densely as a bias.",
    ),
    "nonlinear_scores": Entry(
        _R,
        "the scores pass through {op} before the softmax",
        "Only a tanh soft cap has a fused form.",
    ),
    "term_inside_softcap": Entry(
        _R,
        "a mask or bias is added before the soft cap",
        "A mask inside the cap does not mask; no kernel has that form.",
    ),
    "score_weights": Entry(
        _R,
        "the scores are multiplied by a tensor over queries and keys that is not proved to be a mask",
        "Only a factor that can move into q or k has a fused form, or a 0/1 tensor with the matching fill.",
    ),
    "fill_not_constant": Entry(
        _R,
        "the value filled in where the mask is off is not a known number",
        "Use a constant fill such as -inf.",
    ),
    "lost_scores": Entry(
        _R,
        "a great number is added to the scores, which may be lost beside it",
        "Leave it out where it is the same for all keys: softmax sees it only if rounding makes them weigh the same.",
    ),
    "overflows": Entry(
        _R,
        "a mask or bias that is finite where it is added may be infinite in {dtype}, to which scores are cast later",
        "Add it after the cast, in that dtype, or use -inf.",
    ),
    "overflows_between": Entry(
        _R,
        "what is added to the scores in several places may together be infinite before it is scaled down",
        "Add it after the scaling, or to one mask.",
    ),
    "not_floating": Entry(_R, "the scores are {dtype}", "Complex and integer scores are left alone."),
    "empty_tensor": Entry(_R, "an axis has no elements", "Nothing to gain."),
    "single_key": Entry(_R, "the softmax runs over one element", "It is always 1; nothing to gain."),
    "mixed_dtypes": Entry(
        _R,
        "q, k and v are of different dtypes: {detail}",
        "A fused kernel would round the wider ones; left alone.",
    ),
    "mixed_devices": Entry(_R, "q, k, v and the mask are on different devices", "Left alone."),
    "mixed_state": Entry(
        _R,
        "autocast or grad mode changes between the products",
        "One fused call cannot run under two states.",
    ),
    "functorch": Entry(
        _R,
        "the softmax is inside vmap, grad or another functorch transform",
        "Batched tensors hide an axis; left alone.",
    ),
    "not_lowered": Entry(
        _R,
        "this part of the graph cannot be lowered to ATen: {detail}",
        "An operation without a fake implementation, or a higher-order operation that is not entered.",
    ),
    "graph_input": Entry(
        _R,
        "the scores enter this graph from outside ({op})",
        "A graph break or a nested graph lies between the products; audit shows where.",
    ),
    "graph_output": Entry(
        _R,
        "the probabilities leave this graph",
        "A graph break or a returned tensor lies between softmax and values.",
    ),
    # --- kernel: this kernel does not compute this spec ------------------------------------------------------------
    "unavailable": Entry(_K, "{detail}", "The kernel's package is missing, broken or of the wrong version."),
    "device": Entry(_K, "does not run on {device}", "Choose a kernel for this device."),
    "dtype": Entry(_K, "does not take {dtype}", "Cast the model, or choose another kernel."),
    "head_width": Entry(_K, "does not take heads of width {detail}", "Choose a kernel with a wider range."),
    "unlike_widths": Entry(
        _K, "needs keys and values of one width", "Multi-head latent attention needs another kernel."
    ),
    "softcap": Entry(_K, "has no soft cap {detail}", "FlexAttention and flash-attn have one."),
    "sink": Entry(_K, "has no attention sinks", "FlexAttention can do it by its log-sum-exp."),
    "dropout": Entry(_K, "has no dropout {detail}", "In evaluation mode there is none."),
    "dropout_unknown": Entry(_K, "the dropout probability is not a known number", "Make it a constant."),
    "dense_mask": Entry(_K, "takes no dense mask", "A mask with proved structure may still do."),
    "no_form": Entry(
        _K,
        "has no argument for {detail}",
        "FlexAttention, or a mask that is a tensor, may do it.",
    ),
    "not_deterministic": Entry(
        _K,
        "its backward may give other bits each time",
        "torch.use_deterministic_algorithms(True) is on; in evaluation, or without it, this kernel can serve.",
    ),
    "approximate": Entry(
        _K,
        "computes in fewer bits than its inputs have",
        "Allow it with allow_approximate=True, after a look at what it does to your model's results.",
    ),
    "bias_gradient": Entry(_K, "gives no gradient to a bias", "Trainable position biases need another kernel."),
    "bias_precision": Entry(
        _K,
        "would round a {detail} bias to {dtype}",
        "The original adds it in the wider type; rounding it would be less accurate than the original.",
    ),
    "empty_rows": Entry(
        _K,
        "a query with no key would get another answer than the original's ({detail})",
        "Prove that there is none, or waive it with empty_rows='dont_care'.",
    ),
    "groups": Entry(_K, "cannot share key/value heads", "The heads can be expanded for it."),
    "no_fused_form": Entry(
        _K,
        "would fall back to its unfused form here: {detail}",
        "There is nothing to gain from it.",
    ),
    "wide_heads": Entry(_K, "{detail}", "Choose another kernel."),
    "grad": Entry(_K, "has no backward {detail}", "In evaluation, under no_grad, it can serve."),
    "not_compiled": Entry(
        _K,
        "is fused only where inductor compiles the graph",
        "Use torch.compile(model, backend='attnpass') with inductor behind it, as it is by default.",
    ),
    "not_expressed": Entry(
        _K,
        "takes masks and biases as functions, and these are not proved to be any",
        "A mask built from positions, lengths or ids is; a bias of unknown numbers only without gradients.",
    ),
    "unlike_call": Entry(
        _K,
        "is not known to answer every query as the call that is there does",
        "A query without any key, or a mask that this kernel would round; nothing is changed unless that is excluded.",
    ),
    "kernel_bug": Entry(_K, "known bug: {detail}", "Avoided until it is fixed."),
    # --- decision: the site is understood, but was left as it is ----------------------------------------------------
    "no_kernel": Entry(_D, "no kernel computes this function here: {detail}", "The verdicts list every reason."),
    "weights_used": Entry(
        _D,
        "scores or probabilities are read by something else ({op}), so nothing would be saved",
        "Return no attention weights (output_attentions=False, need_weights=False).",
    ),
    "weights_used_dropout": Entry(
        _D,
        "probabilities are read by something else under live dropout ({op})",
        "The fused kernel drops other elements than those that are read.",
    ),
    "weak_fill": Entry(
        _D,
        "masked scores are filled with {fill}, which ordinary scores may outweigh",
        "Fill with -inf or torch.finfo(dtype).min to have this mask treated as a mask.",
    ),
    "mask_disagrees": Entry(
        _D,
        "what was proved of the mask is not what the graph computes: {detail}",
        "A bug of attnpass, please report it. The site is left as it is.",
    ),
    "strict": Entry(_D, "strict mode does not allow: {detail}", "Allow it by strict=False."),
    "already_fused": Entry(
        _D,
        "it is a scaled_dot_product_attention call already",
        "Nothing to gain: its mask cannot be left out, and no heads of k and v are repeated for it.",
    ),
    "not_profitable": Entry(_D, "the graph as it is is expected to be as fast", "Set min_gain lower to force it."),
    "rule_failed": Entry(
        _D,
        "a rule of the policy failed on this site: {detail}",
        "Symbolic sizes are texts: a predicate that compares a size has to look whether it is a number.",
    ),
    "kept": Entry(_D, "the policy keeps this site as it is", "Change the rule for this site."),
    "fuel": Entry(_D, "the fuel was used up before this site", "Raise fuel; it is meant for bisection."),
    "new_condition": Entry(
        _D,
        "its call could be written only under a condition on sizes that the graph does not have: {detail}",
        "No guard is ever added. It may be replaced where that size is static, or is marked as what it is equal to.",
    ),
    "no_size": Entry(
        _D,
        "its call needs the size {detail}, which no tensor has where it would stand",
        "It may be replaced where that size is static.",
    ),
    "verify_failed": Entry(
        _D, "the rewritten graph failed its check: {detail}", "The site was put back. Please report it."
    ),
    "verify_worse": Entry(
        _D,
        "tried against float64, {kernel} is worse than the original: {what} on {inputs} inputs, error {replacement}, "
        "the original's {original}, allowed {allowed}",
        "verify=True has put the site back. Please report it, with what `attnpass bisect` writes.",
    ),
    "verify_raised": Entry(
        _D,
        "tried, {kernel} fails on {inputs} inputs, where the original does not: {detail}",
        "verify=True has put the site back. Please report it.",
    ),
    "failed": Entry(_D, "the pass failed here and left the graph as it was: {detail}", "Please report it."),
}


def reason(code: str, **details: Any) -> Reason:
    """The reason of this code with its particulars filled in; an unknown code is a programming error."""
    return Reason(code, CATALOGUE[code].text.format_map(_Details(details)).strip())


class _Details(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


def to_markdown() -> str:
    """docs/reasons.md."""
    titles = {
        _R: ("No site", "Why a softmax is not taken for attention (`misses` in the report)."),
        _K: ("No kernel", "Why one kernel cannot serve a site (`verdicts[].refusals`)."),
        _D: ("Left as it is", "Why a recognised site was not replaced (`sites[].reason`)."),
    }
    lines = [
        "# Reasons",
        "",
        "Generated from `attnpass/reasons.py` by `python -m attnpass.reasons`. Codes are stable; texts are for people.",
    ]
    for kind, (title, intro) in titles.items():
        lines += ["", f"## {title}", "", intro, "", "| code | text | what it means, what to do |", "|---|---|---|"]
        lines += [
            f"| `{code}` | {entry.text} | {entry.advice} |" for code, entry in CATALOGUE.items() if entry.kind == kind
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(to_markdown(), end="")
