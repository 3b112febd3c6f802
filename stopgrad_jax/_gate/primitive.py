"""The gate: one value's bits, another value's derivative, by a given rule.

`gate_p` takes (values, sources, parameters) and returns the values, bit for bit. Its
derivative is that of the *sources*, which the rule turns into cotangents of theirs:

    gate of x         values x      sources x        e.g. scale the cotangent
    replace_value     values v      sources x        hand the cotangent on
    straight_through  values f(x)   sources b(x)     the same
    with_backward     values f(x)   sources x        backward(ct, f(x), x)

What becomes of tangents is a second primitive, `pullback_p`, linear in them, whose
transpose is the rule: a linear rule acts on tangents too, any other passes them on
unchanged. They compile to nothing but the rule. Under `vmap` the *rule* is mapped: what
is one value per example has one cotangent per example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import beats, wrong

from .rule import Arrays, Mapped, Rule


def varying_together(*groups: Arrays) -> frozenset[str]:
    """Mesh axes that any of the values varies over."""
    axes = (_jax.varying(jax.typeof(x)) for group in groups for x in group)
    return frozenset().union(*axes)


def gate(values: Arrays, sources: Arrays, parameters: Arrays, rule: Rule) -> list[Any]:
    """Return the values; their derivative is the rule's, of the sources."""
    if not rule.reads_values:  # a function's result has its own type, and keeps it
        # One varying set for all, or the transpose would miss a sum over devices.
        axes = varying_together(values, sources, parameters)
        values = [_jax.vary(x, axes) for x in values]
        sources = [_jax.vary(x, axes) for x in sources]
    return gate_p.bind(
        *values, *sources, *parameters, rule=rule, split=(len(values), len(sources))
    )


gate_p = _jax.Primitive("gate")  # values, sources, parameters -> values
pullback_p = _jax.Primitive("pullback")  # tangents, residuals -> tangents
gate_p.multiple_results = pullback_p.multiple_results = True


def _parts(operands: Arrays, split: tuple[int, int]) -> tuple[Arrays, Arrays, Arrays]:
    values, sources = split
    end = values + sources
    return operands[:values], operands[values:end], operands[end:]


def _zeros(values: Arrays) -> list[Any]:
    return [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in values]


def _pull(rule: Rule, cts: Arrays, residuals: Arrays) -> Arrays:
    def array(x: Any) -> Any:  # a literal of a program is a bare number
        known = isinstance(x, jax.Array)
        return x if known else jnp.asarray(x, getattr(x, "dtype", None))

    def type_of(x: Any) -> Any:  # a value that no gradient came to has a type alone
        return x.aval if _is_zero(x) else jax.typeof(x)

    with _jax.at_width_of(*map(type_of, (*cts, *residuals))):
        cts = [array(ad.instantiate_zeros(ct)) for ct in cts]
        residuals = [array(x) for x in residuals]
        if not rule.typed:
            axes = varying_together(cts)
            residuals = [_jax.vary(x, axes) for x in residuals]
        return rule.pull(cts, residuals)


def _is_zero(x: Any) -> bool:
    return type(x) is ad.Zero


# Differentiation ------------------------------------------------------------------


def _gate_jvp(primals: Arrays, tangents: Arrays, *, rule: Rule, split: Any) -> Any:
    out = gate_p.bind(*primals, rule=rule, split=split)
    value_dots, dots, _ = _parts(tangents, split)
    parameters = _parts(primals, split)[2]
    # The values have their derivative from the sources alone: what else moves them was
    # closed over, and `pull` has no cotangent for it.
    if rule.only_sources and not all(map(_is_zero, value_dots)):
        raise ValueError(rule.only_sources)
    if all(map(_is_zero, dots)):
        return out, _zeros(out)
    dots = [ad.instantiate_zeros(dot) for dot in dots]
    # `out`, and not the values that went in: those of `with_backward` are computed from
    # stopped arguments, so a second derivative would miss that they move.
    residuals = (*out, *parameters) if rule.reads_values else parameters
    # The tangents do not tell them: a function's results are neither as many as its
    # arguments nor of their shapes.
    types = tuple(jax.typeof(x).to_tangent_aval() for x in out)
    operands = (*dots, *residuals)
    return out, pullback_p.bind(*operands, rule=rule, count=len(dots), types=types)


def _pullback_jvp(primals: Arrays, tangents: Arrays, **params: Any) -> Any:
    out = pullback_p.bind(*primals, **params)
    dots, residual_dots = tangents[: params["count"]], tangents[params["count"] :]
    rule, residuals = params["rule"], primals[params["count"] :]
    moved = not all(map(_is_zero, residual_dots))
    if rule.forward and moved:
        raise TypeError(rule.forward)
    result: list[Any] = [ad.Zero(aval) for aval in params["types"]]
    if not all(map(_is_zero, dots)):
        dots = [ad.instantiate_zeros(dot) for dot in dots]
        result = pullback_p.bind(*dots, *residuals, **params)
    # The product rule: above is the term of the tangents, here that of the parameters.
    if rule.linear and moved:  # a factor that is itself differentiated
        result = list(
            map(ad.add_tangents, result, _along(rule, primals, residual_dots))
        )
    return out, result


def _along(rule: Rule, primals: Arrays, residual_dots: Arrays) -> Arrays:
    """Differentiate the rule by its parameters."""
    count = len(primals) - len(residual_dots)
    moved = [k for k, dot in enumerate(residual_dots) if not _is_zero(dot)]

    def of_parameters(*values: Any) -> Arrays:
        residuals = list(primals[count:])
        for k, value in zip(moved, values, strict=True):
            residuals[k] = value
        return _pull(rule, primals[:count], residuals)

    values = [primals[count + k] for k in moved]
    return jax.jvp(of_parameters, values, [residual_dots[k] for k in moved])[1]


