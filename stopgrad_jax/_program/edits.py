"""Replace values by what the user's functions make of them, type for type."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._checks import require_same_tree
from stopgrad_jax._errors import quoted, type_of, wrong

from .operations import Group
from .perturbation import edited
from .plan import Found, Hit, Match, NamedLeaf, Plan

Edits = Mapping[int, Callable[..., Any]]  # position of an address -> its function


def assembled(hit: Hit, values: Sequence[Any]) -> Any:
    """Put the parts of what an address selects together again."""
    if hit.tree is None:
        return values[0]
    part = dict(zip(hit.parts, values, strict=True))
    return jax.tree.map(
        lambda x: part[x.name] if isinstance(x, NamedLeaf) else x, hit.tree
    )


def same_type(new: Any, old: Any, called: str, line: str) -> jax.Array:
    """Return `new` as an array of exactly the type of `old`, or raise."""
    new = _jax.number_like(new, old)
    got = type_of(new) if hasattr(new, "dtype") else type(new).__name__
    if got != type_of(old):
        at = f" ({line})" if line else ""
        raise wrong(
            TypeError,
            f'edit of "{called}"{at}',
            f"the function must return {type_of(old)}, the type it was given",
            got,
            f"fun(x).astype({str(old.dtype)!r}) or another value of that shape; "
            "to change a type, edit where the value is used",
        )
    # Of the type `type_of` prints neither sharding nor mesh axes, and a user's function
    # need not keep them: what follows was traced with those of the old value.
    aval = jax.typeof(old) if isinstance(old, jax.Array) else old
    with _jax.at_width_of(aval):
        new = _jax.vary(_jax.sharded_as(jnp.asarray(new), aval), _jax.varying(aval))
        return edited(new, called) if _jax.is_differentiable(aval) else new


def kept(old: Any, new: Any, called: str) -> bool:
    """Refuse a change of a leaf that is not traced; there is no value to keep."""
    if new is not old and new != old:
        raise wrong(
            TypeError,
            f'edit of "{called}"',
            "only arrays and floats can be edited: other leaves are not traced",
            f"{new!r:.40} in place of {old!r:.40}",
            "call the function with that value instead",
        )
    return False


def operation_edits(match: Match, edits: Edits) -> list[Callable[..., Any]]:
    """Edits of the operation that an equation is."""
    # All results have the hits of their operation: those of the first are every one.
    hits = [hit for found in match.own[:1] for hit in found.hits]
    own = [h.target for h in hits if h.operation and h.group is None]
    return [edits[target] for target in own if target in edits]


def group_edits(plan: Plan, edits: Edits) -> list[tuple[Group, list[Any]]]:
    """Return the operations of several equations that are edited, with the edits.

    An edit of one that lies in another is left to the evaluation of that one.
    """
    found: dict[frozenset[int], list[Group]] = {}
    for match in plan.matches:
        for group in match.groups:
            if group.target in edits:
                found.setdefault(frozenset(group.indices), []).append(group)
    outermost = [
        groups for key, groups in found.items() if not any(map(key.__lt__, found))
    ]
    return [
        # Of two functions with the same equations, the outer one is given the other.
        (groups[0], [edits[g.target] for g in sorted(groups, key=lambda g: -g.level)])
        for groups in outermost
    ]


def own_plan(plan: Plan, group: Group) -> Plan:
    """Return the plan of a group's own equations: what happens in its function.

    What a caller assigns of its results happens behind it, see `behind`.
    """
    own = set(map(id, group.eqns))

    def kept(var: Any, found: Found) -> Found:
        late = {id(hit) for hit in _late(found, var, group)}
        hits = [hit for hit in found.hits if id(hit) not in late]
        # A function that does nothing but call another one has the same equations, and
        # is edited with it, see `group_edits`.
        hits = [h for h in hits if h.group is None or h.group.indices != group.indices]
        return dataclasses.replace(found, hits=tuple(hits))

    matches = tuple(
        dataclasses.replace(
            m, own=tuple(map(kept, m.eqn.outvars, m.own)) if m.own else ()
        )
        for m in plan.matches
        if id(m.eqn) in own
    )
    found = tuple(f for match in matches for f in (*match.inside, *match.own))
    jaxpr = _jax.subjaxpr(group.eqns, group.reads, group.writes)
    return Plan(jaxpr, (), matches, found)


def behind(plan: Plan, group: Group) -> Iterator[tuple[Any, Found]]:
    """Yield the results of a group, with what happens to them behind it."""
    own = set(map(id, group.eqns))
    for match in plan.matches:
        if id(match.eqn) in own and match.own:
            for found, var in zip(match.own, match.eqn.outvars, strict=True):
                hits = _late(found, var, group)
                if hits:
                    yield var, dataclasses.replace(found, hits=tuple(hits))


def _late(found: Found, var: Any, group: Group) -> list[Hit]:
    """What callers of a group's function have assigned of one of its results."""
    if var not in group.writes:
        return []
    return [h for h in found.hits if not h.operation and h.level < group.level]


