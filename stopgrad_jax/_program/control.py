"""The one account of the primitives that hold programs: calls, rules, loops, branches.

Each primitive is one class, with three methods in one order. `bodies` says how the
operands of an equation feed its programs and how their results leave it; `run` makes
the equation anew, with a public function of JAX, around bodies that take and return
more; `rounds` steps through it, one run of a body at a time, on real values. What is
known of a primitive besides (that it repeats, that it may not run, what decides on it)
are its fields, and nobody else asks for its name.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from .crossing import Crossing, Slot, again, summed_over
from .wiring import (
    PLAIN,
    At,
    Body,
    Copies,
    Extras,
    Lead,
    Made,
    Round,
    Rounds,
    RunBody,
    Trees,
)


class Control:
    """A call: its one program is run once, on the operands as they are.

    Attributes:
      decides: what an operand or a program decides while it runs: which "branch" is
        taken, or whether there is another "round".
      loops: its body is run step by step, as often as it takes.
      on_devices: its body is run on each device of a mesh.
      rule: what is inside is behind its author's own derivative rule.
    """

    decides: ClassVar[Literal["branch", "round", ""]] = ""
    loops: ClassVar[bool] = False
    on_devices: ClassVar[bool] = False
    rule: ClassVar[bool] = False
    _program: ClassVar[str] = "jaxpr"

    def __init__(self, eqn: Any) -> None:
        """Describe an equation; nothing of it is looked at before it is asked for."""
        self.eqn = eqn

    @functools.cached_property
    def bodies(self) -> Sequence[Body]:
        """The programs in it."""
        opened = _jax.opened(_jax.params_of(self.eqn)[self._program])
        return [Body(*opened, range(self._reads), range(self._writes))]

    @property
    def _reads(self) -> int:
        return len(self.eqn.invars)

    @property
    def _writes(self) -> int:
        return len(self.eqn.outvars)

    def with_bodies(self, bodies: Sequence[Body]) -> Control:
        """Return it with other programs, of the same variables."""
        new = copy.copy(self)
        # In the place of what the cached property would look up.
        new.bodies = bodies
        return new

    # What is known of it -------------------------------------------------------------

    @property
    def is_call(self) -> bool:
        """Its program is run once, where it stands."""
        return not (self.decides or self.loops or self.on_devices)

    @property
    def dynamic(self) -> bool:
        """It runs a number of times that is known only at run time."""
        return self.decides == "round"

    @property
    def is_empty(self) -> bool:
        """It is a loop of no round."""
        return False

    @property
    def may_run_no_round(self) -> bool:
        """Its results may be what it was begun with."""
        return self.dynamic or self.is_empty

    @property
    def joins(self) -> bool:
        """A result of it may be one of several values."""
        return len(self.bodies) > 1 or self.may_run_no_round

    def is_scanned(self, operand: int) -> bool:
        """Tell an operand of which each step takes its own value."""
        return False

    def is_stacked(self, result: int) -> bool:
        """Tell a result that holds one value for each step."""
        return False

    def lift(self, aval: Any, steps: int) -> Any:
        """Return the type of all values outside that one inside is.

        `steps`: how many of its axes are steps of scans inside.
        """
        return aval

    def copies(self, aval: Any) -> Copies | None:
        """Return how many values there are outside of one inside; None if it is one."""
        return None

    # To run it again -----------------------------------------------------------------

    def run(self, call: RunBody, operands: Trees, extras: Extras = PLAIN) -> Made:
        """Make the equation anew around `call`; return its results and what left it."""
        return call(0, operands, extras.given, extras.shared)

    def rounds(self, operands: Trees, at: At, lead: Lead) -> Rounds:
        """Run it round by round; the operands are anything that stands for them."""
        return [[x] for x in (yield Round(0, 0, list(operands)))]


class _Call(Control):
    _program = "call_jaxpr"


class _Rule(Control):
    """A custom derivative rule: its results keep it, what leaves is computed beside."""

    rule, _program = True, "call_jaxpr"

    @classmethod
    def is_known(cls, eqn: Any) -> bool:
        """Tell a rule whose operands are those of its function, and no more."""
        body = _jax.opened(_jax.params_of(eqn)["call_jaxpr"])[0]
        return len(body.invars) == len(eqn.invars)

    def run(self, call: RunBody, operands: Trees, extras: Extras = PLAIN) -> Made:
        # The rule stays the derivative of the results. What leaves is of a second run
        # of the function, of which nothing else is used.
        out = _jax.bind(self.eqn, *operands)
        if not any(extras.slots):
            return out, []
        return out, super().run(call, operands, extras)[1]


class _Remat(Control):
    def run(self, call: RunBody, operands: Trees, extras: Extras = PLAIN) -> Made:
        params = _jax.params_of(self.eqn)
        cse: Any = params.get("prevent_cse", True)
        if isinstance(cse, tuple):  # one for each operand; the rest is held apart too
            cse = (list(cse), True, True)
        body = functools.partial(call, 0)
        again = jax.checkpoint(body, policy=params["policy"], prevent_cse=cse)
        return again(list(operands), list(extras.given), extras.shared)


class _Scan(Control):
    loops = True

    @functools.cached_property
    def _arity(self) -> tuple[int, int]:
        return _jax.scan_arity(self.eqn)

    @functools.cached_property
    def bodies(self) -> Sequence[Body]:
        opened = _jax.opened(self.eqn.params["jaxpr"])
        consts, carries = self._arity
        feedback = [(k, consts + k) for k in range(carries)]
        operands, results = range(self._reads), range(self._writes)
        return [Body(*opened, operands, results, feedback, repeats=True)]

    @property
    def is_empty(self) -> bool:
        return self.eqn.params["length"] == 0

    def is_scanned(self, operand: int) -> bool:
        return operand >= sum(self._arity)

    def is_stacked(self, result: int) -> bool:
        return result >= self._arity[1]

    def lift(self, aval: Any, steps: int) -> Any:
        return _jax.stacked(self.eqn.params["length"], aval)

    def copies(self, aval: Any) -> Copies | None:
        return Copies(self.eqn.params["length"])

    def run(self, call: RunBody, operands: Trees, extras: Extras = PLAIN) -> Made:
        first, carries = self._arity
        consts, rest = operands[:first], operands[first:]

        def step(carry: Any, xs: Any) -> Any:
            xs, given = xs
            out, left = call(0, [*consts, *carry, *xs], given, extras.shared)
            return list(out[:carries]), (list(out[carries:]), left)

        params = {key: self.eqn.params[key] for key in ("length", "reverse", "unroll")}
        xs = list(rest[carries:]), list(extras.given)
        carry, (ys, left) = jax.lax.scan(step, list(rest[:carries]), xs, **params)
        return [*carry, *ys], left

    def rounds(self, operands: Trees, at: At, lead: Lead) -> Rounds:
        first, carries = self._arity
        consts, end = list(operands[:first]), first + carries
        carry, stacked = list(operands[first:end]), dict[int, list[Any]]()
        steps = range(self.eqn.params["length"])
        for step in reversed(steps) if self.eqn.params["reverse"] else steps:
            now = [at(x, step) for x in operands[end:]]
            out = yield Round(0, step, [*consts, *carry, *now])
            carry, stacked[step] = list(out[:carries]), list(out[carries:])
        ys = range(self._writes - carries)
        return [*([x] for x in carry), *([stacked[t][k] for t in steps] for k in ys)]


class _While(Control):
    decides, loops = "round", True

    @property
    def _consts(self) -> tuple[int, int]:
        return self.eqn.params["cond_nconsts"], self.eqn.params["body_nconsts"]

    @functools.cached_property
    def bodies(self) -> Sequence[Body]:
        first, count = self._consts
        carry = range(first + count, self._reads)
        condition = _jax.opened(self.eqn.params["cond_jaxpr"])
        opened = _jax.opened(self.eqn.params["body_jaxpr"])
        operands = [*range(first, first + count), *carry]
        feedback = [(k, count + k) for k in range(len(carry))]
        return [
            Body(*condition, [*range(first), *carry], [None]),
            Body(*opened, operands, range(len(carry)), feedback, repeats=True),
        ]

    def run(self, call: RunBody, operands: Trees, extras: Extras = PLAIN) -> Made:
        first, count = self._consts
        end, given, shared = first + count, extras.given, extras.shared
        split = len(extras.slots[0]) if extras.slots else 0

        def goes_on(carry: Any) -> Any:
            reads = [*operands[:first], *carry]
            return extras.lead(call(0, reads, given[:split], shared)[0][0])

        def step(carry: Any) -> Any:
            reads = [*operands[first:end], *carry]
            return list(call(1, reads, given[split:], shared)[0])

        out = self._loop(goes_on, step, list(operands[end:]))
        # Nothing leaves a while loop: nobody knows how many rounds there are to stack.
        return out, [None] * len(given)

    def _loop(
        self, goes_on: Callable[[Any], Any], step: Callable[[Any], Any], start: Any
    ) -> Any:
        """`jax.lax.while_loop`, whose equation may be under `vmap`.

        Its condition is then one for each example, in the leading axes of what it
        carries, and an example whose condition is false waits for the others.
        """
        (condition,) = self.eqn.params["cond_jaxpr"].out_avals
        if not condition.shape:
            return jax.lax.while_loop(goes_on, step, start)

        def waits(carry: Any) -> Any:
            going = goes_on(carry)

            def chosen(new: Any, old: Any) -> Any:
                axes = range(going.ndim, jnp.ndim(old))
                return jnp.where(jnp.expand_dims(going, axes), new, old)

            return jax.tree.map(chosen, step(carry), carry)

        return jax.lax.while_loop(lambda carry: jnp.any(goes_on(carry)), waits, start)

    def rounds(self, operands: Trees, at: At, lead: Lead) -> Rounds:
        first, count = self._consts
        asked, consts = operands[:first], operands[first : first + count]
        carry = list(operands[first + count :])
        for step in itertools.count():
            (going,) = yield Round(0, step, [*asked, *carry])
            if not lead(going):
                break
            carry = list((yield Round(1, step, [*consts, *carry])))
        return [[x] for x in carry]


class _Cond(Control):
    decides = "branch"

    @functools.cached_property
    def bodies(self) -> Sequence[Body]:
        operands, results = range(1, self._reads), range(self._writes)
        branches = map(_jax.opened, self.eqn.params["branches"])
        return [Body(*branch, operands, results) for branch in branches]

    def run(self, call: RunBody, operands: Trees, extras: Extras = PLAIN) -> Made:
        slots = extras.slots or [()] * len(self.bodies)
        ends = list(itertools.accumulate(map(len, slots)))
        # All branches must return alike: each has something for the slots of every one.
        every = list(itertools.chain(*slots))

        def branch(k: int) -> Callable[..., Any]:
            mine = slice(ends[k] - len(slots[k]), ends[k])

            def taken(operands: Any, given: Any, shared: Any) -> Any:
                out, left = call(k, operands, given[mine], shared)
                # What leaves a branch that is not taken is zero.
                none = [_jax.zeros(s.aval) if s.captured else None for s in every]
                return list(out), [*none[: mine.start], *left, *none[mine.stop :]]

            return taken

        branches = list(map(branch, range(len(slots))))
        rest = list(operands[1:]), list(extras.given), extras.shared
        return jax.lax.switch(extras.lead(operands[0]), branches, *rest)

    def rounds(self, operands: Trees, at: At, lead: Lead) -> Rounds:
        # As `jax.lax.switch` does with an index that is out of range.
        index = min(max(int(lead(operands[0])), 0), len(self.bodies) - 1)
        return [[x] for x in (yield Round(index, 0, list(operands[1:])))]


class _ShardMap(Control):
    on_devices = True

    def lift(self, aval: Any, steps: int) -> Any:
        return Crossing(self.eqn, Slot(aval, True, steps)).type

    def copies(self, aval: Any) -> Copies | None:
        axes = summed_over(self.eqn, aval)
        count = math.prod(self.eqn.params["mesh"].shape[axis] for axis in axes)
        return Copies(count, devices=True) if axes else None

    def run(self, call: RunBody, operands: Trees, extras: Extras = PLAIN) -> Made:
        # The equation has no spec for what crosses besides its operands and results.
        slots = itertools.chain(*extras.slots)
        crossings = [Crossing(self.eqn, slot) for slot in slots]

        def body(operands: Any, given: Any, shared: Any) -> Any:
            pairs = zip(crossings, given, strict=True)
            out, left = call(0, operands, [c.enter(x) for c, x in pairs], shared)
            pairs = zip(crossings, left, strict=True)
            return list(out), [c.leave(x) for c, x in pairs]

        pairs = list(zip(crossings, extras.given, strict=True))
        reads = list(self.eqn.params["in_specs"]), [c.spec_in(x) for c, x in pairs]
        writes = list(self.eqn.params["out_specs"]), [c.spec_out for c in crossings]
        run = again(self.eqn, body, (*reads, _SAME), writes)
        given = [c.to_inner(x) for c, x in pairs]
        out, left = run(list(operands), given, extras.shared)
        pairs = zip(crossings, left, strict=True)
        return out, [c.to_outer(x) for c, x in pairs]


_SAME = jax.sharding.PartitionSpec()  # on all devices

_KINDS: dict[str, type[Control]] = {
    "jit": Control,
    "closed_call": _Call,
    "remat2": _Remat,
    "custom_jvp_call": _Rule,
    "custom_vjp_call": _Rule,
    "scan": _Scan,
    "while": _While,
    "cond": _Cond,
    "shard_map": _ShardMap,
}


def control(eqn: Any) -> Control | None:
    """Describe an equation that holds programs; None if it has none we know of."""
    kind = _KINDS.get(_jax.kind_of(eqn))
    if kind is None or (kind is _Rule and not _Rule.is_known(eqn)):
        return None  # a newer rule may be given more than its function takes
    return kind(eqn)
