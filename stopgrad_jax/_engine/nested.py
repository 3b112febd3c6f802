"""Every primitive that holds jaxprs, described once.

`nested` says how an equation's operands feed its inner jaxprs and how their
results leave it; that is all that the search, the reachability analysis and the
evaluator know of control flow. `rebuild` makes the equation anew, with a public
function of JAX, around bodies that take more and return more than before.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
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

    `lift` turns the type of a value inside into the type of all its values outside.
    `rule`: what is inside is behind its author's own derivative rule. `dynamic`: it
    runs a number of times that is known only at run time.
    """

    bodies: Sequence[Body]
    lift: Callable[[Any], Any] = lambda aval: aval
    rule: bool = False
    dynamic: bool = False


@dataclasses.dataclass(frozen=True)
class Slot:
    """A value inside a body that something is done to: its type there, its fate.

    `channel`: what is given for it is not like the value, and one for all shards.
    """

    aval: Any
    captured: bool
    channel: bool = False


# A body that is run with more than its own operands: (which body, its operands,
# a perturbation or None for each slot in it, the token of this differentiation or
# None) -> (its results, the captured value or None for each slot).
Call = Callable[[int, Sequence[Any], Sequence[Any], Any], tuple[list[Any], list[Any]]]


def nested(eqn: Any) -> Nested | None:
    """Describe an equation's inner jaxprs; None if it has none we know of."""
    describe = _DESCRIBE.get(eqn.primitive.name)
    return describe(eqn) if describe else None


def _plain(eqn: Any, param: str, **kwargs: Any) -> Nested:
    jaxpr, consts = _jax.opened(eqn.params[param])
    body = Body(jaxpr, consts, range(len(eqn.invars)), range(len(eqn.outvars)))
    return Nested([body], **kwargs)


def _scan(eqn: Any) -> Nested:
    num_consts, num_carry = _jax.scan_arity(eqn)
    jaxpr, consts = _jax.opened(eqn.params["jaxpr"])
    feedback = [(i, num_consts + i) for i in range(num_carry)]
    operands, results = range(len(eqn.invars)), range(len(eqn.outvars))
    body = Body(jaxpr, consts, operands, results, feedback, repeats=True)
    length = eqn.params["length"]
    return Nested([body], lift=lambda aval: _jax.stacked(length, aval))


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


def _shard_map(eqn: Any) -> Nested:
    def lift(aval: Any) -> Any:
        axes = sharded_over(eqn, aval)
        if not axes:
            return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        count = math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
        first, *rest = aval.shape or (1,)
        return jax.ShapeDtypeStruct((count * first, *rest), aval.dtype)

    return _plain(eqn, "jaxpr", lift=lift)


_DESCRIBE: dict[str, Callable[[Any], Nested]] = {
    "jit": lambda eqn: _plain(eqn, "jaxpr"),
    "closed_call": lambda eqn: _plain(eqn, "call_jaxpr"),
    "remat2": lambda eqn: _plain(eqn, "jaxpr"),
    "custom_jvp_call": lambda eqn: _plain(eqn, "call_jaxpr", rule=True),
    "custom_vjp_call": lambda eqn: _plain(eqn, "call_jaxpr", rule=True),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}


def sharded_over(eqn: Any, aval: Any) -> tuple[str, ...]:
    """Mesh axes a value inside this shard_map differs over.

    With `check_vma=False` JAX does not know: then every axis that an operand is
    sharded over counts.
    """
    mesh = eqn.params["mesh"]
    if eqn.params["check_vma"]:
        axes = _jax.varying(aval)
    else:
        entries = [entry for spec in eqn.params["in_specs"] for entry in spec]
        axes = {a for e in entries if e for a in (e if isinstance(e, tuple) else (e,))}
    return tuple(axis for axis in mesh.axis_names if axis in axes)


# Rebuilding ----------------------------------------------------------------------


def rebuild(
    eqn: Any,
    call: Call,
    slots: Sequence[Sequence[Slot]],
    operands: Sequence[Any],
    perturbations: Sequence[Any],
    token: Any,
) -> tuple[list[Any], list[Any]]:
    """Make the equation anew around `call`; return its results and what it captured.

    `slots` holds those of each body; `perturbations` and what is captured are in the
    same order, body after body.
    """
    make = _REBUILD.get(eqn.primitive.name, _call)
    return make(eqn, call, slots, list(operands), list(perturbations), token)


def _call(eqn: Any, call: Call, slots: Any, *args: Any) -> Any:
    return call(0, *args)


