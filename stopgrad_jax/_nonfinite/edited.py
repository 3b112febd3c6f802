"""Edits of the user's source that make a nonfinite result finite, tried out first."""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import jax
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._source.labels import Labels, Path, Spot
from stopgrad_jax._source.roles import is_backward

from .entries import count_nonfinite, nonfinite, wide
from .programs import Examined
from .trial import Change, Guarded, run_changed

SMALL = 1000  # entries: of these one sample may not hold all that another holds
MOST = 4  # edits that are tried out: each compiles the program once more


@dataclasses.dataclass(frozen=True)
class Edit:
    """What to write instead of an expression, and the `where` that hides its result.

    `new` is "" where it is known what to mask and not how it is written: under `vmap`
    an array has one axis more than it has for its author, if it is mapped at all.
    """

    old: str
    new: str
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A change of the program, and the edit of the source that it stands for.

    Attributes:
      change: what is tried out.
      write: returns the edit, with the number that did it.
      spots: the calls that lead to the expression that is written anew, and that.
      key: what the edits at all places have in common where their text is one.
      numbers: those to try.
    """

    change: Change
    write: Callable[[float], Edit]
    spots: tuple[Spot, ...]
    key: Any
    numbers: Sequence[float]


def first_that_does(
    program: Examined, labels: Labels, candidates: Iterable[Candidate]
) -> Edit | None:
    """Return the first edit that makes all results finite, tried out.

    The text is changed for every call of the function that it is in, so it is tried
    with all of them changed.
    """
    groups: dict[Any, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.spots[-1], candidate.key), []).append(candidate)
    for group in itertools.islice(groups.values(), MOST):
        first = group[0]
        calls = set(
            _calls_of(program.source[0], labels, labels.nowhere, first.spots[-1])
        )
        # The text is that of every call: one that this change is not for would change,
        # too.
        if {c.spots for c in group} != calls:
            continue
        number = tried(program, [c.change for c in group], first.numbers)
        if number is not None:
            return first.write(number)
    return None


def _calls_of(
    jaxpr: Any, labels: Labels, outer: Path, spot: Spot
) -> Iterator[tuple[Spot, ...]]:
    """Yield the calls that lead to an expression, wherever the program has it."""
    for eqn in _jax.opened(jaxpr)[0].eqns:
        path = labels.path(eqn, outer)
        yield from (path.spots[: k + 1] for k, s in enumerate(path.spots) if s is spot)
        for inner in _jax.programs_in(eqn):
            yield from _calls_of(inner, labels, path, spot)


def tried(
    program: Examined, changes: Sequence[Change], numbers: Sequence[float]
) -> float | None:
    """Return the first number with which changes make all results finite.

    What was finite before must not change, and nothing must depend on the number. What
    is finite of other samples must not change either.
    """

    def run(number: Any, spread: Any, *operands: Any) -> list[Any]:
        changed = functools.partial(run_changed, changes, number, spread)
        return program.remade(changed)(*operands)

    compiled = jax.jit(run)
    before = program.every
    try:
        for number in numbers:
            one, two = (compiled(number, s, *program.operands) for s in (0.0, 0.25))
            finite = not any(count_nonfinite(one[k]) for k in program.results)
            same = finite and all(map(_agree, before, one))
            if same and all(map(_agree, one, two)):
                keep = functools.partial(compiled, number, 0.0)
                return number if _keeps(program, keep) else None
    except Exception:  # they do not fit the program
        return None
    return None


def _keeps(program: Examined, changed: Callable[..., list[Any]]) -> bool:
    """Tell whether a change leaves what is finite of other samples as it is.

    Not looked at where other numbers might never end, or be called back with.
    """
    jaxpr, _ = program.source
    if program.calls_back or program.jaxpr.effects or _is_open(jaxpr):
        return True
    for operands in _samples(program):
        pairs = zip(program.every_of(operands), changed(*operands), strict=True)
        if not all(_agree(x, y, 1e-2) for x, y in pairs):
            return False
    return True


def _is_open(jaxpr: Any) -> bool:
    """Tell a program with a loop that ends when its numbers say so."""
    return any(
        ((inner := control(eqn)) is not None and inner.dynamic)
        or any(map(_is_open, _jax.programs_in(eqn)))
        for eqn in _jax.opened(jaxpr)[0].eqns
    )


def _samples(program: Examined) -> Iterator[list[Any]]:
    """Yield other operands: some entries as they are, others anew or zero."""
    rng = np.random.default_rng(0)
    count = len(program.operands) - program.cotangents
    ranges = ((-2.0, 2.0, 0.2), (0.05, 1.5, 0.0), (0.5, 4.0, 0.4))
    size = sum(np.size(x) for x in program.operands[:count] if _is_float(x))
    for low, high, zeros in ranges * (4 if size < SMALL else 1):
        operands = list(program.operands)
        for k, x in enumerate(operands[:count]):
            if _is_float(x):
                drawn = rng.uniform(low, high, np.shape(x))
                drawn = np.where(rng.random(np.shape(x)) < zeros, 0.0, drawn)
                same = rng.random(np.shape(x)) < zeros
                new = jax.numpy.asarray(drawn, jax.numpy.result_type(x))
                operands[k] = jax.numpy.where(same, x, new)
            elif not _jax.is_key(x) and jax.numpy.result_type(x).kind == "b":
                operands[k] = jax.numpy.asarray(rng.random(np.shape(x)) < 0.6)
        yield operands


def _agree(x: Any, y: Any, rtol: float = 1e-4) -> bool:
    if _jax.is_key(x) or not np.issubdtype(wide(x).dtype, np.inexact):
        return True
    fine = ~nonfinite(x)
    a, b = wide(x)[fine], wide(y)[fine]
    size = np.abs(a).max(initial=0.0)
    return bool(np.allclose(a, b, rtol=rtol, atol=0.1 * rtol * size))


@dataclasses.dataclass(frozen=True)
class Labeled:
    """A jaxpr of a program, and the user's calls that made its equations.

    `blamed` holds the variables that depend on the operand that is to blame; `mapped`
    tells whether a `vmap` is around.
    """

    jaxpr: Any
    paths: Sequence[Path]
    blamed: frozenset[Any]
    mapped: bool

    def at(self, spots: Sequence[Spot]) -> list[int]:
        """Return the equations that were made during these calls."""
        n = len(spots)
        return [k for k, p in enumerate(self.paths) if p.spots[:n] == tuple(spots)]


def bodies(
    jaxpr: Any, labels: Labels, outer: Path, blamed: set[Any], mapped: bool = False
) -> Iterator[Labeled]:
    """Yield a jaxpr and all that are inside it and can be changed."""
    paths = [labels.path(eqn, outer) for eqn in jaxpr.eqns]
    for eqn in jaxpr.eqns:
        if blamed.intersection(variables(eqn.invars)):
            blamed.update(eqn.outvars)
    yield Labeled(jaxpr, paths, frozenset(blamed), mapped)
    for eqn, path in zip(jaxpr.eqns, paths, strict=True):
        inner = control(eqn)
        for body in inner.bodies if inner and not inner.rule else ():
            wired = zip(body.jaxpr.invars, body.operands, strict=True)
            inside = {v for v, k in wired if is_in(eqn.invars[k], blamed)}
            under = mapped or is_mapped(eqn)
            yield from bodies(body.jaxpr, labels, path, inside, under)


def is_mapped(eqn: Any) -> bool:
    """Tell an equation under `vmap`."""
    return "vmap" in _jax.transforms_of(eqn)


def is_where(eqn: Any) -> bool:
    """Tell the equation of a `where` of three operands."""
    named = _jax.jit_name(eqn) == "_where"
    return named and len(eqn.invars) == 3 and not is_backward(eqn)


def is_where_call(node: Any) -> TypeGuard[ast.Call]:
    """Tell the call of a `where` of three operands, each at its place."""
    if not isinstance(node, ast.Call) or len(node.args) != 3 or node.keywords:
        return False
    return ast.unparse(node.func).rpartition(".")[2] == "where"


def variables(atoms: Sequence[Any]) -> list[Any]:
    """Leave the literals out."""
    return [atom for atom in atoms if not isinstance(atom, _jax.Literal)]


def is_in(atom: Any, variables: Any) -> bool:
    """Tell whether an operand is one of some variables."""
    return not isinstance(atom, _jax.Literal) and atom in variables


# A value where a function has none --------------------------------------------------


def guards(
    program: Examined,
    labels: Labels,
    eqn: Any,
    operand: Any,
    is_fine: Any,
    number: float,
) -> bool:
    """Tell whether a guard of an operand keeps the gradient finite as well.

    That is not so where the operand itself has no finite slope there, as a norm.
    """
    places = [
        (body.jaxpr, k)
        for body in bodies(program.source[0], labels, labels.nowhere, set())
        for k, other in enumerate(body.jaxpr.eqns)
        if other is eqn
    ]
    if not places:
        return False
    changes = [Guarded(j, frozenset({k}), operand, is_fine) for j, k in places]
    floats = [k for k, x in enumerate(program.operands) if _is_float(x)]

    @jax.jit
    def run(values: list[Any]) -> tuple[list[Any], list[Any]]:
        def total(values: list[Any]) -> tuple[Any, list[Any]]:
            operands = list(program.operands)
            for k, x in zip(floats, values, strict=True):
                operands[k] = x
            changed = functools.partial(run_changed, changes, number, 0.0)
            out = program.remade(changed)(*operands)
            sums = [jax.numpy.sum(x.real) for x in out if _is_float(x)]
            return sum(sums), out

        grads, out = jax.grad(total, has_aux=True)(values)
        return grads, [out[k] for k in program.results]

    try:
        grads, out = run([jax.numpy.asarray(program.operands[k]) for k in floats])
    except Exception:  # it has no gradient
        return True
    # What is nonfinite for another reason too does not tell whether this one is mended.
    return not any(map(count_nonfinite, [*out, *grads]))


def _is_float(x: Any) -> bool:
    return _jax.is_differentiable(jax.typeof(x))