def _gate_transpose(cts: Arrays, *operands: Any, rule: Rule, split: Any) -> Any:
    """Transpose the gate itself, for `jax.linear_transpose`."""
    values, sources, parameters = _parts(operands, split)
    if rule.reads_values:
        raise wrong(
            NotImplementedError,
            rule.name,
            "a linear function, for jax.linear_transpose",
            "a function with a backward pass of its own",
            "jax.vjp(fun, x)[1]",
        )
    pulled = _pull(rule, cts, parameters)
    wanted = map(ad.is_undefined_primal, sources)
    pulled = [ct if w else None for ct, w in zip(pulled, wanted, strict=True)]
    return [None] * len(values) + pulled + [None] * len(parameters)


def _pullback_transpose(
    cts: Arrays, *operands: Any, rule: Rule, count: int, types: Any
) -> Any:
    dots, residuals = operands[:count], operands[count:]
    # Where no gradient comes there is none to transform, though a function of the
    # user's may make something of zeros.
    if all(map(_is_zero, cts)):
        return [None] * len(operands)
    pulled = _pull(rule, cts, residuals)
    # In a `shard_map` a cotangent must differ over the axes that its value does, and
    # over no others: where the value is the same on all devices it is a sum.
    pulled = [
        _jax.vary_exactly(ct, _jax.varying(dot.aval))
        if ad.is_undefined_primal(dot)
        else None
        for ct, dot in zip(pulled, dots, strict=True)
    ]
    return pulled + [None] * len(residuals)


# Mapping --------------------------------------------------------------------------


def _mapped(rule: Rule, axis: Any, residual_dims: Sequence[int | None]) -> Rule:
    pull = Mapped(rule.pull, tuple(residual_dims), axis.name, axis.size, axis.spmd_name)
    # The axis has its name inside `pull` from here on, and is no longer asked for.
    axes = tuple(name for name in rule.axes if name != axis.name)
    return dataclasses.replace(rule, pull=pull, axes=axes)


def _in_front(axis: Any, args: Arrays, dims: Sequence[int | None]) -> list[Any]:
    pairs = zip(args, dims, strict=True)
    return [batching.bdim_at_front(x, d, axis.size) for x, d in pairs]


def _gate_batch(axis: Any, args: Arrays, dims: Any, *, rule: Rule, split: Any) -> Any:
    values = split[0]
    # `psum` counts what is not mapped once for each example: the norm would be too
    # large by the root of their number, and nothing would tell.
    if axis.name in rule.axes and any(d is None for d in dims[:values]):
        raise ValueError(_not_mapped(rule, axis.name))
    # Else all that is computed from it would be computed for each example, too.
    if all(d is None for d in dims):
        return gate_p.bind(*args, rule=rule, split=split), [None] * values
    # Values and sources are mapped even where only a parameter is: one value with a
    # factor for each example has a cotangent for each.
    end = sum(split)
    front = _in_front(axis, args[:end], dims[:end])
    residual_dims = (0,) * values * rule.reads_values + tuple(dims[end:])
    mapped = _mapped(rule, axis, residual_dims)
    return gate_p.bind(*front, *args[end:], rule=mapped, split=split), [0] * values


def _pullback_batch(
    axis: Any, args: Arrays, dims: Any, *, rule: Rule, count: int, types: Any
) -> Any:
    if all(d is None for d in dims):
        out = pullback_p.bind(*args, rule=rule, count=count, types=types)
        return out, [None] * len(out)
    dots = _in_front(axis, args[:count], dims[:count])
    mapped = _mapped(rule, axis, dims[count:])
    types = tuple(_jax.stacked(axis.size, aval) for aval in types)
    operands = (*dots, *args[count:])
    out = pullback_p.bind(*operands, rule=mapped, count=count, types=types)
    return out, [0] * len(out)


def _not_mapped(rule: Rule, name: Any) -> str:
    return beats(
        f"{rule.name}(..., axis_name={name!r})",
        f"the value must be mapped over {name!r}, to be summed over it",
        f"a value that is the same for all of {name!r}: it would count once for each",
        f"the call without axis_name, or sg.per_example(x, {name!r}) first",
    )


# Evaluation -----------------------------------------------------------------------


def _gate_values(*operands: Any, rule: Rule, split: Any) -> list[Any]:
    return list(operands[: split[0]])


def _pullback_values(*operands: Any, rule: Rule, count: int, types: Any) -> list[Any]:
    if rule.forward:
        raise TypeError(rule.forward)
    if rule.linear:
        return list(_pull(rule, operands[:count], operands[count:]))
    return list(operands[:count])


# Compiled as they are evaluated: the gate to its values, a rule to what it computes.
for _p, _values, _jvp, _transpose, _batch in (
    (gate_p, _gate_values, _gate_jvp, _gate_transpose, _gate_batch),
    (
        pullback_p,
        _pullback_values,
        _pullback_jvp,
        _pullback_transpose,
        _pullback_batch,
    ),
):
    _p.def_impl(_values)
    ad.primitive_jvps[_p] = _jvp
    ad.primitive_transposes[_p] = _transpose
    batching.fancy_primitive_batchers[_p] = _batch
    mlir.register_lowering(_p, mlir.lower_fun(_values, multiple_results=True))
gate_p.def_abstract_eval(_gate_values)
pullback_p.def_abstract_eval(lambda *_, types, **__: list(types))
