"""The function whose plain derivative a program declares as its own.

A program is evaluated on several copies of its operands at once: the first is the point
at which it is differentiated, the *base*, the others are moved from it. What is stopped
stays at the base; a straight-through value moves as its source does; a linear gate
moves by its factor. The difference of two copies, over the distance, is then what JAX's
derivative ought to be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import beats

from .labels import printed_place
from .nested import nested

Copies = Sequence[Sequence[Any]]  # the base first; each a list of operands
# {function: (relative error, number by its forward, number by its rule)}
Reports = dict[str, jax.Array]


class Declared:
    """Evaluates programs on copies.

    Args:
      allowed: names of functions whose custom rule differs from them on purpose: it is
        followed, and not compared.
      called: for errors.

    With one copy, the program itself is evaluated, but for gates that are not linear:
    those are open. With three (base, plus, minus), each custom rule of the user is
    compared with the difference of its own function.
    """

    def __init__(self, allowed: Collection[str], called: str) -> None:
        self._allowed, self._called = allowed, called
        self._special: dict[tuple[int, bool], bool] = {}
        self.rules: dict[str, str] = {}  # name -> place of each rule that was met

    def run(
        self, jaxpr: Any, consts: Sequence[Any], copies: Copies
    ) -> tuple[list[list[Any]], Reports]:
        """Return the results of each copy, and what was compared on the way."""
        envs, reports = list[dict[Any, Any]](), Reports()
        for operands in copies:
            env = dict(zip(jaxpr.constvars, consts, strict=True))
            envs.append(env | dict(zip(jaxpr.invars, operands, strict=True)))

        def read(env: dict[Any, Any], atom: Any) -> Any:
            return atom.val if isinstance(atom, _jax.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [[read(env, atom) for atom in eqn.invars] for env in envs]
            results, found = self._equation(eqn, operands)
            _merge(reports, found)
            for env, out in zip(envs, results, strict=True):
                env.update(zip(eqn.outvars, out, strict=True))
        return [[read(env, atom) for atom in jaxpr.outvars] for env in envs], reports

    def _equation(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        if not self._is_special(eqn, len(copies) > 1):
            return [_jax.bind(eqn, *operands) for operands in copies], {}
        name = eqn.primitive.name
        if name == "stop_gradient":
            # `with_backward` stops what it hands to its function, which does move; and
            # JAX stops what its derivative passes by, as a factorization in `solve`.
            moves = "with_backward" in _jax.scopes_of(eqn) or _jax.is_of_jax(eqn)
            return [list(c if moves else copies[0]) for c in copies], {}
        if name == "gate":
            return self._gate(eqn, copies)
        if name in _jax.CUSTOM:
            return self._custom(eqn, copies)
        loops = {"scan": self._scan, "while": self._while, "cond": self._cond}
        loops["shard_map"] = self._shard_map
        return loops.get(name, self._inline)(eqn, copies)

    def _is_special(self, eqn: Any, moved: bool) -> bool:
        name = eqn.primitive.name
        if name == "stop_gradient":
            return moved
        if name == "gate":
            return moved or _is_open(eqn.params["rule"])
        if name in _jax.CUSTOM:
            site = _jax.rule_site(eqn).rpartition(":")[0]
            return moved and not _jax.is_own(site)
        inner = nested(eqn)
        return inner is not None and any(
            self._holds_special(body.jaxpr, moved) for body in inner.bodies
        )

    def _holds_special(self, jaxpr: Any, moved: bool) -> bool:
        key = (id(jaxpr), moved)
        if key not in self._special:
            found = any(self._is_special(eqn, moved) for eqn in jaxpr.eqns)
            self._special[key] = found
        return self._special[key]

    def _gate(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        rule, (count, sources) = eqn.params["rule"], eqn.params["split"]
        split = [
            (c[:count], c[count : count + sources], c[count + sources :])
            for c in copies
        ]
        (values, source, parameters), *moved = split
        if rule.name == "with_backward":
            residuals = [*values, *parameters]

            def push(deltas: Sequence[Any]) -> list[Any]:
                return _transposed(
                    lambda cts: rule.pull(cts, residuals), values, deltas
                )

            outs = [list(v) for v, _, _ in split]
            ins = [s for _, s, _ in split]
            return self._compared("with_backward", "", push, outs, ins)
        if not rule.linear:
            return [list(v) for v, _, _ in split], {}
        results = [list(values)]
        for _, there, factors in moved:
            deltas = [a - b for a, b in zip(there, source, strict=True)]
            # A factor that moves itself counts halfway: then the second derivative of
            # what is declared is the derivative of the factor, as JAX has it.
            sides = rule.pull(deltas, parameters), rule.pull(deltas, factors)
            pairs = zip(values, *sides, strict=True)
            results.append([v + (a + b) / 2 for v, a, b in pairs])
        return results, {}

    def _custom(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        floats = [_jax.is_differentiable(a.aval) for a in eqn.invars]

        def function(*moved: Any) -> list[Any]:
            source = iter(moved)
            pairs = zip(copies[0], floats, strict=True)
            return _jax.bind(eqn, *(next(source) if f else x for x, f in pairs))

        def only(operands: Sequence[Any]) -> list[Any]:
            return [x for x, f in zip(operands, floats, strict=True) if f]

        base = only(copies[0])
        if eqn.primitive.name == "custom_jvp_call":

            def push(deltas: Sequence[Any]) -> list[Any]:
                return jax.jvp(function, base, list(deltas))[1]
        else:

            def push(deltas: Sequence[Any]) -> list[Any]:
                out, pull = jax.vjp(function, *base)
                return _transposed(lambda cts: list(pull(list(cts))), out, deltas)

        outs = [_jax.bind(eqn, *operands) for operands in copies]
        ins = [only(operands) for operands in copies]
        name, site = _jax.call_name(eqn) or "", _jax.rule_site(eqn)
        return self._compared(name, printed_place(site), push, outs, ins)

    def _compared(
        self,
        name: str,
        place: str,
        push: Callable[[Sequence[Any]], list[Any]],
        outs: list[list[Any]],
        ins: Copies,
    ) -> tuple[list[list[Any]], Reports]:
        """Compare a rule with its function, or follow it if it is allowed to differ."""
        self.rules[name] = place
        base = ins[0]
        if name in self._allowed:
            moved = [outs[0]]
            for there in ins[1:]:
                deltas = [a - b for a, b in zip(there, base, strict=True)]
                pairs = zip(outs[0], push(deltas), strict=True)
                moved.append([_plus(x, d) for x, d in pairs])
            return moved, {}
        if len(outs) != 3:
            return outs, {}
        deltas = [(a - b) / 2 for a, b in zip(ins[1], ins[2], strict=True)]
        told = _flat(push(deltas))
        true = (_flat(outs[1]) - _flat(outs[2])) / 2
        worst = jnp.argmax(jnp.abs(told - true))
        size = jnp.maximum(jnp.linalg.norm(told), jnp.linalg.norm(true))
        error = jnp.linalg.norm(told - true) / jnp.where(size > 0, size, 1)
        return outs, {name: jnp.stack([error, true[worst], told[worst]])}

    def _inline(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        inner = nested(eqn)
        assert inner is not None
        (body,) = inner.bodies
        return self.run(body.jaxpr, body.consts, copies)

    def _scan(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        num_consts, num_carry = _jax.scan_arity(eqn)
        jaxpr, consts = _jax.opened(eqn.params["jaxpr"])
        first = num_consts + num_carry
        heads = [c[:num_consts] for c in copies]

        def step(carries: Any, xs: Any) -> Any:
            parts = zip(heads, carries, xs, strict=True)
            every = [[*h, *c, *x] for h, c, x in parts]
            outs, reports = self.run(jaxpr, consts, every)
            carry = [_typed(out[:num_carry], c) for out, c in zip(outs, carries)]  # noqa: B905
            return carry, ([out[num_carry:] for out in outs], reports)

        params = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
        init = [[jnp.asarray(x) for x in c[num_consts:first]] for c in copies]
        xs = [list(c[first:]) for c in copies]
        carries, (ys, reports) = jax.lax.scan(step, init, xs, **params)
        worst = {name: r[jnp.argmax(r[:, 0])] for name, r in reports.items()}
        return [[*c, *y] for c, y in zip(carries, ys, strict=True)], worst

    def _while(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond, body = (
            _jax.opened(eqn.params[key]) for key in ("cond_jaxpr", "body_jaxpr")
        )
        heads = [c[n : n + m] for c in copies]

        def goes_on(carries: Any) -> Any:
            return _jax.evaluate(*cond, [*copies[0][:n], *carries[0]])[0]

        def step(carries: Any) -> Any:
            every = [[*h, *c] for h, c in zip(heads, carries, strict=True)]
            return self.run(*body, every)[0]

        init = [[jnp.asarray(x) for x in c[n + m :]] for c in copies]
        return jax.lax.while_loop(goes_on, step, init), {}

    def _cond(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        inner = nested(eqn)
        branches = [
            functools.partial(self.run, body.jaxpr, body.consts)
            for body in (inner.bodies if inner else ())
        ]
        operands = [[jnp.asarray(x) for x in c[1:]] for c in copies]
        shapes = [jax.eval_shape(branch, operands)[1] for branch in branches]
        names = {name: s for found in shapes for name, s in found.items()}

        def whole(branch: Any) -> Any:
            def run(every: Any) -> Any:
                out, reports = branch(every)
                none = {k: jnp.zeros(s.shape, s.dtype) for k, s in names.items()}
                return out, none | reports

            return run

        return jax.lax.switch(copies[0][0], list(map(whole, branches)), operands)

    def _shard_map(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        raise ValueError(
            beats(
                self._called,
                "stops, gates and custom rules outside of shard_map",
                f"one in the shard_map at {printed_place(_jax.line_of(eqn))}",
                "the check of the function on one device, without shard_map",
            )
        )


def _is_open(rule: Any) -> bool:
    """Tell a gate that is left out of the comparison: clip, norm, transform, ..."""
    forced = rule.name in ("with_backward", "prevent_gradient")
    return not rule.linear and not forced


def _transposed(pull: Callable[..., Any], out: Any, deltas: Sequence[Any]) -> list[Any]:
    """Apply the linear map whose transpose is `pull`."""
    zeros = [jnp.zeros_like(x) for x in out]
    return list(jax.vjp(pull, zeros)[1](list(deltas))[0])


def _plus(x: Any, delta: Any) -> Any:
    return x + delta if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x


def _flat(values: Sequence[Any]) -> jax.Array:
    floats = [x for x in values if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    parts = [jnp.ravel(x).astype(jnp.promote_types(x.dtype, "float32")) for x in floats]
    return jnp.concatenate(parts) if parts else jnp.zeros(1)


def _typed(new: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    return [jnp.asarray(x, old.dtype) for x, old in zip(new, like, strict=True)]


def _merge(reports: Reports, found: Reports) -> None:
    for name, report in found.items():
        known = reports.get(name, report)
        reports[name] = jnp.where(report[0] > known[0], report, known)
