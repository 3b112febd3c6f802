"""What a loss returns: checked, and added up over devices where it is a sum."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.train as words
from stopgrad_jax._errors import function_name, type_of, wrong

from ._micro import wide


class Value(NamedTuple):
    """What a loss comes to: a mean, or the two parts of a weighted one.

    Of micro-batches, the parts are stacked, until they are `summed`.
    """

    total: jax.Array
    weight: jax.Array | None  # None: each mean counts the same

    @property
    def divisor(self) -> jax.Array:
        """Return the weight as a float."""
        assert self.weight is not None
        return self.weight.astype(self.total.dtype)

    @property
    def mean(self) -> jax.Array:
        """Divide: 0 / 0, for a batch of no weight, is nan."""
        return self.total if self.weight is None else self.total / self.divisor

    @property
    def summed(self) -> Value:
        """Add micro-batches up; average means."""
        if self.weight is None:
            return Value(jnp.mean(self.total), None)
        return Value(jnp.sum(self.total), jnp.sum(self.weight))


@dataclasses.dataclass(frozen=True)
class Loss:
    """A function of (params, batch[, key]), and what it returns."""

    fun: Callable[..., Any]
    has_aux: bool
    weighted: bool

    @property
    def called(self) -> str:
        """Say what was called, for errors."""
        return f"make_step({function_name(self.fun)}, ...)"

    @property
    def argument(self) -> str:
        """Return what the loss calls its parameters."""
        try:
            parameters = inspect.signature(self.fun).parameters.values()
        except (TypeError, ValueError):  # a builtin
            return "params"
        kinds = (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        return next((p.name for p in parameters if p.kind in kinds), "params")

    def __call__(self, params: Any, batch: Any, key: Any) -> tuple[Value, Any]:
        """Return (what the loss comes to, aux)."""
        out = self.fun(params, batch, *(() if key is None else (key,)))
        aux = None
        if self.has_aux:
            shape = "((sum, weight), aux)" if self.weighted else "(scalar, aux)"
            instead = "return (sum, weight), aux" if self.weighted else ""
            expected = f"with has_aux, the loss returns a pair {shape}"
            out, aux = self._pair(out, expected, instead or "return loss, aux")
        if not self.weighted:
            is_pair = not self.has_aux and isinstance(out, tuple | list)
            return Value(self._scalar(out, is_pair and len(out) == 2), None), aux
        expected = "with weighted, the loss returns a pair (sum, weight)"
        instead = "return jnp.sum(losses * mask), jnp.sum(mask)"
        total, weight = self._pair(out, expected, instead)
        return Value(wide(self._scalar(total, False)), self._weight(weight)), aux

    def _pair(self, out: Any, expected: str, instead: str) -> tuple[Any, Any]:
        if not isinstance(out, tuple | list) or len(out) != 2:
            raise wrong(TypeError, self.called, expected, described(out), instead)
        return out[0], out[1]

    def _scalar(self, out: Any, is_pair: bool) -> jax.Array:
        """Return what the loss gave as the number that is differentiated."""
        instead = "jnp.mean(...) of it"
        if self.weighted:
            instead = "jnp.sum(...) of it"
        elif is_pair:
            instead = "make_step(loss, optimizer, has_aux=True) for (scalar, aux), "
            instead += "weighted=True for (sum, weight)"
        if not isinstance(out, _NUMBER):
            expected = "the loss returns one scalar"
            raise wrong(TypeError, self.called, expected, described(out), instead)
        value = jnp.asarray(out)
        if value.shape != ():
            expected = "the loss is a scalar"
            raise wrong(TypeError, self.called, expected, type_of(value), instead)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            instead = "a loss that is computed in floats; metrics go to aux"
            expected = "the loss is a real float"
            raise wrong(TypeError, self.called, expected, type_of(value), instead)
        return value

    def _weight(self, out: Any) -> jax.Array:
        value = jnp.asarray(out) if isinstance(out, _NUMBER) else None
        is_real = value is not None and not jnp.iscomplexobj(value)
        if value is None or value.shape != () or not is_real:
            expected = "with weighted, the weight is a real scalar"
            came = described(out if value is None else value)
            instead = "jnp.sum(mask), or the number of examples"
            raise wrong(TypeError, self.called, expected, came, instead)
        if jnp.issubdtype(value.dtype, jnp.inexact):
            return wide(value)
        return value.astype(jnp.int32) if value.dtype == bool else value


_NUMBER = jax.Array | np.ndarray | np.generic | float | int


def over_devices(value: Value, trained: Iterable[Any], called: str) -> Value:
    """Add the parts of a weighted mean up over the devices of a `shard_map`.

    The axes are those that both differ over. Parts that were added up already differ
    over none.
    """
    total, weight = value
    if weight is None:
        return value
    ours, theirs = (_jax.varying(jax.typeof(x)) for x in (total, weight))
    if not (ours or theirs):
        return value
    own = frozenset().union(*(_jax.varying(jax.typeof(x)) for x in trained))
    if ours != theirs or ours & own:
        told = words.unclear_devices(*map(sorted, (ours, theirs, ours & own)))
        raise wrong(ValueError, called, *told)
    axes = tuple(sorted(ours))
    return Value(jax.lax.psum(total, axes), jax.lax.psum(weight, axes))


def described(out: Any) -> str:
    """Phrase what a loss returned."""
    leaves = jax.tree.leaves(out)
    types = [type_of(x) if hasattr(x, "dtype") else f"{x!r:.40}" for x in leaves]
    if not leaves:
        return f"no array: {out!r:.40}"
    shown = ", ".join(types[:8])
    is_one = len(leaves) == 1 and leaves[0] is out
    return shown if is_one else f"{type(out).__name__} of {shown}"
