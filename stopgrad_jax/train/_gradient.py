"""Loss and gradient of the leaves that train, over a batch or its micro-batches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import stopgrad_jax.train._micro as micro
from stopgrad_jax._address import Address
from stopgrad_jax._program.trace import trace
from stopgrad_jax._statistics import measured

from ._objective import Loss, Value, over_devices
from ._state import Parted


class Evaluation(NamedTuple):
    """What one evaluation of a loss yields; of micro-batches, stacked or averaged."""

    value: Value
    gradients: list[jax.Array]
    aux: Any
    stats: dict[str, Any]


class Whole(NamedTuple):
    """What a share of a weighted mean S / W must know of the whole batch.

    With M = S / W, the derivative of M is the sum of those of (s - M w) / W over the
    micro-batches, with M and W held constant: also where weights depend on parameters.
    A batch of no weight has no mean, and nothing is learned from it.
    """

    mean: jax.Array
    scale: jax.Array  # 1 / W, or 0

    @classmethod
    def of(cls, value: Value) -> Whole:
        """Take the totals of a batch."""
        weight = value.divisor
        none = weight == 0
        scale = jnp.where(none, 0, 1 / jnp.where(none, 1, weight))
        return jax.lax.stop_gradient(cls(value.total * scale, scale))

    def share(self, value: Value) -> jax.Array:
        """Return what is differentiated for a part of the batch."""
        return (value.total - self.mean * value.divisor) * self.scale


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, and how it is differentiated."""

    loss: Loss
    accumulate: int
    stats: tuple[Address, ...]

    @property
    def called(self) -> str:
        """Say what was called, for errors."""
        return self.loss.called

    def gradients(self, split: Parted, batch: Any, key: Any) -> Evaluation:
        """Differentiate at a batch: at its micro-batches, one after the other."""
        if self.accumulate == 1:
            return self._at(split, batch, key, None)
        parts = micro.split(batch, self.accumulate, self.called)
        rounds, total, whole = jnp.arange(self.accumulate), None, None
        if self.loss.weighted:  # what a share is divided by is the same for all of them
            total = self._total(split, parts, key, rounds)
            whole = Whole.of(total)

        def add(sums: list[Any], i: Any) -> tuple[list[Any], Evaluation]:
            found = self._at(split, *micro.picked(parts, key, i), whole)
            pairs = zip(sums, found.gradients, strict=True)
            sums = [s + g.astype(s.dtype) for s, g in pairs]
            value = Value(found.value.total, None)
            return sums, found._replace(value=value, gradients=[])

        zeros = [micro.zeros(x) for x in split.trained]
        sums, found = jax.lax.scan(add, zeros, rounds)
        if total is None:  # a share is a whole mean: they are averaged
            sums = [s / self.accumulate for s in sums]
            value = found.value.summed
        else:
            value = Value(jnp.sum(found.value.total), total.weight)
        pairs = zip(sums, split.trained, strict=True)
        gradients = [s.astype(x.dtype) for s, x in pairs]
        return found._replace(value=value, gradients=gradients)

    def value(self, split: Parted, batch: Any, key: Any) -> jax.Array:
        """Return the loss alone, for optimizers that search along a line."""
        if self.accumulate == 1:
            return self.evaluate(split, batch, key)[0].mean
        parts = micro.split(batch, self.accumulate, self.called)
        return self._total(split, parts, key, jnp.arange(self.accumulate)).mean

    def evaluate(self, split: Parted, batch: Any, key: Any) -> tuple[Value, Any]:
        """Return what the loss comes to at one batch or micro-batch, and aux."""
        params = split.layout.join(split.trained, split.rest)
        return self._evaluated(params, split, batch, key)

    def _evaluated(
        self, params: Any, split: Parted, batch: Any, key: Any
    ) -> tuple[Value, Any]:
        value, aux = self.loss(params, batch, key)
        return over_devices(value, split.trained, self.called), aux

    def _total(self, split: Parted, parts: Any, key: Any, rounds: jax.Array) -> Value:
        def at(i: Any) -> Value:
            return self.evaluate(split, *micro.picked(parts, key, i))[0]

        return jax.lax.map(at, rounds).summed

    def _at(
        self, split: Parted, batch: Any, key: Any, whole: Whole | None
    ) -> Evaluation:
        if self.stats:
            return self._measured(split, batch, key, whole)

        def objective(trained: list[Any]) -> tuple[jax.Array, Any]:
            value, aux = self.evaluate(split._replace(trained=trained), batch, key)
            return _share(value, whole), (value, aux)

        differentiate = jax.value_and_grad(objective, has_aux=True)
        (_, (value, aux)), gradients = differentiate(split.trained)
        return Evaluation(value, gradients, aux, {})

    def _measured(
        self, split: Parted, batch: Any, key: Any, whole: Whole | None
    ) -> Evaluation:
        """Differentiate once for gradients and statistics, as `sg.gradient_stats`."""

        @functools.wraps(self.loss.fun)
        def objective(params: Any, batch: Any, key: Any = None) -> tuple[Any, Any]:
            value, aux = self._evaluated(params, split, batch, key)
            return _share(value, whole), (value, aux)

        params = split.layout.join(split.trained, split.rest)
        args = (params, batch) if key is None else (params, batch, key)
        traced = trace(objective, args, {})
        xs, _ = split.layout.split(jax.tree.leaves(traced.positional[0]))
        called = f"{self.called[:-1]}, stats={list(self.stats)!r:.60})"
        out, found, stats = measured(traced, xs, self.stats, called, has_aux=True)
        pairs = zip(xs, split.trained, strict=True)
        zeros = jnp.zeros_like
        gradients = [found[x] if x in found else zeros(old) for x, old in pairs]
        return Evaluation(out[1][0], gradients, out[1][1], stats)


def _share(value: Value, whole: Whole | None) -> jax.Array:
    if value.weight is None:
        return value.total
    return (whole or Whole.of(value)).share(value)
