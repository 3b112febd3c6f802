"""A program at one point, run on copies, and each rule's share of its derivative."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .copies import Tokens
from .moved_copies import EVERY, INSIDE, Differenced
from .rounding import Rounding
from .sites import Sites
from .sought import Reading

ByLeaf = dict[int, Any]  # of the leaves to differentiate by
Shares = dict[int, np.ndarray]  # by the id of an equation: see `moved_copies.TOLD`


@dataclasses.dataclass(frozen=True, eq=False)
class Weighed:
    """A traced program, of whose floating-point results the weighed sum is taken.

    `places` are the numbers of the leaves to differentiate by, `outs` those of the
    results, `weights` an array for each of these: zero leaves an entry out.
    """

    jaxpr: Any
    consts: Sequence[Any]
    leaves: Sequence[Any]
    places: Sequence[int]
    outs: Sequence[int]
    weights: Sequence[Any]
    sites: Sites

    def values(self) -> ByLeaf:
        """Return the leaves to differentiate by."""
        return {k: self.leaves[k] for k in self.places}

    def filled(self, values: ByLeaf) -> list[Any]:
        """Put values where they belong among the leaves."""
        return [values.get(k, x) for k, x in enumerate(self.leaves)]

    def is_left_out(self, derivative: float) -> bool:
        """Tell whether what is left out may be why a derivative is not finite.

        Zero comes back to it, and zero times an infinite slope is nan.
        """
        left_out = any(not np.all(np.asarray(w)) for w in self.weights)
        return left_out and not np.isfinite(derivative)

    def kept(self, out: Sequence[Any]) -> list[Any]:
        """Return the results that count."""
        return [out[k] for k in self.outs]


def measure(program: Weighed, reading: Reading) -> Callable[..., Any]:
    """Compile a run on three copies: (plus, minus) -> (results of each, shares)."""
    differenced = Differenced(program.sites, reading)
    hidden = differenced.out_of_reach(program.jaxpr)
    asked = {*reading.asked, *reading.followed, *hidden}

    def run(values: ByLeaf, tokens: Tokens, plus: Any, minus: Any) -> Any:
        copies = [program.filled(values), plus, minus]
        outs = differenced.run(program.jaxpr, program.consts, copies, tokens)
        base, *moved = map(program.kept, outs)
        return base, moved

    def shares(values: ByLeaf, plus: Any, minus: Any) -> Any:
        tokens = {key: jnp.zeros(4) for key in sorted(asked)}
        if reading.quantized:
            tokens[EVERY] = jnp.zeros(())
        if not tokens:
            out, moved = run(values, tokens, plus, minus)
            return [out, *moved], {}

        def function(values: Any, tokens: Any) -> Any:
            return run(values, tokens, plus, minus)

        found = derive(reading.forward)(function, values, tokens, program.weights)
        out, moved, found = found
        found.pop(EVERY, None)
        return [out, *moved], found

    return jax.jit(shares)


def rounding(
    program: Weighed, forward: bool, rules: Sequence[int]
) -> Callable[[Any], Shares | None]:
    """Compile how far rounding may change the weighed sum; None: it cannot be told.

    For all of the program (`moved_copies.EVERY`), for what is inside `with_backward`,
    and for each of some rules; of moved leaves, to tell which values move.
    """
    rounded = Rounding(program.sites, Reading(forward=forward))

    @jax.jit
    def sizes(values: ByLeaf, moved: Any) -> Any:
        def function(values: ByLeaf, tokens: Tokens) -> Any:
            copies = [program.filled(values), moved]
            out, _ = rounded.run(program.jaxpr, program.consts, copies, tokens)
            return program.kept(out), ()

        tokens = {key: jnp.zeros(()) for key in (*rules, EVERY, INSIDE)}
        return derive(forward)(function, values, tokens, program.weights)[2]

    def known(moved: Any) -> Shares | None:
        try:
            found = sizes(program.values(), moved)
        except Exception:  # some function in it has no derivative, and needs none
            return None
        return {key: np.abs(np.asarray(x, np.float64)) for key, x in found.items()}

    return known


def derive(forward: bool) -> Callable[..., Any]:
    """Return what derives by tokens: (results, what is beside them, shares)."""
    return _forward if forward else _reverse


def _reverse(function: Any, values: ByLeaf, tokens: Tokens, weights: Any) -> Any:
    out, pull, aux = jax.vjp(function, values, tokens, has_aux=True)
    return out, aux, pull(_like(weights, out))[1]


def _forward(function: Any, values: ByLeaf, tokens: Tokens, weights: Any) -> Any:
    """Do as `_reverse` does, by one `jax.jvp` for each entry of the tokens."""
    flat, structure = jax.tree.flatten(tokens)
    sizes = np.cumsum([0, *(x.size for x in flat)])
    still = jax.tree.map(jnp.zeros_like, values)

    def along(direction: jax.Array) -> jax.Array:
        parts = jnp.split(direction, sizes[1:-1])
        dots = [p.reshape(x.shape) for p, x in zip(parts, flat, strict=True)]
        dots = (still, structure.unflatten(dots))
        _, slopes, _ = jax.jvp(function, (values, tokens), dots, has_aux=True)
        pairs = zip(_like(weights, slopes), slopes, strict=True)
        terms = [weighed_sum(w, s) for w, s in pairs]
        return sum(terms, jnp.zeros((), jnp.result_type(float)))

    # One after the other: the primitives of `tap.py` have no batching rule.
    found = jax.lax.map(along, jnp.eye(sizes[-1]))
    parts = jnp.split(found, sizes[1:-1])
    shares = [p.reshape(x.shape) for p, x in zip(parts, flat, strict=True)]
    out, aux = function(values, tokens)
    return out, aux, structure.unflatten(shares)


def _like(weights: Sequence[Any], out: Sequence[Any]) -> list[Any]:
    return [jnp.asarray(w, x.dtype) for w, x in zip(weights, out, strict=True)]


def weighed_sum(weights: Any, x: jax.Array) -> jax.Array:
    """Return a weighed sum, without what has weight zero, though it is infinite."""
    total = jnp.sum(jnp.where(weights == 0, jnp.zeros_like(x), weights * x))
    # In JAX's usual precision, whatever the result's: the sums of several are added.
    return total.astype(jnp.result_type(float))
