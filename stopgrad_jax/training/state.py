"""What a training step carries from one step to the next, and how it is taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import stopgrad_jax._jax as _jax
from stopgrad_jax._engine.trace import is_traceable
from stopgrad_jax._where import Where, selected


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Parameters, the optimizer's state and the number of steps so far: a pytree.

    Save it as any other pytree: with pickle, or orbax.

    Attributes:
      params: all parameters, the frozen ones included.
      opt_state: the optimizer's state; nothing of it belongs to a frozen leaf.
      step: an int32 array, the number of steps that were taken.
    """

    params: Any
    opt_state: Any
    step: jax.Array

    def replace(self, **changes: Any) -> State:
        """Return the state with other `params`, `opt_state` or `step`."""
        return dataclasses.replace(self, **changes)


class Held:
    """A leaf that is no array: compared as `jax.jit` compares static arguments."""

    def __init__(self, value: Any) -> None:
        """Hold a Python value."""
        self.value = value

    def __hash__(self) -> int:
        """Hash what can be hashed, and tell all else by identity."""
        try:
            return hash((type(self.value), self.value))
        except TypeError:
            return id(self.value)

    def __eq__(self, other: object) -> bool:
        """Tell whether a program that was made with one value serves the other."""
        if not isinstance(other, Held) or type(self.value) is not type(other.value):
            return False
        if self.value is other.value:
            return True
        try:
            return hash(self.value) == hash(other.value) and self.value == other.value
        except TypeError:
            return False


@dataclasses.dataclass(frozen=True, eq=False)  # told by identity, which is quick
class Layout:
    """Where the leaves of a tree go: which train, which take part, which are fixed.

    `kinds` holds for each leaf "trained", "rest" (an array that is not trained) or what
    is `Held`.
    """

    structure: Any
    kinds: tuple[Any, ...]

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return the leaves that train and the other arrays."""
        pairs = list(zip(leaves, self.kinds, strict=True))
        trained = [leaf for leaf, kind in pairs if kind == "trained"]
        return trained, [leaf for leaf, kind in pairs if kind == "rest"]

    def join(self, trained: Iterable[Any], rest: Iterable[Any]) -> Any:
        """Put a tree together again."""
        sources = {"trained": iter(trained), "rest": iter(rest)}
        return self.structure.unflatten(
            kind.value if isinstance(kind, Held) else next(sources[kind])
            for kind in self.kinds
        )

    def alone(self, trained: Iterable[Any]) -> Any:
        """Return the tree as `sg.freeze` shows it to an optimizer."""
        source = iter(trained)
        return self.structure.unflatten(
            next(source) if kind == "trained" else optax.MaskedNode()
            for kind in self.kinds
        )


class Split(NamedTuple):
    """Parameters taken apart: what a loss is differentiated by, and the rest."""

    layout: Layout
    trained: list[Any]
    rest: list[Any]


def layout_of(params: Any, frozen: Where, called: str) -> Layout:
    """Say which leaves of the parameters train."""
    leaves, structure = jax.tree.flatten(params)
    carry = [_jax.carries_gradient(leaf) for leaf in leaves]
    held = [False] * len(leaves)
    if frozen is not None:
        held = selected(params, frozen, called)
    kinds: list[Any] = []
    for leaf, is_float, is_frozen in zip(leaves, carry, held, strict=True):
        if is_float and not is_frozen:
            kinds.append("trained")
        else:
            kinds.append("rest" if is_traceable(leaf) else Held(leaf))
    return Layout(structure, tuple(kinds))


def kind_of(leaf: Any) -> Any:
    """Return what a program that was made for one leaf asks of another."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype
    if isinstance(leaf, float | complex):
        return type(leaf)
    return (leaf.shape, leaf.dtype) if is_traceable(leaf) else Held(leaf)


def copied(leaf: Any) -> jax.Array:
    """Copy an array, so that the copy may be donated; a number becomes an array.

    Weak types end here: an update would make them strong, and the step trace twice.
    """
    if not isinstance(leaf, jax.Array):
        return jnp.array(leaf, dtype=jnp.asarray(leaf).dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):  # a PRNG key
        return jnp.copy(leaf)
    return jnp.array(leaf, dtype=leaf.dtype)