def operation(
    original: Callable[..., Sequence[Any]], operands: Sequence[Any], count: int
) -> Callable[..., Any]:
    """Return an operation as a function that takes Python numbers for arrays too."""

    def called(*arrays: Any) -> Any:
        pairs = zip(arrays, operands, strict=True)
        out = original(*[_jax.number_like(x, atom.aval) for x, atom in pairs])
        return out[0] if count == 1 else tuple(out)

    return called


def edited_operation(
    name: str,
    line: str,
    original: Callable[..., Any],
    functions: Iterable[Callable[..., Any]],
    operands: Sequence[Any],
    results: Sequence[Any],
) -> list[Any]:
    """Call the user's functions in place of an operation, each given the last.

    `results` are the variables of the program that the operation makes.
    """
    function = original
    for replacement in functions:
        function = functools.partial(replacement, function)
    count = len(results)
    with _jax.at_width_of(*operands, *(v.aval for v in results)):
        out = function(*operands)
    arrays = [out] if count == 1 else jax.tree.leaves(out)
    if len(arrays) != count:
        raise wrong(
            TypeError,
            f'edit of "{name}" ({line})',
            f"the function must return {count} arrays, as the operation does",
            f"{len(arrays)}",
            f"lambda {name}, *operands: {name}(*operands)",
        )
    pairs = zip(arrays, results, strict=True)
    return [same_type(x, v.aval, name, line) for x, v in pairs]


_Tree = tuple[int, str, Sequence[str]]  # of an address: a tree that it selects


class NamedEdits:
    """Edits of values; a named tree is edited when its last leaf is there."""

    def __init__(self, edits: Edits) -> None:
        self._edits = edits
        self._waiting: dict[_Tree, dict[Any, Any]] = {}
        self._later: dict[_Tree, list[tuple[int, Found, Any, Any]]] = {}

    def apply(self, match: Match, values: Sequence[Any]) -> dict[Any, Any]:
        """Return the new values of variables that this equation completes."""
        new: dict[Any, Any] = {}
        for found, var, value in zip(match.own, match.eqn.outvars, values, strict=True):
            new |= self.applied(found, match.eqn, var, value)
        return new

    def applied(self, found: Found, eqn: Any, var: Any, value: Any) -> dict[Any, Any]:
        """Return the new values of variables that this one completes."""
        return self._applied(0, found, eqn, var, value)

    def _applied(
        self, start: int, found: Found, eqn: Any, var: Any, value: Any
    ) -> dict[Any, Any]:
        new = {var: value}
        for k, hit in enumerate(found.hits[start:], start):
            # An operation is edited where it is run, see `edited_operation`.
            if hit.operation or hit.target not in self._edits:
                continue
            tree = (hit.target, hit.root, hit.parts)
            values = self._waiting.setdefault(tree, {})
            values[var] = new[var]
            if len(values) < len(hit.parts):
                # What else is to happen to this leaf comes after the edit of its tree.
                self._later.setdefault(tree, []).append((k + 1, found, eqn, var))
                return new
            self._waiting.pop(tree)
            new |= self._edited(found, eqn, hit, values)
            for later in self._later.pop(tree, ()):
                new |= self._applied(*later, new[later[-1]])
        return new

    def _edited(
        self, found: Found, eqn: Any, hit: Hit, values: dict[Any, Any]
    ) -> dict[Any, Any]:
        """Return what the user's function makes of a value, or of a whole tree."""
        old = assembled(hit, list(values.values()))
        with _jax.in_an_edit(eqn), _jax.at_width_of(*jax.tree.leaves(old)):
            out = self._edits[hit.target](old)
        if hit.tree is None:
            leaves = [out]
        else:
            require_same_tree(out, old, f'edit of "{hit.root}" ({found.line})')
            trio = map(jax.tree.leaves, (hit.tree, old, out))
            leaves = [
                x
                for leaf, value, x in zip(*trio, strict=True)
                if isinstance(leaf, NamedLeaf) or kept(value, x, hit.root)
            ]
        pairs = zip(values, leaves, strict=True)
        return {v: same_type(x, v.aval, hit.root, found.line) for v, x in pairs}

    def check(self, reads: Iterable[Any]) -> None:
        """Refuse to hand on a leaf while the rest of its tree is not there."""
        for (_, root, parts), values in self._waiting.items():
            if not values.keys().isdisjoint(reads):
                raise wrong(
                    ValueError,
                    f'edit of "{root}"',
                    "all leaves of a named tree must be there before one is used",
                    "a program that uses one between them",
                    "edits of the single leaves: " + quoted(parts),
                )
