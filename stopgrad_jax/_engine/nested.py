"""Every primitive that holds jaxprs, described once.

`nested` says how an equation's operands feed its inner jaxprs and how their
results leave it; that is all that the search, the reachability analysis and the
evaluator know of control flow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import stopgrad_jax._jax as _jax


@dataclasses.dataclass(frozen=True)
class Body:
    """One jaxpr inside an equation, and how it is wired to it.

    `operands[i]` is the operand of the equation that feeds its input i, `results[o]`
    the result that its output o feeds (None: it feeds no result). In a loop,
    `feedback` holds (o, i) where output o is input i of the next round; `repeats`: it
    is run again with what is left in references.
    """

    jaxpr: Any
    consts: Sequence[Any]
    operands: Sequence[int]
    results: Sequence[int | None]
    feedback: Sequence[tuple[int, int]] = ()
    repeats: bool = False


@dataclasses.dataclass(frozen=True)
class Nested:
    """The bodies of an equation and where a value inside them ends up outside.

    `lift` turns the type of a value inside, and the number of its axes that are steps
    of scans inside, into the type of all its values outside. `copies`: how many values
    of this type there are outside, one for each step of a scan or each shard; None if
    it is one. `rule`: what is inside is behind its author's own derivative rule.
    `dynamic`: it runs a number of times that is known only at run time.
    """

    bodies: Sequence[Body]
    lift: Callable[[Any, int], Any] = lambda aval, steps: aval
    copies: Callable[[Any], Copies | None] = lambda aval: None
    rule: bool = False
    dynamic: bool = False


@dataclasses.dataclass(frozen=True)
class Copies:
    """How many values there are of one, over the steps of a scan or over devices."""

    count: int
    devices: bool = False


def nested(eqn: Any) -> Nested | None:
    """Describe an equation's inner jaxprs; None if it has none we know of."""
    describe = _DESCRIBE.get(_jax.kind_of(eqn))
    return describe(eqn) if describe else None


def _plain(eqn: Any, param: str, **kwargs: Any) -> Nested:
    jaxpr, consts = _jax.opened(_jax.params_of(eqn)[param])
    body = Body(jaxpr, consts, range(len(eqn.invars)), range(len(eqn.outvars)))
    return Nested([body], **kwargs)


def _scan(eqn: Any) -> Nested:
    num_consts, num_carry = _jax.scan_arity(eqn)
    jaxpr, consts = _jax.opened(eqn.params["jaxpr"])
    feedback = [(i, num_consts + i) for i in range(num_carry)]
    operands, results = range(len(eqn.invars)), range(len(eqn.outvars))
    body = Body(jaxpr, consts, operands, results, feedback, repeats=True)
    length = eqn.params["length"]
    return Nested(
        [body],
        lift=lambda aval, steps: _jax.stacked(length, aval),
        copies=lambda aval: Copies(length),
    )


def _while(eqn: Any) -> Nested:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = range(n + m, len(eqn.invars))
    cond, cond_consts = _jax.opened(eqn.params["cond_jaxpr"])
    body, body_consts = _jax.opened(eqn.params["body_jaxpr"])
    feedback = [(i, m + i) for i in range(len(carry))]
    return Nested(
        [
            Body(cond, cond_consts, [*range(n), *carry], [None]),
            Body(
                body,
                body_consts,
                [*range(n, n + m), *carry],
                range(len(carry)),
                feedback,
                repeats=True,
            ),
        ],
        dynamic=True,
    )


def _cond(eqn: Any) -> Nested:
    bodies = []
    for branch in eqn.params["branches"]:
        jaxpr, consts = _jax.opened(branch)
        operands, results = range(1, len(eqn.invars)), range(len(eqn.outvars))
        bodies.append(Body(jaxpr, consts, operands, results))
    return Nested(bodies)


def _rule(eqn: Any) -> Nested | None:
    body = _jax.opened(_jax.params_of(eqn)["call_jaxpr"])[0]
    # A newer rule may be given more than its function takes: how is not known.
    if len(body.invars) != len(eqn.invars):
        return None
    return _plain(eqn, "call_jaxpr", rule=True)


