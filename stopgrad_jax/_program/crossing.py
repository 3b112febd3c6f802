"""How a value inside a `shard_map` comes in and goes out, where nobody wired it.

All its shards together are one array outside: along the value's first axis, behind
those of the scans that it lies in; scalars become a vector there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import beats


@dataclasses.dataclass(frozen=True)
class Slot:
    """A value inside a body that something is done to: its type there, its fate.

    `steps`: how many of its axes are steps of scans. `channel`: what is given for it
    is not like the value: a channel of `_gate/summaries.py`, with an axis for devices.
    """

    aval: Any
    captured: bool
    steps: int = 0
    channel: bool = False


@dataclasses.dataclass(frozen=True)
class Crossing:
    """How one slot's value crosses the border of a `shard_map`, both ways.

    What is given goes through `to_inner` outside and `enter` inside; what leaves goes
    through `leave` inside and `to_outer` outside. None stays None.
    """

    eqn: Any
    slot: Slot

    @functools.cached_property
    def _axes(self) -> tuple[str, ...]:
        return sharded_over(self.eqn, self.slot.aval)

    @property
    def _spec(self) -> PartitionSpec:
        axes, steps = self._axes, self.slot.steps
        return PartitionSpec(*[None] * steps, axes) if axes else PartitionSpec()

    @property
    def _scalar(self) -> int | None:
        """The axis that scalars are put together on."""
        steps = self.slot.steps
        return steps if self._axes and len(self.slot.aval.shape) == steps else None

    @functools.cached_property
    def _around(self) -> frozenset[str]:
        """Mesh axes of `shard_map`s around this one that the value may differ over.

        That is where this one has `check_vma=False` and JAX does not know.
        """
        if self.eqn.params["check_vma"]:
            return frozenset()
        return frozenset().union(*(_jax.varying(x.aval) for x in self.eqn.invars))

    @functools.cached_property
    def _summed(self) -> tuple[str, ...]:
        return summed_over(self.eqn, self.slot.aval)

    # In -------------------------------------------------------------------------------

    def spec_in(self, x: Any) -> PartitionSpec | None:
        """How what is given is divided."""
        if x is None:
            return None
        if not self.slot.channel:
            return self._spec
        return PartitionSpec(self._summed) if self._summed else PartitionSpec()

    def to_inner(self, x: Any) -> Any:
        """Give what is given its sharding."""
        if x is None:
            return None
        if self._around:
            raise ValueError(_axes_are_lost(self.eqn))
        if not self.slot.channel:
            return _jax.sharded_as(x, self.type)
        if not self._summed:
            return x
        spec, mesh = PartitionSpec(self._summed), self.eqn.params["mesh"]
        return _jax.resharded(x, mesh=mesh, spec=spec)

    def enter(self, x: Any) -> Any:
        """Shape what is given as the value is inside."""
        if x is None:
            return None
        if self.slot.channel:
            return x[0] if self._summed else x
        return x if (axis := self._scalar) is None else jnp.squeeze(x, axis)

    # Out ------------------------------------------------------------------------------

    @property
    def spec_out(self) -> PartitionSpec | None:
        """How the shards of what leaves are put together."""
        return self._spec if self.slot.captured else None

    def leave(self, x: Any) -> Any:
        """Shape a value inside for the way out."""
        if x is None or (axis := self._scalar) is None:
            return x
        return jnp.expand_dims(x, axis)

    def to_outer(self, x: Any) -> Any:
        """Mark a value that is out of it as what it is there."""
        return x if x is None else _jax.vary(x, self._around)

    @property
    def type(self) -> Any:
        """Type of all shards together, as JAX has it."""

        def inside() -> Any:
            return self.leave(_jax.zeros(self.slot.aval))

        # JAX is asked: where the axes of the mesh are explicit a sharding is in the
        # type.
        with _jax.at_source_of(self.eqn):
            around = again(self.eqn, inside, (), self._spec)
            aval = _jax.type_of_result(around)
        return _jax.also_varying(aval, self._around)


def again(eqn: Any, body: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
    """Return a function of the `shard_map` that an equation is, of another body."""
    return jax.shard_map(
        body,
        mesh=eqn.params["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=eqn.params["check_vma"],
        axis_names=eqn.params["newly_manual_axes"],
    )


def sharded_over(eqn: Any, aval: Any) -> tuple[str, ...]:
    """Mesh axes of this shard_map that a value inside it differs over.

    With `check_vma=False` JAX does not know: then every axis counts that an operand is
    sharded over or whose index is read.
    """
    if eqn.params["check_vma"]:
        axes = _jax.varying(aval)
    else:
        entries = [entry for spec in eqn.params["in_specs"] for entry in spec]
        entries += _indices(_jax.opened(eqn.params["jaxpr"])[0])
        axes = {a for e in entries if e for a in (e if isinstance(e, tuple) else (e,))}
    return _ordered(eqn, axes)


def summed_over(eqn: Any, aval: Any) -> tuple[str, ...]:
    """Mesh axes of this shard_map on which each device counts.

    With `check_vma=False` all of them: a copy cannot be told from a shard.
    """
    checked = eqn.params["check_vma"]
    return sharded_over(eqn, aval) if checked else _ordered(eqn, None)


def _ordered(eqn: Any, axes: Any) -> tuple[str, ...]:
    own = eqn.params["newly_manual_axes"]
    wanted = own if axes is None else own & frozenset(axes)
    return tuple(axis for axis in eqn.params["mesh"].axis_names if axis in wanted)


def _indices(jaxpr: Any) -> Iterator[Any]:
    """Mesh axes whose index is read in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "axis_index":
            yield eqn.params["axis_name"]
        for inner in _jax.inner_jaxprs(eqn):
            yield from _indices(_jax.opened(inner)[0])


def _axes_are_lost(eqn: Any) -> str:
    line = _jax.line_of(eqn)
    return beats(
        "a gradient by a value in shard_map(check_vma=False)"
        + (f" ({line})" if line else ""),
        "the shard_map around it has check_vma=False too: JAX knows the axes that a "
        "value differs over in all of them or in none",
        "check_vma=False inside check_vma=True",
        "check_vma=False in both",
    )
