"""What was found in a program: the places that addresses select, in program order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from stopgrad_jax._address import nodes

from .operations import Group
from .wiring import Copies


class PointName(str):
    """The name of one leaf of a named tree; it remembers the tree.

    `tree` is the named tree with each traced leaf replaced by its `NamedLeaf`.
    """

    __slots__ = ("root", "tree")
    root: str
    tree: Any

    def __new__(cls, name: str, root: str, tree: Any) -> PointName:
        """Make the name of one leaf."""
        self = super().__new__(cls, name)
        self.root, self.tree = root, tree
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Store the name alone: it is printed where there is no program any more."""
        return str, (str(self),)


@dataclasses.dataclass(frozen=True)
class NamedLeaf:
    """Stands for the traced leaf of this name in a `PointName`'s tree."""

    name: str


@dataclasses.dataclass(frozen=True)
class Hit:
    """A value is part `position` of what an address selects at this place.

    `root` is the full address that matched, `parts` the names of all the parts and
    `tree` their structure (None: one value by itself). `operation`: an edit of it is
    one of the equation, not of its results; of the `group`, where it has several.
    `level`: how many functions were running around the one whose variable it is; no
    limit for a point, which is where its own equation is.
    """

    target: int
    root: str
    position: int = 0
    parts: tuple[str, ...] = ("",)
    tree: Any = None
    operation: bool = False
    group: Group | None = None
    level: float = math.inf


@dataclasses.dataclass(frozen=True)
class Found:
    """One value that addresses select.

    `aval` is its type outside all the equations that it lies in: with the time axis of
    a scan and with all the shards. `size`: how many entries it has where it is.
    `copies`: how many of it there are for the scans and shard_maps that it lies in,
    outermost first. `rule`: it is behind a custom rule. `dynamic`: it is in a while
    loop. `differentiated`: a derivative of it has already been taken. `feeds`: that of
    its own operation reads it, as that of `exp` does.
    """

    name: str
    hits: tuple[Hit, ...]
    aval: Any
    line: str
    rule: bool = False
    dynamic: bool = False
    differentiated: bool = False
    size: int = 0
    copies: tuple[Copies, ...] = ()
    feeds: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        """Lengths of the scans that it lies in, outermost first."""
        return tuple(c.count for c in self.copies if not c.devices)

    @property
    def targets(self) -> tuple[int, ...]:
        """Positions of the addresses that select this value."""
        return tuple(hit.target for hit in self.hits)


@dataclasses.dataclass(frozen=True)
class Match:
    """An equation that something happens to: to its results, or inside it."""

    index: int
    eqn: Any
    own: tuple[Found, ...]  # one for each result, or none
    plans: tuple[Plan, ...]  # one for each body, or none
    inside: tuple[Found, ...]  # what the plans found, seen from outside

    @property
    def groups(self) -> list[Group]:
        """The operations of several equations of which this makes the last result."""
        every = (hit.group for found in self.own for hit in found.hits)
        groups = dict.fromkeys(g for g in every if g is not None)
        return [group for group in groups if group.last is self.eqn]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A jaxpr and what was found in it, in program order."""

    jaxpr: Any
    consts: Sequence[Any]
    matches: tuple[Match, ...]
    found: tuple[Found, ...]


def leaves(tree: Any) -> list[NamedLeaf]:
    """Traced leaves of a `PointName`'s tree."""
    return [node for _, node in nodes(tree) if isinstance(node, NamedLeaf)]
