"""What a training step carries from one step to the next, and how it is taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import optax

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.trace import is_traceable
from stopgrad_jax._trees import Split
from stopgrad_jax._where import Where, selected

from ._owned import copied


class State(NamedTuple):
    """Parameters, the optimizer's state and the number of steps so far: a pytree.

    A named tuple, as optax's own states are: save it with pickle, orbax or
    `flax.serialization`.

    Attributes:
      params: all parameters, the frozen ones included.
      opt_state: the optimizer's state; nothing of it belongs to a frozen leaf.
      step: an int32 array, the number of steps that were taken.
    """

    params: Any
    opt_state: Any
    step: jax.Array

    def replace(self, **changes: Any) -> State:
        """Return the state with other `params`, `opt_state` or `step`.

        What you put in stays yours, or that of the state it is from: the next step
        copies it before it trains. What you leave is donated as before.
        """
        owner, step = _jax.owner_of(self.step), changes.get("step", self.step)
        if step is not self.step and owner is not None and not _jax.is_traced(step):
            changes["step"] = copied(step, owner)  # it tells what is the state's own
        return self._replace(**changes)


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

    `kinds` holds for each leaf "trained", "rest" (an array that is not trained),
    "untrained" (one that the loss cannot train, and that was frozen for it) or what is
    `Held`.
    """

    structure: Any
    kinds: tuple[Any, ...]

    def numbers(self, kind: str) -> list[int]:
        """Return which leaves are of a kind, by number."""
        return [k for k, this in enumerate(self.kinds) if this == kind]

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return the leaves that train and the other arrays."""
        pairs = list(zip(leaves, self.kinds, strict=True))
        trained = [leaf for leaf, kind in pairs if kind == "trained"]
        return trained, [leaf for leaf, kind in pairs if kind in ("rest", "untrained")]

    def join(self, trained: Iterable[Any], rest: Iterable[Any]) -> Any:
        """Put a tree together again."""
        others = iter(rest)
        sources = {"trained": iter(trained), "rest": others, "untrained": others}
        return self.structure.unflatten(
            kind.value if isinstance(kind, Held) else next(sources[kind])
            for kind in self.kinds
        )

    def alone(self, trained: Iterable[Any]) -> Any:
        """Return the tree as `sg.freeze` shows it to an optimizer."""
        trains = Split([kind == "trained" for kind in self.kinds])
        hidden = [optax.MaskedNode()] * len(self.kinds)
        return self.structure.unflatten(trains.joined(trained, hidden))


class Parted(NamedTuple):
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