def _shard_map(eqn: Any) -> Nested:
    def copies(aval: Any) -> Copies | None:
        axes = summed_over(eqn, aval)
        count = math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
        return Copies(count, devices=True) if axes else None

    def lift(aval: Any, steps: int) -> Any:
        return Shards.of(eqn, aval, steps).type

    return _plain(eqn, "jaxpr", lift=lift, copies=copies)


_DESCRIBE: dict[str, Callable[[Any], Nested | None]] = {
    "jit": lambda eqn: _plain(eqn, "jaxpr"),
    "closed_call": lambda eqn: _plain(eqn, "call_jaxpr"),
    "remat2": lambda eqn: _plain(eqn, "jaxpr"),
    "custom_jvp_call": _rule,
    "custom_vjp_call": _rule,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}


def while_loop(
    eqn: Any,
    goes_on: Callable[[Any], Any],
    step: Callable[[Any], Any],
    init: Any,
) -> Any:
    """Run a `while` anew: `jax.lax.while_loop`, whose equation may be under `vmap`.

    Its condition is then one for each example, in the leading axes of what it carries,
    and an example whose condition is false waits for the others.
    """
    (condition,) = eqn.params["cond_jaxpr"].out_avals
    if not condition.shape:
        return jax.lax.while_loop(goes_on, step, init)

    def waits(carry: Any) -> Any:
        going = goes_on(carry)

        def chosen(new: Any, old: Any) -> Any:
            axes = range(going.ndim, jnp.ndim(old))
            return jnp.where(jnp.expand_dims(going, axes), new, old)

        return jax.tree.map(chosen, step(carry), carry)

    return jax.lax.while_loop(lambda carry: jnp.any(goes_on(carry)), waits, init)


# Shards --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the shards of a value inside a `shard_map` are one array outside.

    They are put together along the value's first axis, behind those of the scans that
    it lies in; scalars become a vector there.

    Attributes:
      eqn: the `shard_map`.
      aval: type of one shard.
      spec: how they are put together.
      scalar: the axis that scalars are put together on.
      around: mesh axes of `shard_map`s around this one that it may differ over, where
        this one has `check_vma=False` and JAX does not know.
    """

    eqn: Any
    aval: Any
    spec: PartitionSpec
    scalar: int | None
    around: frozenset[str]

    @classmethod
    def of(cls, eqn: Any, aval: Any, steps: int) -> Shards:
        """Describe those of a value with so many axes of scans inside."""
        axes, around = sharded_over(eqn, aval), frozenset[str]()
        if not eqn.params["check_vma"]:
            around = around.union(*(_jax.varying(atom.aval) for atom in eqn.invars))
        if not axes:
            return cls(eqn, aval, PartitionSpec(), None, around)
        scalar = steps if len(aval.shape) == steps else None
        return cls(eqn, aval, PartitionSpec(*[None] * steps, axes), scalar, around)

    def leave(self, x: Any) -> Any:
        """Shape a value inside for the way out."""
        return x if self.scalar is None else jnp.expand_dims(x, self.scalar)

    def outside(self, x: Any) -> Any:
        """Mark a value that is out of it as what it is there."""
        return _jax.vary(x, self.around)

    def enter(self, x: Any) -> Any:
        """Undo it inside."""
        return x if self.scalar is None else jnp.squeeze(x, self.scalar)

    def reshard(self, x: Any) -> Any:
        """Give a value like all shards together their sharding."""
        return _jax.sharded_as(x, self.type)

    @property
    def type(self) -> Any:
        """Type of all shards together, as JAX has it."""

        def inside() -> Any:
            return self.leave(_jax.zeros(self.aval))

        with _jax.at_source_of(self.eqn):
            around = again(self.eqn, inside, in_specs=(), out_specs=self.spec)
            aval = _jax.type_of_result(around)
        return _jax.also_varying(aval, self.around)


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
