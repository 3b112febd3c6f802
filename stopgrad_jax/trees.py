"""Take a pytree apart by `where`, and put it together again.

The parts have the structure of the whole, with None where a leaf is in the other
part, so both are ordinary arguments of `jax.jit`, `jax.grad` and optax.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from ._address import printed
from ._edge import public
from ._errors import wrong
from ._where import Where, selected

__all__ = ["combine", "mask", "partition"]

T = TypeVar("T")


@public
def partition(tree: T, where: Where) -> tuple[T, T]:
    """Split a pytree into the leaves that `where` selects and the rest.

    Differentiate by the first part alone, and nothing is computed for the second.

    Forward: each leaf is in one of the two parts, None in the other.
    Backward: `combine` hands each part its own cotangents.

    Args:
      tree: a pytree. Leaves that carry no gradient (ints, bools, strings, functions,
        PRNG keys) are always in the rest.
      where: a path, a list of paths, a boolean pytree, or a predicate (path, leaf).

    Returns:
      (selected, rest), both with the tree's structure.

    Raises:
      AddressError: `where` selects no leaf that carries a gradient.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> params = {"encoder": 2.0, "head": 3.0, "steps": 7}
        >>> train, rest = sg.partition(params, "head")
        >>> def loss(train):
        ...     p = sg.combine(train, rest)
        ...     return p["encoder"] * p["head"]
        >>> jax.tree.map(float, jax.grad(loss)(train))
        {'encoder': None, 'head': 2.0, 'steps': None}

    Reference:
      After `equinox.partition`, with paths.
    """
    chosen = selected(tree, where, f"partition(tree, {where!r:.60})")
    leaves, structure = jax.tree.flatten(tree)
    pairs = list(zip(leaves, chosen, strict=True))
    return (
        structure.unflatten([leaf if c else None for leaf, c in pairs]),
        structure.unflatten([None if c else leaf for leaf, c in pairs]),
    )


@public
def combine(selected: T, rest: T) -> T:
    """Put together what `partition` split.

    Forward: the leaf of the part that has one.
    Backward: each part receives the cotangents of its own leaves.

    Args:
      selected: a pytree with None where the other part has a leaf.
      rest: a pytree of the same structure.

    Returns:
      The whole tree; None where both parts have None.

    Raises:
      ValueError: the structures differ, or both parts have a leaf at one place.

    Example:
        >>> import stopgrad_jax as sg
        >>> sg.combine({"a": 1.0, "b": None}, {"a": None, "b": "x"})
        {'a': 1.0, 'b': 'x'}
    """

    def is_none(x: Any) -> bool:
        return x is None

    def either(path: Any, one: Any, other: Any) -> Any:
        if one is not None and other is not None:
            raise wrong(
                ValueError,
                "combine(selected, rest)",
                "each place holds a leaf in one of the two parts",
                f'two leaves at "{printed(path)}"',
                "parts that sg.partition made of one tree",
            )
        return other if one is None else one

    ours, theirs = (jax.tree.structure(t, is_leaf=is_none) for t in (selected, rest))
    if ours != theirs:
        raise wrong(
            ValueError,
            "combine(selected, rest)",
            f"both parts have one structure: {ours}",
            str(theirs),
            "parts that sg.partition made of one tree",
        )
    return jax.tree_util.tree_map_with_path(either, selected, rest, is_leaf=is_none)


@public
def mask(tree: Any, where: Where) -> Any:
    """Return the booleans of a selection, as optax's masks want them.

    Forward: True where `where` selects the leaf.
    Backward: none.

    Args:
      tree: a pytree.
      where: a path, a list of paths, a boolean prefix, or a predicate (path, leaf).

    Returns:
      A pytree of the tree's structure with a bool at each leaf; False at leaves that
      carry no gradient.

    Raises:
      AddressError: `where` selects no leaf that carries a gradient.

    Example:
        >>> import stopgrad_jax as sg
        >>> sg.mask({"w": 1.0, "b": 2.0, "step": 3}, "!b")
        {'b': False, 'step': False, 'w': True}
    """
    chosen = selected(tree, where, f"mask(tree, {where!r:.60})")
    return jax.tree.unflatten(jax.tree.structure(tree), chosen)
