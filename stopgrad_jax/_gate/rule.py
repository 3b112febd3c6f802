"""A rule: how cotangents of a gate's values become cotangents of its sources."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

import stopgrad_jax._jax as _jax

Arrays = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How cotangents of a gate's values become cotangents of its sources.

    Attributes:
      name: the public function that made it, for messages and printed programs.
      pull: (cotangents, residuals) -> cotangents. The residuals are the parameters,
        after the values where `reads_values`.
      linear: `pull` is linear and its own transpose, so tangents go through it too.
      reads_values: `pull` needs the values.
      forward: why a tangent cannot be computed through this gate, if it cannot.
      only_sources: what to say if the values are differentiated by anything else.
      axes: names of the axes that `pull` sums over.
      typed: `pull` is a traced program: its operands keep the types they were traced
        with (in `shard_map`: the axes they vary over).
      of: the function whose derivative it gives, if it is of one, for messages.
    """

    name: str
    pull: Callable[[Arrays, Arrays], Arrays]
    linear: bool = False
    reads_values: bool = False
    forward: str | None = None
    only_sources: str | None = None
    axes: tuple[str, ...] = ()
    typed: bool = False
    of: str = ""

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A rule's `pull` on one more axis, in front of every cotangent."""

    pull: Callable[[Arrays, Arrays], Arrays]
    residuals: tuple[int | None, ...]
    name: Any
    size: int
    spmd_name: Any

    def __call__(self, cts: Arrays, residuals: Arrays) -> Arrays:
        pull = jax.vmap(
            self.pull,
            in_axes=(0, list(self.residuals)),
            axis_name=self.name,
            axis_size=self.size,
            spmd_axis_name=self.spmd_name,
        )
        pairs = zip(residuals, self.residuals, strict=True)
        like = functools.partial(_jax.mapped_like, like=cts[0])
        return pull(list(cts), [x if d is None else like(x, d) for x, d in pairs])


@dataclasses.dataclass(frozen=True, eq=False)
class TracedRule:
    """A traced function as a `pull`; what it closed over is among the residuals."""

    jaxpr: Any
    consts: int

    def __call__(self, cts: Arrays, residuals: Arrays) -> Arrays:
        # The jaxpr takes first what it closed over, see `_jax.closed_over`; the gate
        # has that behind its own parameters.
        split = len(residuals) - self.consts
        consts, others = residuals[split:], residuals[:split]
        return _jax.evaluate(self.jaxpr, (), [*consts, *others, *cts])


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A `pull` that must never be needed."""

    message: str

    def __call__(self, cts: Arrays, residuals: Arrays) -> Arrays:
        raise TypeError(self.message)


def program(fun: Callable[..., Any], *examples: Any) -> tuple[TracedRule, Arrays]:
    """Trace a flat function on values like the examples.

    Returns the program and what it closes over.

    A closure over a traced value would be a leak under jit and scan: the rule is
    called much later, in another trace. So whatever `fun` closes over is handed to
    the gate as a parameter.
    """
    # A new function each time: JAX keeps a jaxpr by the function that it is of, with
    # the values that this closed over then.
    closed = jax.make_jaxpr(lambda *args: fun(*args))(*examples)
    jaxpr, consts = _jax.closed_over(closed)
    return TracedRule(jaxpr, len(consts)), consts
