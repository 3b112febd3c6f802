"""Of which function it is true that its derivative is zero, where a gradient ends.

The user's call may do more than the operation at which it ends: `jnp.modf` returns the
fraction beside the whole part, and `jax.vmap(jnp.round)` is whatever it is handed. So
the name of the call is said only of functions that are nothing else, whatever they are
called with; of any other one the operation in it is named.
"""

from __future__ import annotations

from collections.abc import Sequence

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.flow as _words
from stopgrad_jax._words import listed

from .graph import Graph, Operation

# Functions whose derivative by every argument is zero almost everywhere, and the
# operations of JAX at which it ends in them: the same name may be another function's.
_ROUND, _DIVIDE = {"round"}, {"round", "sign", "eq", "ne"}
FLAT: dict[str, set[str]] = {
    **{"round": _ROUND, "rint": _ROUND, "around": _ROUND},
    **{name: {name} for name in ("floor", "ceil", "sign")},
    "trunc": {"floor", "ceil", "lt"},
    **{"floor_divide": _DIVIDE, "floordiv": _DIVIDE},
}
_LONGEST = 50  # characters of an expression in a sentence
FLAT_KINDS = ("round", "floor", "ceil", "sign")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def callee_of(op: Operation) -> str:
    """Return what the user called: `jax.vmap(jnp.argmax)` for `jax.vmap(...)(x)`."""
    spot = op.path.innermost
    made = spot.called if spot and spot.called.endswith(")") else ""
    return made if 0 < len(made) <= _LONGEST else op.name


def zero(ops: Sequence[Operation], graph: Graph) -> tuple[str, str]:
    """Return words for the end of a gradient where no rule and no stop is, and a brief.

    Args:
      ops: the operations of one expression at which it ends.
      graph: what they are of.
    """
    spot, kinds = ops[0].path.innermost, {_jax.kind_of(op.eqn) for op in ops}
    named = spot and not spot.called.endswith(")") and FLAT.get(spot.callee)
    name = spot.callee if spot and named and kinds <= named else ""
    if spot and spot.is_floor_division:
        name = _short(spot.expression) or "//"
    if name:
        return _words.ZERO_DERIVATIVE.format(name=name), _words.ZERO_BRIEF
    around = spot and (_short(spot.called or spot.expression) or spot.callee)
    inside = f", in {around}," if around else ""
    floats = [op for op in ops if not _types(op)]
    # `jnp.floor_divide` has signs in it, which it only compares.
    valued = [op for op in floats if not _is_compared(op, graph)] or floats
    if valued:
        return _of_floats(list(dict.fromkeys(map(_name, valued))), inside)
    other = next((op for op in ops if _jax.kind_of(op.eqn) not in _COMPARISONS), None)
    if other is None:
        return _words.COMPARED_INSIDE.format(inside=inside.rstrip(",")), "only compared"
    name, types = _name(other), _types(other)
    words = _words.GIVES_INSIDE.format(name=name + inside, types=types)
    return words, f"{name} gives {types}"


def _of_floats(names: Sequence[str], inside: str) -> tuple[str, str]:
    """Words for operations with rules of their own that hand no tangent on."""
    flat = [name for name in names if name in FLAT_KINDS]
    if not flat:
        words = _words.HANDS_NONE_ON.format(name=names[0] + inside)
        return words, f"{names[0]} hands none on"
    name = listed(flat)
    words = _words.ZERO_DERIVATIVE.format(name=name + inside)
    return words, f"derivative of {name} is zero"


def _name(op: Operation) -> str:
    kind = _jax.kind_of(op.eqn)
    return "a cast" if kind == "convert_element_type" else _jax.opaque_name(op.eqn)


def _types(op: Operation) -> str:
    """Return the dtypes in what an operation returns that carry no gradient."""
    avals = [v.aval for v in op.eqn.outvars if hasattr(v.aval, "dtype")]
    exact = (a for a in avals if not _jax.is_differentiable(a))
    return ", ".join(sorted({str(aval.dtype) for aval in exact}))


def _is_compared(op: Operation, graph: Graph) -> bool:
    """Tell whether all that reads an operation's results returns bools."""
    readers = [graph.ops[r] for v in op.values for r in graph.readers[v]]
    return bool(readers) and all(_types(reader) == "bool" for reader in readers)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else ""
