"""What JAX's own tables tell of a primitive, and of a function that it has jitted.

`tests/test_jax.py` checks it on the oldest and the newest JAX we support.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching

# The primitives that jax.extend shows.
_PRIMITIVES = frozenset(
    value.name
    for value in vars(core.primitives).values()
    if isinstance(value, core.Primitive)
)


# Functions of JAX with the name of a primitive that they are not: `jnp.max`.
NOT_PRIMITIVES = frozenset({"max", "min", "logistic", "cond"})


def is_primitive(name: str) -> bool:
    """Tell the name of a primitive of JAX's own."""
    return name in _PRIMITIVES


def _batcher(primitive: Any) -> Any:
    rule = batching.fancy_primitive_batchers.get(primitive)
    return rule.func if isinstance(rule, functools.partial) else rule


# The rules of `batching.defvectorized` and `defbroadcasting`: a mapped axis is one more
# axis of all operands, wherever it is put. What holds of every axis is done entry by
# entry; so it is with a primitive of another package that is given one of them.
_RULES = (_batcher(jax.lax.neg_p), _batcher(jax.lax.add_p))
# These have rules of their own, since some of their operands may have fewer axes, or
# their parameters an axis for each.
_NAMES = frozenset(
    "add_any clamp convert_element_type name pvary reshard select_n "
    "sharding_constraint stop_gradient".split()
)


def is_entrywise(primitive: Any) -> bool:
    """Tell a primitive of whose result each entry is made of those at its own place.

    Scalars among its operands are of every entry. False where it is not known.
    """
    rule = _batcher(primitive)
    return primitive.name in _NAMES or (rule is not None and rule in _RULES)


def static_arguments(
    fun: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[bool], dict[str, bool]]:
    """Tell which arguments a jitted function declares static.

    It is not public; without it, none. JAX fills in `static_argnames` by
    `static_argnums`, and the other way round, where the function can be asked.
    """
    bound = 0
    while isinstance(fun, functools.partial):
        fun, bound = fun.func, bound + len(fun.args)
    info = getattr(fun, "_jit_info", None)
    numbers = getattr(info, "static_argnums", ())
    # JAX 0.10 keeps those below 0, and so does the newest where there is `*args`.
    numbers = {n + len(args) if n < 0 else n - bound for n in numbers}
    names = getattr(info, "static_argnames", ())
    return [k in numbers for k in range(len(args))], {k: k in names for k in kwargs}
