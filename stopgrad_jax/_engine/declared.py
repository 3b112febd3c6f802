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
from jax.sharding import PartitionSpec

import stopgrad_jax._jax as _jax

from .labels import printed_place
from .nested import nested

Copy = Sequence[Any]  # operands
Copies = Sequence[Copy]  # the base first
# {rule: how far it is off, its size, the noise; at the worst entry: what the function
# says, what the rule says, and what the function says of either side}
Reports = dict[str, jax.Array]


class Declared:
    """Evaluates programs on copies.

    Args:
      allowed: names of functions whose custom rule differs from them on purpose: it is
        followed, and not compared.

    With one copy, the program itself is evaluated, but for gates that are not linear:
    those are open. With two (base, moved), it is a function to differentiate: factors
    and followed rules are those where it has moved to, and constants. With three (base,
    plus, minus), for differences, they are those at the base, as a rule may jump; and
    each custom rule of the user is compared with the difference of its own function.
    """

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)
        self._special: dict[tuple[int, bool], bool] = {}
        # Each rule that was met, as printed, and the names it answers to.
        self.rules: dict[str, tuple[str, ...]] = {}
        self.reverse_only: dict[str, None] = {}  # those that have no forward mode

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
            reports = _merged(reports, found)
            for env, out in zip(envs, results, strict=True):
                env.update(zip(eqn.outvars, out, strict=True))
        return [[read(env, atom) for atom in jaxpr.outvars] for env in envs], reports

    def _equation(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        if not self._is_special(eqn, len(copies) > 1):
            return [_jax.bind(eqn, *operands) for operands in copies], {}
        name = _jax.kind_of(eqn)
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
        name = _jax.kind_of(eqn)
        if name == "stop_gradient":
            return moved
        if name == "gate":
            return moved or _is_open(eqn.params["rule"])
        if name in _jax.CUSTOM:
            return moved and _is_of_user(eqn)
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
        end = count + sources
        split = [(c[:count], c[count:end], c[end:]) for c in copies]
        values, source, parameters = split[0]
        outs, ins = [list(v) for v, _, _ in split], [s for _, s, _ in split]
        if rule.name == "with_backward":

            def push(deltas: Copy, k: int, out: Copy) -> list[Any]:
                residuals = [*out, *split[k][2]]
                residuals = list(map(jax.lax.stop_gradient, residuals))
                pull = functools.partial(rule.pull, residuals=residuals)
                return _transposed(pull, values, deltas)

            names, shown = (rule.of, rule.name), f"{rule.name}({rule.of})"
            shown = _at(shown, _jax.line_of(eqn))
            self.reverse_only[shown] = None
            return self._compared(names, shown, push, outs, ins)
        if not rule.linear:
            return outs, {}
        if len(copies) == 2:
            parameters = list(map(jax.lax.stop_gradient, split[1][2]))
        for out, there in zip(outs[1:], ins[1:], strict=True):
            pulled = rule.pull(_minus(there, source), parameters)
            out[:] = map(_plus, values, pulled)
        return outs, {}

    def _custom(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        floats = [_jax.is_differentiable(a.aval) for a in eqn.invars]

        def only(operands: Copy) -> list[Any]:
            return [x for x, f in zip(operands, floats, strict=True) if f]

        def push(deltas: Copy, k: int, out: Copy) -> list[Any]:
            def function(*moved: Any) -> list[Any]:
                source = iter(moved)
                pairs = zip(copies[k], floats, strict=True)
                return _jax.bind(eqn, *(next(source) if f else x for x, f in pairs))

            here = [jax.lax.stop_gradient(jnp.asarray(x)) for x in only(copies[k])]
            if _jax.kind_of(eqn) == "custom_jvp_call":
                return jax.jvp(function, here, list(deltas))[1]
            values, pull = jax.vjp(function, *here)
            return _transposed(lambda cts: list(pull(list(cts))), values, deltas)

        outs = [_jax.bind(eqn, *operands) for operands in copies]
        ins = [only(operands) for operands in copies]
        site = _jax.rule_site(eqn)
        if _jax.is_own(site):  # a function of JAX with a rule of the user
            site = _jax.line_of(eqn)
        name = _jax.call_name(eqn) or "a custom rule"
        shown = _at(name, site)
        if _jax.kind_of(eqn) == "custom_vjp_call":
            self.reverse_only[shown] = None
        return self._compared((name,), shown, push, outs, ins)

    def _compared(
        self,
        names: tuple[str, ...],
        shown: str,
        push: Callable[[Copy, int, Copy], list[Any]],
        outs: list[list[Any]],
        ins: Copies,
    ) -> tuple[list[list[Any]], Reports]:
        """Compare a rule with its function, or follow it if it is allowed to differ.

        `push` is the rule's derivative: of the deltas, taken at copy number k.
        """
        self.rules[shown] = names
        base = outs[0]
        if self._allowed.intersection(names):
            moved = [base]
            for there in ins[1:]:
                deltas = _minus(there, ins[0])
                slopes = push(deltas, 0, base)
                if len(ins) == 2:  # its result moves as its own rule says
                    slopes = push(deltas, 1, list(map(_plus, base, slopes)))
                moved.append(list(map(_plus, base, slopes)))
            return moved, {}
        if len(outs) != 3 or not _floats(base):
            return outs, {}
        deltas = [d / 2 for d in _minus(ins[1], ins[2])]
        told = _flat(push(deltas, 0, base))
        here, plus, minus = map(_flat, outs)
        true = (plus - minus) / 2
        worst = jnp.argmax(jnp.abs(told - true))
        size = jnp.maximum(jnp.linalg.norm(told), jnp.linalg.norm(true))
        rounded = jnp.where((plus != minus) | (told != 0), here, 0)
        eps = max(float(jnp.finfo(jnp.result_type(x)).eps) for x in _floats(base))
        noise = 4 * eps * jnp.linalg.norm(rounded)
        sides = (here - minus)[worst], (plus - here)[worst]
        off = jnp.linalg.norm(told - true)
        report = [off, size, noise, true[worst], told[worst], *sides]
        return outs, {shown: _of_this_shard(jnp.stack(report))}

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
            carry = [
                _typed(out[:num_carry], c) for out, c in zip(outs, carries, strict=True)
            ]
            return carry, ([out[num_carry:] for out in outs], reports)

        params = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
        init = [[jnp.asarray(x) for x in c[num_consts:first]] for c in copies]
        xs = [list(c[first:]) for c in copies]
        carries, (ys, reports) = jax.lax.scan(step, init, xs, **params)
        return [[*c, *y] for c, y in zip(carries, ys, strict=True)], _worst(reports)

    def _while(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond, body = (
            _jax.opened(eqn.params[key]) for key in ("cond_jaxpr", "body_jaxpr")
        )
        heads = [c[n : n + m] for c in copies]

        def goes_on(carries: Any) -> Any:
            return _jax.evaluate(*cond, [*copies[0][:n], *carries[0]])[0]

        def once(carries: Any) -> tuple[Any, Reports]:
            every = [[*h, *c] for h, c in zip(heads, carries, strict=True)]
            outs, reports = self.run(*body, every)
            return list(map(_typed, outs, carries)), reports

        def step(state: Any) -> Any:
            outs, found = once(state[0])
            return outs, _merged(state[1], found)

        init = [[jnp.asarray(x) for x in c[n + m :]] for c in copies]
        none = _none(jax.eval_shape(once, init)[1])
        return jax.lax.while_loop(lambda s: goes_on(s[0]), step, (init, none))

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
                return out, _none(names) | reports

            return run

        return jax.lax.switch(copies[0][0], list(map(whole, branches)), operands)

    def _shard_map(self, eqn: Any, copies: Copies) -> tuple[list[list[Any]], Reports]:
        jaxpr, consts = _jax.opened(eqn.params["jaxpr"])
        count, axes = len(copies), eqn.params["newly_manual_axes"]

        def body(copies: Any) -> tuple[Any, Reports]:
            outs, reports = self.run(jaxpr, consts, copies)
            return outs, {name: r[None] for name, r in reports.items()}

        outs, reports = jax.shard_map(
            body,
            mesh=eqn.params["mesh"],
            in_specs=([list(eqn.params["in_specs"])] * count,),
            out_specs=(
                [list(eqn.params["out_specs"])] * count,
                PartitionSpec(tuple(axes)),
            ),
            check_vma=eqn.params["check_vma"],
            axis_names=axes,
        )(list(map(list, copies)))
        return outs, _worst(reports)


def _is_open(rule: Any) -> bool:
    """Tell a gate that is left out of the comparison: clip, norm, transform, ..."""
    forced = rule.name in ("with_backward", "prevent_gradient")
    return not rule.linear and not forced


def _transposed(pull: Callable[..., Any], out: Any, deltas: Sequence[Any]) -> list[Any]:
    """Apply the linear map whose transpose is `pull`."""
    zeros = [jnp.zeros_like(x) for x in out]
    return list(jax.vjp(pull, zeros)[1](list(deltas))[0])


def _is_of_user(eqn: Any) -> bool:
    """Tell a custom rule that is neither of JAX nor of this package."""
    files = [_jax.rule_site(eqn).rpartition(":")[0]]
    codes = (getattr(f, "__code__", None) for f in _jax.custom_rule(eqn) or ())
    files += [code.co_filename for code in codes if code is not None]
    return not all(map(_jax.is_own, files))


def _at(name: str, place: str) -> str:
    return f"{name} ({printed_place(place)})" if place else name


def _minus(there: Copy, here: Copy) -> list[Any]:
    return [a - b for a, b in zip(there, here, strict=True)]


def _plus(x: Any, delta: Any) -> Any:
    return x + delta if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x


def _flat(values: Sequence[Any]) -> jax.Array:
    parts = []
    for x in _floats(values):
        real = [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]
        parts += [_jax.raveled(part).astype(jnp.result_type(float)) for part in real]
    return jnp.concatenate(parts)


def _floats(values: Sequence[Any]) -> list[Any]:
    return [x for x in values if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]


def _typed(new: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    return [jnp.asarray(x, old.dtype) for x, old in zip(new, like, strict=True)]


def _error(report: jax.Array) -> jax.Array:
    """Tell reports apart: which one is worse."""
    off, size, noise = report[..., 0], report[..., 1], report[..., 2]
    error = (off - noise) / jnp.where(size > 0, size, 1)
    return jnp.where(jnp.isnan(error), jnp.inf, error)


def _merged(reports: Reports, found: Reports) -> Reports:
    def worse(report: jax.Array, known: jax.Array) -> jax.Array:
        return jnp.where(_error(report) > _error(known), report, known)

    both = {k: worse(r, reports[k]) if k in reports else r for k, r in found.items()}
    return reports | both


def _worst(reports: Reports) -> Reports:
    """Reduce a leading axis of steps or shards."""
    return {k: r[jnp.argmax(_error(r))] for k, r in reports.items() if len(r)}


def _none(reports: Reports) -> Reports:
    """Return the reports of a branch or a round that did not happen."""
    return {k: _of_this_shard(jnp.zeros(r.shape, r.dtype)) for k, r in reports.items()}


def _of_this_shard(report: jax.Array) -> jax.Array:
    axes = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    return _jax.vary(report, axes - _jax.unchecked_axes()) if axes else report
