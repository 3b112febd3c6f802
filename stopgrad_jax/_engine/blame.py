"""Trace nonfinite results of a program back to the operation that they were born in.

An operand is to blame for a nonfinite result if the result becomes finite once that
operand's nan and inf are replaced. An operation whose result stays nonfinite although
all its operands are finite is a *birth*. So a nan that is masked later, or overwritten,
is never reached, and never reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax

from .levels import Level, Op, Runner
from .nested import nested


@dataclasses.dataclass(frozen=True)
class Birth:
    """Where a nonfinite value was born, or where a given one first did harm.

    Attributes:
      op: the operation.
      operands, result: its operands, and its first nonfinite result.
      steps: the rounds of the loops that it lies in, outermost first.
      follower: the operation that took the value on, if any.
      mask: the operation that selected the value away in the forward pass, so that
        its derivative was multiplied by zero.
    """

    op: Op
    operands: tuple[Any, ...]
    result: Any
    steps: tuple[int, ...] = ()
    follower: Op | None = None
    mask: Op | None = None


def find(runner: Runner, level: Level) -> Birth | None:
    """Find the first birth that reaches a result of the level.

    None if there is none: all results are finite, or what was nonfinite was given.
    """
    births, harm, via = _births(level, _targets(level))
    if not births and not harm:
        return None
    first = min(births or harm)
    op, birth = level.ops[first], None
    if first in births:
        birth = _inside(runner, level, op)
    if birth is None:
        result = next(level.values[k] for k in op.writes if count(level.values[k]))
        steps = (op.step,) if op.step is not None else ()
        operands = tuple(map(_known, level.read(op)))
        birth = Birth(op, operands, _known(result), steps)
    elif op.step is not None:
        birth = dataclasses.replace(birth, steps=(op.step, *birth.steps))
    chain = [op]
    while id(chain[-1]) in via and len(chain) < len(level.ops):
        chain.append(via[id(chain[-1])])
    follower = birth.follower or (chain[1] if chain[1:] else None)
    mask = birth.mask
    for turning in chain if mask is None else ():
        mask = mask or _mask(runner, level, turning)
    return dataclasses.replace(birth, follower=follower, mask=mask)


def _targets(level: Level) -> list[int]:
    return [k for ks in level.outputs for k in ks if count(level.values[k])]


def _births(
    level: Level, targets: Iterable[int]
) -> tuple[set[int], set[int], dict[int, Op]]:
    """Walk back from nonfinite values.

    Returns the numbers of the operations that are births, of those that make nan of a
    given inf, and for each operation the one by which it was come to.
    """
    births, harm, via, seen = set[int](), set[int](), dict[int, Op](), set[int]()
    waiting: list[tuple[int, Op | None]] = [(k, None) for k in targets]
    while waiting:
        value, after = waiting.pop()
        if value in seen or value not in level.maker:
            continue
        seen.add(value)
        number = level.maker[value]
        op = level.ops[number]
        if after is not None:
            via.setdefault(id(op), after)
        guilty, born = _guilty(level, op, op.writes.index(value))
        if born:
            births.add(number)
        elif has_nan(level.values[value]):
            if not any(has_nan(level.values[k]) for k in guilty):
                harm.add(number)
        waiting += [(k, op) for k in guilty]
    return births, harm, via


def _guilty(level: Level, op: Op, position: int) -> tuple[list[int], bool]:
    """Return the operands that make a result nonfinite, and whether it is born here."""
    bad = [k for k in dict.fromkeys(op.reads) if count(level.values[k])]
    if not bad:
        return [], True

    def left(kept: Sequence[int]) -> int:
        clean = [k for k in bad if k not in kept]
        return count(op.run(*_cleaned(level, op, clean))[position])

    born = left(())
    if born and born >= count(level.values[op.writes[position]]):
        return [], True
    if not bad[1:]:
        return bad, bool(born)
    alone = [k for k in bad if left([k]) > born]
    return alone or bad, bool(born)


def _cleaned(level: Level, op: Op, clean: Sequence[int]) -> list[Any]:
    return [
        _finite(level.values[k]) if k in clean else level.values[k] for k in op.reads
    ]


def _inside(runner: Runner, level: Level, op: Op) -> Birth | None:
    """Look into an operation whose result is nonfinite for finite operands."""
    bad = [k for k in op.reads if count(level.values[k])]
    operands = _cleaned(level, op, bad)
    births = list[Birth | None]()
    runner.enter(op, operands, lambda inner: births.append(find(runner, inner)))
    return births[0] if births else None


def _mask(runner: Runner, level: Level, op: Op) -> Op | None:
    """Find the selection that made the zero which an operation turns into nan."""
    results = any(has_nan(level.values[k]) for k in op.writes)
    if not results or any(has_nan(level.values[k]) for k in op.reads):
        return None
    found = list[Op | None]()

    def look(inner: Level) -> None:
        births, harm, _ = _births(inner, _targets(inner))
        for number in sorted(births | harm):
            found.append(_mask(runner, inner, inner.ops[number]))

    runner.enter(op, level.read(op), look)
    inside = next(filter(None, found), None)
    return inside or _selection(level, op)


def _selection(level: Level, op: Op) -> Op | None:
    waiting = [k for k in op.reads if _has_zero(level.values[k])]
    seen = set(waiting)
    while waiting:
        value = waiting.pop(0)
        if value not in level.maker:
            continue
        maker = level.ops[level.maker[value]]
        if _selects(maker.eqn):
            return maker
        new = [k for k in maker.reads if _has_zero(level.values[k]) and k not in seen]
        seen.update(new)
        waiting += new
    return None


def _selects(eqn: Any) -> bool:
    inner = nested(eqn)
    if inner is None or eqn.primitive.name != "jit":
        return eqn.primitive.name == "select_n"
    return any(e.primitive.name == "select_n" for e in inner.bodies[0].jaxpr.eqns)


# Values ---------------------------------------------------------------------------


def _is_inexact(x: Any) -> bool:
    dtype = getattr(x, "dtype", None) or np.result_type(type(x))
    return jnp.issubdtype(dtype, jnp.inexact)


def _known(x: Any) -> Any:
    dtype = getattr(x, "dtype", np.dtype(bool))
    return x if jnp.issubdtype(dtype, jax.dtypes.extended) else _jax.known(x)


def count(x: Any) -> int:
    """Count the nan and inf of a value."""
    return int((~np.isfinite(_float(x))).sum()) if _is_inexact(x) else 0


def has_nan(x: Any) -> bool:
    """Tell whether there is nan in a value."""
    return _is_inexact(x) and bool(np.isnan(_float(x)).any())


def _has_zero(x: Any) -> bool:
    return _is_inexact(x) and bool((_float(x) == 0).any())


def _float(x: Any) -> np.ndarray:
    """Return a value in a dtype that NumPy itself knows."""
    x = _jax.known(x)
    return x if x.dtype.kind in "fc" else x.astype(np.float32)


def _finite(x: Any) -> Any:
    """Replace nan and inf by numbers that are neither zero, one, nor alike."""
    shape = jnp.shape(x)
    places = jnp.arange(np.prod(shape, dtype=int)).reshape(shape)
    filler = (0.5 + 0.25 * jnp.sin(1.0 + places)).astype(jnp.result_type(x))
    return jnp.where(jnp.isfinite(x), x, _jax.sharded_like(filler, jnp.asarray(x)))
