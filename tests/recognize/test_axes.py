"""Axes: dimensions are identified by atoms, never by size."""

from __future__ import annotations

import pytest

from attnpass.errors import Refuse
from attnpass.recognize.axes import Axes, atoms


def test_a_dimension_of_size_one_has_no_atom() -> None:
    axes = Axes()
    assert axes.of_shape((3, 1, 5)) == ((0,), (), (1,))


def test_equal_sizes_are_still_different_axes() -> None:
    axes = Axes()
    first, second = axes.of_shape((4, 4))
    assert first != second


def test_a_reshape_that_merges_keeps_the_order_of_atoms() -> None:
    axes = Axes()
    layout = axes.of_shape((2, 3, 5))
    assert axes.regroup(layout, (6, 5)) == ((0, 1), (2,))


def test_a_reshape_that_splits_refines_the_atom_for_every_layout() -> None:
    axes = Axes()
    (merged,) = axes.of_shape((6,))
    (major, minor) = axes.regroup((merged,), (2, 3))
    assert axes.resolve_dim(merged) == major + minor
    assert [axes.size[a] for a in major + minor] == [2, 3]


def test_splitting_the_same_axis_twice_in_the_same_way_gives_the_same_atoms() -> None:
    axes = Axes()
    (merged,) = axes.of_shape((6,))
    assert axes.regroup((merged,), (2, 3)) == axes.regroup((merged,), (2, 3))


def test_a_reshape_across_a_split_and_a_merge() -> None:
    axes = Axes()
    layout = axes.of_shape((4, 6))
    out = axes.regroup(layout, (2, 12))
    assert [axes.dim_size(dim) for dim in out] == [2, 12]
    assert axes.regroup(out, (4, 6)) == axes.resolve(layout)


def test_a_reshape_that_tears_axes_is_refused() -> None:
    axes = Axes()
    with pytest.raises(Refuse) as caught:
        axes.regroup(axes.of_shape((4, 6)), (3, 8))
    assert caught.value.code == "axes_mixed"


@pytest.mark.parametrize("shape", [(25,), (4, 5), (4, 6, 2)])
def test_a_reshape_to_another_number_of_elements_is_refused(shape: tuple[int, ...]) -> None:
    axes = Axes()
    with pytest.raises(Refuse):
        axes.regroup(axes.of_shape((4, 6)), shape)


def test_size_one_dimensions_may_come_and_go() -> None:
    axes = Axes()
    layout = axes.of_shape((4, 6))
    assert axes.regroup(layout, (1, 4, 1, 6)) == ((), layout[0], (), layout[1])


def test_a_broadcast_operand_does_not_depend_on_the_axis() -> None:
    axes = Axes()
    layout = axes.of_shape((2, 3, 5))
    placed = axes.align(layout, (1, 5), (2, 3, 5))
    assert placed == ((), layout[2])
    assert atoms(placed) == set(layout[2])


def test_unifying_a_new_axis_with_a_merged_one() -> None:
    axes = Axes()
    known = axes.regroup(axes.of_shape((2, 3)), (6,))[0]
    mark = axes.new(6)
    axes.unify(mark, known)
    assert axes.resolve_dim(mark) == known


def test_unifying_axes_of_unlike_size_is_refused() -> None:
    axes = Axes()
    with pytest.raises(Refuse):
        axes.unify(axes.new(6), axes.new(5))
