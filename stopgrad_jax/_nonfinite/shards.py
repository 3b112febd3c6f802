"""What is inside a `shard_map`, run on one device.

The values of all shards are stacked on leading axes, one for each axis of the mesh. An
operation is then mapped over these axes, which have the mesh's names: so collectives
work, and nothing is compiled for many devices. What `vmap` cannot do is run in a
`shard_map` of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import stopgrad_jax._jax as _jax

from .entries import Index

Run = Callable[..., list[Any]]


@dataclasses.dataclass(frozen=True)
class Shards:
    """The mesh that a `shard_map` equation runs on."""

    eqn: Any

    @property
    def _mesh(self) -> Any:
        return self.eqn.params["mesh"]

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Length of each axis of the mesh that the values are split over."""
        manual = self.eqn.params["newly_manual_axes"]
        axes = [name for name in self._mesh.axis_names if name in manual]
        return {name: self._mesh.shape[name] for name in axes}

    def split(self, values: Sequence[Any]) -> list[Any]:
        """Stack the shards of the operands of the equation."""
        specs = self.eqn.params["in_specs"]
        return [self._stacked(x, s) for x, s in zip(values, specs, strict=True)]

    def _stacked(self, x: Any, spec: Any) -> Any:
        if not _jax.is_key(x):
            x = np.asarray(x)
        where = np.ndindex(*self.sizes.values())
        parts = [x[self._slices(x.shape, spec, place)] for place in where]
        stacked = jnp.stack(parts)
        return stacked.reshape(*self.sizes.values(), *parts[0].shape)

    def _slices(self, shape: Index, spec: Any, place: Index) -> tuple[slice, ...]:
        found = []
        for length, names in zip(shape, self._names(spec, len(shape)), strict=True):
            size = length // math.prod(self.sizes[name] for name in names)
            first = size * self._position(names, place)
            found.append(slice(first, first + size))
        return tuple(found)

    def _position(self, names: Sequence[str], place: Index) -> int:
        """Return which part of an axis a device has that is split over these names."""
        own, position = dict(zip(self.sizes, place, strict=True)), 0
        for name in names:
            position = position * self.sizes[name] + own[name]
        return position

    @staticmethod
    def _names(spec: Any, rank: int) -> list[tuple[str, ...]]:
        entries = [*spec, *[None] * (rank - len(spec))]
        return [e if isinstance(e, tuple) else (e,) if e else () for e in entries]

    def inside(self, result: int, index: Index, shape: Index) -> Index:
        """Return where an entry of a result is among the stacked shards."""
        spec = self.eqn.params["out_specs"][result]
        names = self._names(spec, len(shape))
        place, local = dict.fromkeys(self.sizes, 0), []
        for k, length, over in zip(index, shape, names, strict=True):
            size = length // math.prod(self.sizes[name] for name in over)
            part, rest = divmod(k, size)
            local.append(rest)
            for name in reversed(over):
                part, place[name] = divmod(part, self.sizes[name])
        return (*place.values(), *local)

    def everywhere(self, x: Any) -> Any:
        """Stack a value that is the same on all shards."""
        return jnp.broadcast_to(x, (*self.sizes.values(), *jnp.shape(x)))

    def lifted(self, run: Run, reads: Sequence[Any], writes: Sequence[Any]) -> Run:
        """Return an operation on stacked values; literals are not stacked.

        `run` is the operation on one shard, `reads` and `writes` are the types of its
        operands and results.
        """
        failed = []

        def lifted(*operands: Any) -> list[Any]:
            if not failed:
                try:
                    return self._mapped(run, operands)
                except Exception:  # no batching rule, or one that asks for the mesh
                    failed.append(True)
            return self._sharded(run, reads, writes)(*operands)

        return lifted

    def _mapped(self, run: Run, operands: Sequence[Any]) -> list[Any]:
        axes = [0 if jnp.ndim(x) else None for x in operands]
        for name, size in reversed(self.sizes.items()):
            run = jax.vmap(run, in_axes=axes, axis_name=name, axis_size=size)
        return list(run(*operands))

    def _sharded(self, run: Run, reads: Sequence[Any], writes: Sequence[Any]) -> Run:
        """Run it in a `shard_map` that gives each value the axes it varies over."""
        count, names = len(self.sizes), tuple(self.sizes)
        params = self.eqn.params

        def varying(aval: Any) -> list[str]:
            axes = _jax.varying(aval) if params["check_vma"] else names
            return [name for name in names if name in axes]

        def body(*operands: Any) -> list[Any]:
            pairs = zip(operands, reads, strict=True)
            shards = [x.reshape(aval.shape) for x, aval in pairs]
            return [x.reshape(*(1,) * count, *x.shape) for x in run(*shards)]

        def stacked(*operands: Any) -> list[Any]:
            """Hand each device its part, and stack what they return."""
            given = []
            for x, aval in zip(operands, reads, strict=True):
                x = x if jnp.ndim(x) >= count else self.everywhere(x)
                over = varying(aval)
                same = tuple(slice(None) if n in over else slice(1) for n in names)
                given.append(x[same])
            out = jax.shard_map(
                body,
                mesh=params["mesh"],
                in_specs=tuple(self._leading(varying(aval)) for aval in reads),
                out_specs=[self._leading(varying(aval)) for aval in writes],
                check_vma=params["check_vma"],
                axis_names=params["newly_manual_axes"],
            )(*given)
            sizes, pairs = tuple(self.sizes.values()), zip(out, writes, strict=True)
            return [jnp.broadcast_to(x, sizes + aval.shape) for x, aval in pairs]

        return jax.jit(stacked)

    def _leading(self, over: Sequence[str]) -> PartitionSpec:
        return PartitionSpec(*(n if n in over else None for n in self.sizes))
