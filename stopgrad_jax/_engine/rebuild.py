"""Make an equation that holds jaxprs anew, around bodies that take and return more.

With a public function of JAX each: only what `nested` reads depends on its version.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import beats

from .nested import Shards, again, summed_over, while_loop


@dataclasses.dataclass(frozen=True)
class Slot:
    """A value inside a body that something is done to: its type there, its fate.

    `steps`: how many of its axes are steps of scans. `channel`: what is given for it
    is not like the value: a channel, see `reduced`, with an axis for each device.
    """

    aval: Any
    captured: bool
    steps: int = 0
    channel: bool = False


# A body that is run with more than its own operands: (which body, its operands,
# a perturbation or None for each slot in it, the token of this differentiation or
# None) -> (its results, the captured value or None for each slot).
Call = Callable[[int, Sequence[Any], Sequence[Any], Any], tuple[list[Any], list[Any]]]


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
    make = _REBUILD.get(_jax.kind_of(eqn), _call)
    return make(eqn, call, slots, list(operands), list(perturbations), token)


def _call(eqn: Any, call: Call, slots: Any, *args: Any) -> Any:
    return call(0, *args)


def _rule(eqn: Any, call: Call, slots: Any, operands: Any, *args: Any) -> Any:
    # The results keep their author's rule; what is captured is computed beside it.
    return _jax.bind(eqn, *operands), call(0, operands, *args)[1]


def _rebuild_remat(eqn: Any, call: Call, slots: Any, *args: Any) -> Any:
    params = _jax.params_of(eqn)
    cse: Any = params.get("prevent_cse", True)
    if isinstance(cse, tuple):  # one for each operand; the rest is held apart too
        cse = (list(cse), True, True)
    body = functools.partial(call, 0)
    return jax.checkpoint(body, policy=params["policy"], prevent_cse=cse)(*args)


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
    out = while_loop(
        eqn,
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
    every = [Shards.of(eqn, slot.aval, slot.steps) for slot in slots[0]]
    for shards, p in zip(every, perturbations, strict=True):
        if p is not None and shards.around:
            raise ValueError(_axes_are_lost(eqn))
    ways = list(map(_way_in, slots[0], every))

    def body(operands: Any, perturbations: Any, token: Any) -> Any:
        given = [_of(way.enter, p) for way, p in zip(ways, perturbations, strict=True)]
        out, captured = call(0, operands, given, token)
        return out, [_of(s.leave, x) for s, x in zip(every, captured, strict=True)]

    given = [_of(way.reshard, p) for way, p in zip(ways, perturbations, strict=True)]
    used = [None if p is None else w.spec for w, p in zip(ways, given, strict=True)]
    taken = [
        s.spec if slot.captured else None
        for s, slot in zip(every, slots[0], strict=True)
    ]
    around = again(
        eqn,
        body,
        in_specs=(list(eqn.params["in_specs"]), used, PartitionSpec()),
        out_specs=(list(eqn.params["out_specs"]), taken),
    )
    out, captured = around(operands, given, token)
    return out, [_of(s.outside, x) for s, x in zip(every, captured, strict=True)]


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


def _of(function: Callable[[Any], Any], x: Any) -> Any:
    return None if x is None else function(x)


@dataclasses.dataclass(frozen=True)
class _Way:
    """How what is given for a slot comes into a `shard_map`."""

    spec: PartitionSpec
    reshard: Callable[[Any], Any]
    enter: Callable[[Any], Any]


def _way_in(slot: Slot, shards: Shards) -> _Way:
    if not slot.channel:
        return _Way(shards.spec, shards.reshard, shards.enter)
    eqn, axes = shards.eqn, summed_over(shards.eqn, slot.aval)
    if not axes:
        return _Way(PartitionSpec(), lambda x: x, lambda x: x)
    spec, mesh = PartitionSpec(axes), eqn.params["mesh"]
    reshard = functools.partial(_jax.resharded, mesh=mesh, spec=spec)
    return _Way(spec, reshard, lambda x: x[0])


_REBUILD: dict[str, Callable[..., Any]] = {
    "custom_jvp_call": _rule,
    "custom_vjp_call": _rule,
    "remat2": _rebuild_remat,
    "scan": _rebuild_scan,
    "while": _rebuild_while,
    "cond": _rebuild_cond,
    "shard_map": _rebuild_shard_map,
}
