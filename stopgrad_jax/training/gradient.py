"""Loss and gradient of the leaves that train, over a batch or its micro-batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import Address, printed
from stopgrad_jax._engine.trace import trace
from stopgrad_jax._errors import beats, function_name, type_of
from stopgrad_jax.diagnosis.statistics import measured

from .state import Split


class Found(NamedTuple):
    """What one evaluation of a loss yields; of micro-batches, stacked or averaged."""

    loss: jax.Array
    gradients: list[jax.Array]
    aux: Any
    stats: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, and how it is differentiated."""

    loss: Callable[..., Any]
    has_aux: bool
    accumulate: int
    stats: tuple[Address, ...]

    @property
    def called(self) -> str:
        """Say what was called, for errors."""
        return f"make_step({function_name(self.loss)}, ...)"

    def gradients(self, split: Split, batch: Any, key: Any) -> Found:
        """Differentiate at a batch: at its micro-batches, one after the other."""
        if self.accumulate == 1:
            return self._at(split, batch, key)
        micro = self._micro(batch)

        def add(sums: list[Any], i: Any) -> tuple[list[Any], Found]:
            found = self._at(split, *_picked(micro, key, i))
            pairs = zip(sums, found.gradients, strict=True)
            sums = [s + g.astype(s.dtype) for s, g in pairs]
            return sums, found._replace(gradients=[])

        zeros = [_zeros(x) for x in split.trained]
        sums, found = jax.lax.scan(add, zeros, jnp.arange(self.accumulate))
        pairs = zip(sums, split.trained, strict=True)
        means = [(s / self.accumulate).astype(x.dtype) for s, x in pairs]
        return found._replace(loss=jnp.mean(found.loss), gradients=means)

    def value(self, split: Split, batch: Any, key: Any) -> jax.Array:
        """Return the loss alone, for optimizers that search along a line."""

        def at(batch: Any, key: Any) -> jax.Array:
            return self._value(split, batch, key)(split.trained)[0]

        if self.accumulate == 1:
            return at(batch, key)
        micro = self._micro(batch)
        rounds = jnp.arange(self.accumulate)
        return jnp.mean(jax.lax.map(lambda i: at(*_picked(micro, key, i)), rounds))

    def _at(self, split: Split, batch: Any, key: Any) -> Found:
        if self.stats:
            return self._measured(split, batch, key)
        value = self._value(split, batch, key)
        (loss, aux), gradients = jax.value_and_grad(value, has_aux=True)(split.trained)
        return Found(loss, gradients, aux, {})

    def _value(
        self, split: Split, batch: Any, key: Any
    ) -> Callable[[list[Any]], tuple[jax.Array, Any]]:
        keys = () if key is None else (key,)

        def value(trained: list[Any]) -> tuple[jax.Array, Any]:
            params = split.layout.join(trained, split.rest)
            return self._checked(self.loss(params, batch, *keys))

        return value

    def _measured(self, split: Split, batch: Any, key: Any) -> Found:
        """Differentiate once for gradients and statistics, as `sg.gradient_stats`."""

        @functools.wraps(self.loss)
        def checked(*args: Any) -> tuple[jax.Array, Any]:
            return self._checked(self.loss(*args))

        params = split.layout.join(split.trained, split.rest)
        args = (params, batch) if key is None else (params, batch, key)
        traced = trace(checked, args, {})
        xs, _ = split.layout.split(jax.tree.leaves(traced.positional[0]))
        called = f"{self.called[:-1]}, stats={list(self.stats)!r:.60})"
        out, found, stats = measured(traced, xs, self.stats, called, has_aux=True)
        pairs = zip(xs, split.trained, strict=True)
        zeros = jnp.zeros_like
        gradients = [found[x] if x in found else zeros(old) for x, old in pairs]
        return Found(out[0], gradients, out[1], stats)

    def _checked(self, out: Any) -> tuple[jax.Array, Any]:
        """Take (loss, aux) out of what the loss returned."""
        if not self.has_aux:
            is_pair = isinstance(out, tuple | list) and len(out) == 2
            return self._scalar(out, is_pair), None
        if not isinstance(out, tuple | list) or len(out) != 2:
            expected = "with has_aux, the loss returns a pair (scalar, aux)"
            came = _described(out)
            raise TypeError(beats(self.called, expected, came, "return loss, aux"))
        return self._scalar(out[0], False), out[1]

    def _scalar(self, out: Any, is_pair: bool) -> jax.Array:
        instead = "jnp.mean(...) of it"
        if is_pair:
            instead = "make_step(loss, optimizer, has_aux=True) for (scalar, aux)"
        if not isinstance(out, jax.Array | np.ndarray | np.generic | float | int):
            came = _described(out)
            expected = "the loss returns one scalar"
            raise TypeError(beats(self.called, expected, came, instead))
        value = jnp.asarray(out)
        if value.shape != ():
            expected = "the loss is a scalar"
            raise TypeError(beats(self.called, expected, type_of(value), instead))
        if not jnp.issubdtype(value.dtype, jnp.floating):
            instead = "a loss that is computed in floats; metrics go to aux"
            expected = "the loss is a real float"
            raise TypeError(beats(self.called, expected, type_of(value), instead))
        return value

    def _micro(self, batch: Any) -> Any:
        """Split the leading axis, the micro-batches on axis 1.

        An array that is sharded over its leading axis then stays where it is: every
        device has a part of each micro-batch.
        """
        flat, structure = jax.tree_util.tree_flatten_with_path(batch)
        rounds, sizes = self.accumulate, {}
        called = f"{self.called[:-1]}, accumulate={rounds})"
        expected = f"arrays with one leading size, which {rounds} divides, in a batch"
        instead = "a batch with examples on the leading axis of each array"
        for path, leaf in flat:
            shape = jnp.shape(leaf)
            if not shape:
                came = f'a scalar at "{printed(path)}"' if path else "a scalar"
                raise ValueError(beats(called, expected, came, instead))
            sizes[printed(path) or "batch"] = shape[0]
        if len(set(sizes.values())) != 1:
            came = f"leading sizes {sizes}" if sizes else "no array"
            raise ValueError(beats(called, expected, came, instead))
        (size,) = set(sizes.values())
        if size % rounds or not size:
            near = max(rounds, size - size % rounds)
            instead = f"accumulate={_divisor(size, rounds)}, or {near} examples"
            came = f"a leading size of {size}"
            raise ValueError(beats(called, expected, came, instead))
        return structure.unflatten(
            jnp.reshape(x, (size // rounds, rounds, *jnp.shape(x)[1:])) for _, x in flat
        )


def _picked(micro: Any, key: Any, i: Any) -> tuple[Any, Any]:
    def pick(x: Any) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

    part = jax.tree.map(pick, micro)
    return part, None if key is None else jax.random.fold_in(key, i)


def _zeros(x: Any) -> jax.Array:
    """Zeros to add gradients to: in float32 at least, as rounding adds up too."""
    zeros = _jax.zeros(jax.typeof(x))
    narrow = jnp.finfo(zeros.dtype).bits < 32
    return zeros.astype(jnp.float32) if narrow else zeros


def _divisor(size: int, most: int) -> int:
    return next((k for k in range(min(most, size), 0, -1) if size % k == 0), 1)


def _described(out: Any) -> str:
    leaves = jax.tree.leaves(out)
    types = [type_of(x) if hasattr(x, "dtype") else f"{x!r:.40}" for x in leaves]
    if not leaves:
        return f"no array: {out!r:.40}"
    shown = ", ".join(types[:8])
    is_one = len(leaves) == 1 and leaves[0] is out
    return shown if is_one else f"{type(out).__name__} of {shown}"
