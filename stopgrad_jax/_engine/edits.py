"""Replace values by what the user's functions make of them, type for type."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import beats, quoted, type_of

from .walk import Found, Hit, Leaf, Match

Edits = Mapping[int, Callable[..., Any]]  # position of an address -> its function


def assembled(hit: Hit, values: Sequence[Any]) -> Any:
    """Put the parts of what an address selects together again."""
    if hit.tree is None:
        return values[0]
    part = dict(zip(hit.parts, values, strict=True))
    return jax.tree.map(lambda x: part[x.name] if isinstance(x, Leaf) else x, hit.tree)


def same_type(new: Any, old: Any, called: str, line: str) -> jax.Array:
    """Return `new` as an array of exactly the type of `old`, or raise."""
    new = _jax.number_like(new, old)
    got = type_of(new) if hasattr(new, "dtype") else type(new).__name__
    if got != type_of(old):
        at = f" ({line})" if line else ""
        raise TypeError(
            beats(
                f'edit of "{called}"{at}',
                f"the function must return {type_of(old)}, the type it was given",
                got,
                f"fun(x).astype({str(old.dtype)!r}) or another value of that shape; "
                "to change a type, edit where the value is used",
            )
        )
    aval = jax.typeof(old) if isinstance(old, jax.Array) else old
    return _jax.vary(_jax.sharded_as(jnp.asarray(new), aval), _jax.varying(aval))


def kept(old: Any, new: Any, called: str) -> bool:
    """Refuse a change of a leaf that is not traced; there is no value to keep."""
    if new is not old and new != old:
        raise TypeError(
            beats(
                f'edit of "{called}"',
                "only arrays and floats can be edited: other leaves are not traced",
                f"{new!r:.40} in place of {old!r:.40}",
                "call the function with that value instead",
            )
        )
    return False


def operation_edits(match: Match, edits: Edits) -> list[Callable[..., Any]]:
    """Edits of the operation that an equation is."""
    hits = [hit for found in match.own[:1] for hit in found.hits]
    return [edits[h.target] for h in hits if h.operation and h.target in edits]


def operation(eqn: Any) -> Callable[..., Any]:
    """Return an equation as the function of its operands that it is."""

    def original(*operands: Any) -> Any:
        avals = [atom.aval for atom in eqn.invars]
        arrays = [_jax.number_like(*pair) for pair in zip(operands, avals, strict=True)]
        out = _jax.bind(eqn, *arrays)
        return out[0] if len(eqn.outvars) == 1 else tuple(out)

    return original


def edited_operation(
    match: Match, functions: Iterable[Callable[..., Any]], operands: Sequence[Any]
) -> list[Any]:
    """Call the user's functions in place of an operation, each given the last."""
    found, eqn = match.own[0], match.eqn
    function = operation(eqn)
    for replacement in functions:
        function = functools.partial(replacement, function)
    out, count = function(*operands), len(eqn.outvars)
    results = [out] if count == 1 else jax.tree.leaves(out)
    if len(results) != count:
        raise TypeError(
            beats(
                f'edit of "{found.name}" ({found.line})',
                f"the function must return {count} arrays, as the operation does",
                f"{len(results)}",
                f"lambda {found.name}, *operands: {found.name}(*operands)",
            )
        )
    pairs = zip(results, eqn.outvars, strict=True)
    return [same_type(x, v.aval, found.name, found.line) for x, v in pairs]


class NamedEdits:
    """Edits of values; a named tree is edited when its last leaf is there."""

    def __init__(self, edits: Edits) -> None:
        self._edits = edits
        self._waiting: dict[tuple[int, str, Sequence[str]], dict[Any, Any]] = {}

    def apply(self, match: Match, values: Sequence[Any]) -> dict[Any, Any]:
        """Return the new values of variables that this equation completes."""
        new: dict[Any, Any] = {}
        for found, var, value in zip(match.own, match.eqn.outvars, values, strict=True):
            new |= self._applied(found, var, value)
        return new

    def _applied(self, found: Found, var: Any, value: Any) -> dict[Any, Any]:
        new = {var: value}
        for hit in found.hits:
            if hit.operation or hit.target not in self._edits:
                continue
            tree = (hit.target, hit.root, hit.parts)
            values = self._waiting.setdefault(tree, {})
            values[var] = new[var]
            if len(values) == len(hit.parts):
                self._waiting.pop(tree)
                new |= self._edited(found, hit, values)
        return new

    def _edited(self, found: Found, hit: Hit, values: dict[Any, Any]) -> dict[Any, Any]:
        old = assembled(hit, list(values.values()))
        out = self._edits[hit.target](old)
        if hit.tree is None:
            leaves = [out]
        elif jax.tree.structure(out) == jax.tree.structure(old):
            trio = map(jax.tree.leaves, (hit.tree, old, out))
            leaves = [
                x
                for leaf, value, x in zip(*trio, strict=True)
                if isinstance(leaf, Leaf) or kept(value, x, hit.root)
            ]
        else:
            raise TypeError(
                beats(
                    f'edit of "{hit.root}" ({found.line})',
                    f"the function must return a tree like {jax.tree.structure(old)}",
                    str(jax.tree.structure(out)),
                    "jax.tree.map(function_of_a_leaf, tree)",
                )
            )
        pairs = zip(values, leaves, strict=True)
        return {v: same_type(x, v.aval, hit.root, found.line) for v, x in pairs}

    def check(self, reads: Iterable[Any]) -> None:
        """Refuse to hand on a leaf while the rest of its tree is not there."""
        for (_, root, parts), values in self._waiting.items():
            if not values.keys().isdisjoint(reads):
                raise ValueError(
                    beats(
                        f'edit of "{root}"',
                        "all leaves of a named tree must be there before one is used",
                        "a program that uses one between them",
                        "edits of the single leaves: " + quoted(parts),
                    )
                )
