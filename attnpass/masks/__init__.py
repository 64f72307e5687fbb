"""Masks: lifted from the graph that makes them to index expressions, and their structure proved.

expr, logic, ranges, substitute     the expressions, their simplification, what can be proved of them
sizes, frame                        sizes of the graph as polynomials; the axes (b, h, i, j)
writes, lift, lift_*, numeric       from a node to an expression
structure, bias, empty              closed forms, added floats, rows without a key
evaluate, check, compare            the cross-check
prove                               the entry: Masks(graph).of_site(site)
render                              back to a dense tensor, or to a function for FlexAttention
"""

from attnpass.masks.proof import AddedTerm, MaskProof
from attnpass.masks.prove import Masks
from attnpass.masks.render import dense, mask_function
from attnpass.masks.terms import Term

__all__ = ["AddedTerm", "MaskProof", "Masks", "Term", "dense", "mask_function"]
