"""Functions that programs were traced from, and what JAX notes of them."""

from __future__ import annotations

import inspect
from typing import Any

import jax

import stopgrad_jax._jax as _jax
from stopgrad_jax._source.bindings import Function
from stopgrad_jax._source.handed import Spread
from stopgrad_jax._source.labels import code_of
from stopgrad_jax._source.text import source_of

from .trace import Place, Traced


def origin_of_traced(traced: Traced) -> _jax.Origin | None:
    """Return what JAX would note of the function that the user handed in."""
    code, inputs = code_of(traced.fun), dict[str, int]()
    for name, tree in traced.arguments.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, Place):
                inputs[name + jax.tree_util.keystr(path)] = leaf.index
    if code is None:
        return _jax.Origin("", "", 0, inputs)
    return _jax.Origin(code.co_name, code.co_filename, code.co_firstlineno, inputs)


def spread_of(traced: Traced) -> Spread:
    """Return the names of the `*args` and `**kwargs` of the traced function."""
    try:
        every = inspect.signature(traced.fun).parameters.values()
    except (TypeError, ValueError):
        return Spread("", "", 0)
    named = {p.kind: p.name for p in every}
    args, kwargs = named.get(_VARIADIC, ""), named.get(_KEYWORDS, "")
    return Spread(args, kwargs, len(traced.arguments.get(args, ())))


_VARIADIC = inspect.Parameter.VAR_POSITIONAL
_KEYWORDS = inspect.Parameter.VAR_KEYWORD


def _functions(origin: _jax.Origin) -> list[Function]:
    """Return those of the source that it may be: lambdas of one line are alike."""
    every = source_of(origin.file).functions()
    names = {spelled.split("[")[0].split(".")[0] for spelled in origin.inputs}
    return [
        f
        for f in every
        if (f.path[-1], f.first_line) == (origin.name, origin.line)
        and names <= f.parameters.keys()
    ]


def path_of(origin: _jax.Origin) -> tuple[str, ...]:
    """Return the names around the function that a jaxpr was traced from."""
    found = {f.path for f in _functions(origin)}
    return found.pop() if len(found) == 1 else (origin.name,)


def made_in(jaxpr: Any, origin: _jax.Origin) -> frozenset[int]:
    """Tell what a function made from what JAX made around it, as far as it is told.

    So does JAX count the rounds of a `fori_loop`.
    """
    around = set[int]()
    for k, eqn in enumerate(jaxpr.eqns):
        codes = [code for code, _ in _jax.stack_of(eqn)]
        places = [(c.co_name, c.co_filename, c.co_firstlineno) for c in codes]
        if codes and origin[:3] not in places:
            around.add(k)
    every = frozenset(range(len(jaxpr.eqns)))
    return every - around or every


def def_line(origin: _jax.Origin) -> int:
    """Return the line of its `def`, which decorators stand before."""
    return next((f.line for f in _functions(origin)), origin.line)
