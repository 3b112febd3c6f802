"""What a backward function returns where some of its cotangents are zero.

A derivative is linear in its cotangents, but a function that somebody wrote need not
be: it may return a number whatever comes, or add a part of its own. So it is followed
with zeros in the place of the cotangents that do not come, and only what is a zero by
itself is one: a literal, what is multiplied by one, a sum of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import Control, control
from stopgrad_jax._program.signature import signature
from stopgrad_jax._program.wiring import Body

from .computed import all_that_flows, computed_from
from .linear import is_linear
from .reach import Bits
from .references import carries, is_about_refs

# A value all of whose numbers are this one, or one of which just this is known: that
# it has nothing to do with a cotangent that comes, or that it may have.
_State = float | str
_OTHER, _LIVE = "other", "live"


def cotangents_needed(jaxpr: Any, consts: Sequence[Any], count: int) -> list[Bits]:
    """For each result of a backward function, the cotangents (as bits) that make it.

    Its last `count` inputs are the cotangents. What it returns whatever comes, it
    returns with each of them.
    """
    every, start = (1 << count) - 1, len(jaxpr.invars) - count
    flows = [bits >> start for bits in all_that_flows(jaxpr)]
    # Then nothing is found that the last line here would not put back.
    if count == 1 and all(flows):
        return flows
    # What a reference holds changes under way: it has no one state.
    if _holds_refs(jaxpr):
        return flows
    known = [_constant(x) for x in consts]
    found = [0] * len(flows)
    absent = _Absent()
    for k in range(count):
        cts: list[_State] = [0.0] * count
        cts[k] = _LIVE
        states = absent.run(jaxpr, known, [*[_OTHER] * start, *cts])
        for i, state in enumerate(states):
            found[i] |= 0 if state == 0 else 1 << k
    # It may take several of them to make one, as in a product.
    return [bits or (flow & every) for bits, flow in zip(found, flows, strict=True)]


def may_be_nonzero(jaxpr: Any, consts: Sequence[Any]) -> bool:
    """Tell whether any result of a program is more than a zero by itself."""
    if _holds_refs(jaxpr):
        return False
    inputs: list[_State] = [_OTHER] * len(jaxpr.invars)
    known = [_constant(x) for x in consts]
    return any(state != 0 for state in _Absent().run(jaxpr, known, inputs))


class _Absent:
    """Follows a program, given what is known of its inputs."""

    def __init__(self) -> None:
        self._linear: dict[Any, bool] = {}
        self._made: dict[Any, tuple[Any, list[_State]]] = {}

    def run(
        self, jaxpr: Any, consts: Sequence[_State], inputs: Sequence[_State]
    ) -> list[_State]:
        env: dict[Any, _State] = dict(zip(jaxpr.constvars, consts, strict=False))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            operands = [_read(env, atom) for atom in eqn.invars]
            key = id(eqn), *operands
            if key not in self._made:  # with the equation: its id must stay its own
                self._made[key] = eqn, self._results(eqn, operands)
            env.update(zip(eqn.outvars, self._made[key][1], strict=True))
        return [_read(env, atom) for atom in jaxpr.outvars]

    def _results(self, eqn: Any, operands: Sequence[_State]) -> list[_State]:
        """Return what is known of the results of an equation."""
        inner = control(eqn)
        if inner is not None:
            return self._nested(eqn, inner, operands)
        if not any(isinstance(x, float) for x in operands):
            state: _State = _LIVE if _LIVE in operands else _OTHER
            return [state] * len(eqn.outvars)
        every = [(1 << len(operands)) - 1] * len(eqn.outvars)
        if (reads := computed_from(eqn)) == every:
            return [self._result(eqn, operands)] * len(eqn.outvars)
        # A leaf of several, as of `device_put`, is what its own operand is.
        return [
            functools.reduce(
                _either, [x for k, x in enumerate(operands) if bits >> k & 1]
            )
            for bits in reads
        ]

    def _result(self, eqn: Any, operands: Sequence[_State]) -> _State:
        state: _State = _LIVE if _LIVE in operands else _OTHER
        if all(isinstance(x, float) for x in operands):
            state = _known(eqn, operands)
        elif eqn.primitive.name == "select_n":
            cases = operands[1:]
            if isinstance(operands[0], float):
                return cases[int(operands[0])]
            if isinstance(cases[0], float) and len(set(cases)) == 1:
                return cases[0]
        if isinstance(state, str) and 0.0 in operands and self._is_zero(eqn, operands):
            return 0.0
        return state

    def _is_zero(self, eqn: Any, operands: Sequence[_State]) -> bool:
        """Tell a function that is linear in those operands that are zero.

        Unless it is so in others together with them: then it is a sum.
        """
        # A product, of numbers or of bits: zero if one of them is, whatever the other.
        if eqn.primitive.name in ("mul", "and"):
            return True
        if eqn.primitive.name in _BETWEEN or not all(
            carries(v.aval) for v in eqn.outvars
        ):
            return False
        moved = [k for k, atom in enumerate(eqn.invars) if carries(atom.aval)]
        zeros = [k for k in moved if operands[k] == 0]
        rest = [k for k in moved if operands[k] != 0]
        if not zeros or not self._is_linear(eqn, zeros):
            return False
        return not any(self._is_linear(eqn, [*zeros, k]) for k in rest)

    def _is_linear(self, eqn: Any, moved: list[int]) -> bool:
        key = signature(eqn, literals=False), tuple(moved)
        if key not in self._linear:
            self._linear[key] = is_linear(eqn, moved)
        return self._linear[key]

    def _nested(
        self, eqn: Any, inner: Control, operands: Sequence[_State]
    ) -> list[_State]:
        results: list[_State | None] = [None] * len(eqn.outvars)
        by_branch, runs = inner.decides == "branch", not inner.is_empty
        bodies = list(inner.bodies)
        if by_branch and isinstance(operands[0], float):
            bodies = [bodies[int(operands[0])]]
        decided: _State = _OTHER
        if by_branch and len(bodies) > 1:
            decided = operands[0]
        for body in reversed(bodies):  # a loop's condition after what it carries
            inputs = [operands[k] for k in body.operands]
            # What any round may carry are the last inputs of the condition.
            if body.is_condition:
                carried = list(map(_some, results))
                consts = [_constant(x) for x in body.consts]
                inputs[len(inputs) - len(carried) :] = carried
                (decided,) = self.run(body.jaxpr, consts, inputs)
                continue
            out = self._rounds(body, inputs) if runs else []
            for k, state in zip(body.results, out, strict=False):
                if k is not None:
                    results[k] = _either(results[k], state)
            for o, back in body.feedback if inner.may_run_no_round else ():
                if (k := body.results[o]) is not None:
                    results[k] = _either(results[k], inputs[back])
        states = list(map(_some, results))
        # Whichever way it goes, what is one number in all branches stays that number.
        if decided == _LIVE:
            return [s if isinstance(s, float) else _LIVE for s in states]
        return states

    def _rounds(self, body: Body, inputs: list[_State]) -> list[_State]:
        """Run a body as often as it takes; `inputs` become those of any round."""
        consts = [_constant(x) for x in body.consts]
        # It ends: a state goes from a number to "other" to "live", and never back.
        while True:
            out = self.run(body.jaxpr, consts, inputs)
            changed = False
            for o, back in body.feedback:
                state = _either(inputs[back], out[o])
                changed |= state != inputs[back]
                inputs[back] = state
            if not changed:
                return out


def _either(a: _State | None, b: _State) -> _State:
    """Return what is known of a value that is one of two."""
    if a is None or a == b:
        return b
    return _LIVE if _LIVE in (a, b) else _OTHER


def _some(state: _State | None) -> _State:
    return _OTHER if state is None else state


def _read(env: Mapping[Any, _State], atom: Any) -> _State:
    return _constant(atom.val) if isinstance(atom, _jax.Literal) else env[atom]


def _constant(x: Any) -> _State:
    """Return the one number that a constant is made of, if it is of one."""
    if _jax.is_traced(x) or _jax.is_key(x):
        return _OTHER
    array = np.asarray(x)
    if not array.size or (array != array.flat[0]).any():
        return _OTHER
    return _number(array.flat[0])


def _number(x: Any) -> _State:
    """Return a number that can be compared: no nan, and of complex ones zero."""
    if np.iscomplexobj(x):
        return _OTHER if x else 0.0
    return _OTHER if np.isnan(float(x)) else float(x)


def _known(eqn: Any, operands: Sequence[Any]) -> _State:
    """Compute with values of which each is of one number."""
    name, exact = eqn.primitive.name, not carries(eqn.outvars[0].aval)
    if name in _SAME:
        return operands[0]
    # By NumPy: under `jax.jit`, `jnp` would add equations to the trace.
    with np.errstate(all="ignore"):
        if name == "convert_element_type":
            (number,), to_bool = operands, eqn.params["new_dtype"] == np.bool_
            return float(number != 0) if to_bool else _whole(number, exact)
        if name == "integer_pow":
            return _number(np.float64(operands[0]) ** eqn.params["y"])
        if name == "clamp":
            low, number, high = operands
            return _number(np.minimum(np.maximum(number, low), high))
        if name == "select_n":
            return operands[1 + int(operands[0])]
        if name in _NUMBERS and (not exact or name in _ALSO_EXACT):
            return _number(_NUMBERS[name](*operands))
    return _OTHER if any(operands) else _of_zeros(eqn)


def _of_zeros(eqn: Any) -> _State:
    """Ask JAX what one of its operations makes of zeros.

    What another package has, or has an effect, is not run, nor what is large.
    """
    avals = [atom.aval for atom in eqn.invars]
    own = _jax.is_primitive(eqn.primitive.name) and "callback" not in eqn.primitive.name
    size = sum(math.prod(v.aval.shape) for v in (*eqn.invars, *eqn.outvars))
    if not own or eqn.effects or size > _LARGE:
        return _OTHER
    try:
        # Else, under `jax.jit`, it would be traced, and have no value.
        with jax.ensure_compile_time_eval():
            out = _jax.bind(eqn, *[jnp.zeros(a.shape, a.dtype) for a in avals])
    except Exception:  # as of what has no value alone
        return _OTHER
    return functools.reduce(_either, map(_constant, out))


_LARGE = 1_000_000  # entries


def _whole(number: float, exact: bool) -> _State:
    # To an integer, another number may be rounded, or may not fit.
    return _OTHER if exact and number not in (0.0, 1.0) else number


def _holds_refs(jaxpr: Any) -> bool:
    return any(
        is_about_refs(eqn)
        or any(_holds_refs(_jax.opened(x)[0]) for x in _jax.inner_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


_SAME = frozenset(
    "broadcast_in_dim copy expand_dims reshape pcast pvary reduce_and reduce_max "
    "reduce_min reduce_or reduce_precision rev sharding_constraint slice squeeze "
    "stop_gradient transpose".split()
)
_NUMBERS = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "pow": np.power,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "sqrt": np.sqrt,
    "square": np.square,
    "exp": np.exp,
    "log": np.log,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "is_finite": np.isfinite,
}
_ALSO_EXACT = frozenset("eq ge gt is_finite le lt max min mul ne sign".split())
_BETWEEN = ("max", "min", "clamp")
