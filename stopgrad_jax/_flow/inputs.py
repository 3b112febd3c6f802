"""Inputs as they are shown: the largest subtrees whose leaves fare alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stopgrad_jax._address import Address
from stopgrad_jax._errors import type_of
from stopgrad_jax._program.trace import Place
from stopgrad_jax._reach.graph import Node


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """One array of an input.

    `root` is the address it was found under, `bit` what stands for it among the
    sources (0: it is not differentiated by), `asked`: it is one of the xs. `address`:
    the x that it was found by, or None.
    """

    path: str
    root: str
    place: Place
    value: Node
    aval: Any
    bit: int
    asked: bool
    address: Address | None

    @property
    def values(self) -> list[Node]:
        """The value it is."""
        return [self.value]


class Folded:
    """A subtree of an input."""

    def __init__(self, path: str, leaves: Sequence[Leaf]) -> None:
        """Make it of its leaves."""
        self.path, self.leaves = path, leaves
        self.bits = functools.reduce(int.__or__, (leaf.bit for leaf in leaves), 0)
        self.data = not self.bits

    @property
    def addresses(self) -> Iterator[Address]:
        """What may address it, the shortest first: a path, or the x it was found by."""
        leaf = self.leaves[0]
        if leaf.place.kind != "point":
            yield self.path
        if leaf.address is not None:
            yield leaf.address

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return sum(leaf.aval.size for leaf in self.leaves)

    @property
    def size(self) -> str:
        """`f32[3,4]`, or `4 leaves, 2,344 values`."""
        if len(self.leaves) == 1:
            return type_of(self.leaves[0].aval)
        return f"{len(self.leaves)} leaves, {self.count:,} values"


def fold(leaves: Sequence[Leaf], fate: Callable[[Leaf], Any]) -> Iterator[Folded]:
    """Fold leaves to the highest subtrees whose leaves share a fate."""
    roots: dict[tuple[str, Address | None], list[Leaf]] = {}
    for leaf in leaves:  # two functions may have variables of one name
        roots.setdefault((leaf.root, leaf.address), []).append(leaf)
    for (root, _), group in roots.items():
        yield from _folded(root, group, fate)


def _folded(path: str, leaves: list[Leaf], fate: Callable[[Leaf], Any]) -> Any:
    if len(leaves) == 1 and leaves[0].path == path:
        yield Folded(path, leaves)
    elif len({fate(leaf) for leaf in leaves}) == 1:
        yield Folded(path if len(leaves) > 1 else leaves[0].path, leaves)
    else:
        below: dict[str, list[Leaf]] = {}
        for leaf in leaves:
            rest = leaf.path[len(path) :].lstrip("/").split("/")[0]
            below.setdefault(f"{path}/{rest}" if rest else path, []).append(leaf)
        for inner, group in below.items():
            if inner == path:  # several values of one name
                yield from (Folded(leaf.path, [leaf]) for leaf in group)
            else:
                yield from _folded(inner, group, fate)


_COLUMNS, _WIDEST = 8, 72  # of the table, at most; characters of their names


def fold_outputs(
    outputs: list[tuple[str, list[Node]]],
) -> list[tuple[str, list[Node]]]:
    """Put outputs together by subtree until the table can show them."""
    deepest = max(name.count("/") for name, _ in outputs) if outputs else 0
    for depth in range(deepest + 1, 0, -1):
        out: dict[str, list[Node]] = {}
        for name, values in outputs:
            out.setdefault("/".join(name.split("/")[:depth]), []).extend(values)
        if len(out) <= _COLUMNS and sum(map(len, out)) <= _WIDEST:
            return list(out.items()) if len(out) > 1 else []
    return []