def _rule(eqn: Any, call: Call, slots: Any, operands: Any, *args: Any) -> Any:
    # The results keep their author's rule; what is captured is computed beside it.
    return _jax.bind(eqn, *operands), call(0, operands, *args)[1]


def _rebuild_remat(eqn: Any, call: Call, slots: Any, *args: Any) -> Any:
    policy, cse = eqn.params["policy"], eqn.params["prevent_cse"]
    body = functools.partial(call, 0)
    return jax.checkpoint(body, policy=policy, prevent_cse=cse)(*args)


def _rebuild_scan(
    eqn: Any, call: Call, slots: Any, operands: Any, perturbations: Any, token: Any
) -> Any:
    num_consts, num_carry = _jax.scan_arity(eqn)
    consts, rest = operands[:num_consts], operands[num_consts:]

    def step(carry: Any, xs: Any) -> Any:
        xs, perturbations = xs
        out, captured = call(0, [*consts, *carry, *xs], perturbations, token)
        return out[:num_carry], (out[num_carry:], captured)

    params = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    xs = (rest[num_carry:], perturbations)
    carry, (ys, captured) = jax.lax.scan(step, rest[:num_carry], xs, **params)
    return [*carry, *ys], captured


def _rebuild_while(
    eqn: Any, call: Call, slots: Any, operands: Any, perturbations: Any, token: Any
) -> Any:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts = operands[:n], operands[n : n + m]
    first = len(slots[0])
    out = jax.lax.while_loop(
        lambda c: call(0, [*cond_consts, *c], perturbations[:first], token)[0][0],
        lambda c: call(1, [*body_consts, *c], perturbations[first:], token)[0],
        operands[n + m :],
    )
    return out, [None] * len(perturbations)


def _rebuild_cond(
    eqn: Any, call: Call, slots: Any, operands: Any, perturbations: Any, token: Any
) -> Any:
    ends = list(itertools.accumulate(map(len, slots)))

    def branch(k: int) -> Callable[..., Any]:
        mine = slice(ends[k] - len(slots[k]), ends[k])

        def run(operands: Any, perturbations: Any, token: Any) -> Any:
            out, captured = call(k, operands, perturbations[mine], token)
            # A branch that is not taken captures zeros.
            everyone = itertools.chain(*slots)
            every = [_jax.zeros(s.aval) if s.captured else None for s in everyone]
            every[mine] = captured
            return out, every

        return run

    branches = [branch(k) for k in range(len(slots))]
    return jax.lax.switch(operands[0], branches, operands[1:], perturbations, token)


def _rebuild_shard_map(
    eqn: Any, call: Call, slots: Any, operands: Any, perturbations: Any, token: Any
) -> Any:
    axes = [sharded_over(eqn, slot.aval) for slot in slots[0]]
    specs = [PartitionSpec(a) if a else PartitionSpec() for a in axes]
    channel = [slot.channel for slot in slots[0]]
    # A scalar that differs from shard to shard leaves as a vector of them.
    scalar = [bool(a) and not s.aval.shape for a, s in zip(axes, slots[0], strict=True)]
    shaped = [s and not c for s, c in zip(scalar, channel, strict=True)]

    def reshaped(values: Any, which: list[bool], shape: tuple[int, ...]) -> list[Any]:
        pairs = zip(values, which, strict=True)
        return [x if x is None or not w else x.reshape(shape) for x, w in pairs]

    def body(operands: Any, perturbations: Any, token: Any) -> Any:
        out, captured = call(0, operands, reshaped(perturbations, shaped, ()), token)
        return out, reshaped(captured, scalar, (1,))

    def only(specs: Any, used: Any) -> list[Any]:
        return [p if u else None for p, u in zip(specs, used, strict=True)]

    given = only(
        [PartitionSpec() if c else p for p, c in zip(specs, channel, strict=True)],
        [p is not None for p in perturbations],
    )
    taken = only(specs, [slot.captured for slot in slots[0]])
    return jax.shard_map(
        body,
        mesh=eqn.params["mesh"],
        in_specs=(list(eqn.params["in_specs"]), given, PartitionSpec()),
        out_specs=(list(eqn.params["out_specs"]), taken),
        check_vma=eqn.params["check_vma"],
        axis_names=eqn.params["newly_manual_axes"],
    )(operands, perturbations, token)


_REBUILD: dict[str, Callable[..., Any]] = {
    "custom_jvp_call": _rule,
    "custom_vjp_call": _rule,
    "remat2": _rebuild_remat,
    "scan": _rebuild_scan,
    "while": _rebuild_while,
    "cond": _rebuild_cond,
    "shard_map": _rebuild_shard_map,
}
