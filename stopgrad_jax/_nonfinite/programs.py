"""The two programs in which nan and inf are looked for: a function, its gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import RETURN, nodes
from stopgrad_jax._errors import quoted, wrong
from stopgrad_jax._jax.errors import is_of_a_closure
from stopgrad_jax._program.arguments import cotangents, default_ys
from stopgrad_jax._program.lookup import LookedUp, look_up
from stopgrad_jax._program.refuse import refuse_loops, refuse_rules
from stopgrad_jax._program.rewrite import Actions, Rewriter
from stopgrad_jax._program.trace import Place, Traced
from stopgrad_jax._program.wanted import TO_DIFFERENTIATE, Wanted
from stopgrad_jax._reach.closures import holds_closure, not_compiled
from stopgrad_jax._reach.differentiate import inside_a_closure

from .entries import (
    FILLS,
    Index,
    count_nonfinite,
    critical,
    has_nan,
    index_of,
    only,
    ordinary,
    places,
)

# Runs a jaxpr: (jaxpr, its constants, its operands) -> its results.
Evaluate = Callable[[Any, Sequence[Any], Sequence[Any]], list[Any]]


@dataclasses.dataclass(frozen=True)
class Culprit:
    """An entry of an operand that makes a program's results nonfinite.

    Attributes:
      operand: which one, and `index` the entry; `value` is nan or inf.
      others: how many other entries of it are nonfinite.
      operands: the operands with ordinary numbers for what does not matter.
    """

    operand: int
    index: Index
    value: Any
    others: int
    operands: Sequence[Any]


MOST_HELD = 2**28  # bytes: 256 MiB


@dataclasses.dataclass(frozen=True)
class Examined:
    """A program, its operands, and what these and its results are called.

    `direction` is "forward" or "backward". The last `cotangents` operands are what the
    derivative starts from. Results without a name are not looked at.

    `source` is the function's own program; `remade` makes this one of it anew, with
    another way to run that.
    """

    direction: str
    jaxpr: Any
    consts: Sequence[Any]
    operands: Sequence[Any]
    names: dict[int, str]
    results: dict[int, str]
    source: tuple[Any, Sequence[Any]]
    remade: Callable[[Evaluate], Callable[..., list[Any]]]
    cotangents: int = 0

    @functools.cached_property
    def _run(self) -> Callable[..., list[Any]]:
        def run(*operands: Any) -> list[Any]:
            out = _jax.evaluate(self.jaxpr, self.consts, operands)
            return [out[k] for k in self.results]

        return jax.jit(run)

    @property
    def calls_back(self) -> bool:
        """Whether a callback may give another result when it is run once more."""
        return _jax.calls_back(self.jaxpr)

    def bad(self, operands: Sequence[Any]) -> list[int]:
        """Run it, and return which of its results are nonfinite."""
        out = self._run(*operands)
        return [k for k, x in zip(self.results, out, strict=True) if count_nonfinite(x)]

    @functools.cached_property
    def wrong(self) -> list[int]:
        """Which of the results are nonfinite."""
        return self.bad(self.operands)

    @functools.cached_property
    def gives_nan(self) -> bool:
        """Whether any of the results holds a nan, and not infinities alone."""
        return any(map(has_nan, self._run(*self.operands)))

    @functools.cached_property
    def wrong_by_steps(self) -> list[int]:
        """Which are nonfinite where the operations run one by one, as without `jit`.

        Not looked at where that would have an effect once more, or hold what a compiled
        program need not.
        """
        if self.jaxpr.effects or self._held > MOST_HELD:
            return []
        out = _jax.evaluate(self.jaxpr, self.consts, self.operands)
        return [k for k in self.results if count_nonfinite(out[k])]

    @property
    def _held(self) -> int:
        """Bytes of all values that the operations make."""
        avals = (v.aval for eqn in self.jaxpr.eqns for v in eqn.outvars)
        sizes = (a for a in avals if hasattr(a, "size") and not _jax.is_key(a))
        return sum(a.size * a.dtype.itemsize for a in sizes)

    @functools.cached_property
    def every(self) -> list[Any]:
        """All results, also those without a name."""
        return self.every_of(self.operands)

    def every_of(self, operands: Sequence[Any]) -> list[Any]:
        """Return all results for other operands."""
        return self._run_all(*operands)

    @functools.cached_property
    def _run_all(self) -> Callable[..., list[Any]]:
        return jax.jit(self.remade(_jax.evaluate))

    def given(self) -> Culprit | None:
        """Return which operand is to blame, if the results are finite without.

        Of several nonfinite entries it is the first without which all is well.
        """
        numbers = {
            k: places(x) for k, x in enumerate(self.operands) if count_nonfinite(x)
        }
        if not numbers:
            return None
        total = sum(map(len, numbers.values()))

        def kept(first: int, fill: str) -> list[Any]:
            operands = list(self.operands)
            for k, mine in numbers.items():
                # `first` counts through all operands: what is left of it is for the
                # next.
                mask = only(np.shape(operands[k]), mine[: max(first, 0)])
                operands[k] = ordinary(operands[k], mask, fill)
                first -= len(mine)
            return operands

        fill = next((f for f in FILLS if not self.bad(kept(0, f))), None)
        if fill is None:
            return None
        last = critical(lambda n: bool(self.bad(kept(n, fill))), total)
        operands = kept(last + 1, fill)
        for k, mine in numbers.items():
            if last < len(mine):
                x = self.operands[k]
                index = index_of(mine[last], np.shape(x))
                value = np.asarray(x)[index]
                return Culprit(k, index, value, len(mine) - 1, operands)
            last -= len(mine)
        return None


def forward(traced: Traced) -> Examined:
    """Return the program of the function itself."""
    names, results = traced.paths(), dict(_outputs(traced))
    source = traced.jaxpr, traced.consts

    def remade(evaluate: Evaluate) -> Callable[..., list[Any]]:
        return lambda *operands: evaluate(*source, operands)

    return Examined("forward", *source, traced.leaves, names, results, source, remade)


def backward(
    traced: Traced, xs: list[Any] | None, ys: Any, called: str
) -> Examined | None:
    """Return the program of the gradients; None if there is nothing to differentiate.

    The value is among its results, too: so it is known what leads to it.
    """
    asked: list[Any] = list(ys or ())
    if not all(isinstance(x, int | str) for x in xs or ()):
        raise _no_arguments(look_up(traced, (), called), xs, called)
    wanted = dict.fromkeys(asked, TO_DIFFERENTIATE)
    wanted |= dict.fromkeys(xs or list[Any](), Wanted(("argument",), moving=True))
    looked_up = look_up(traced, [*(xs or ()), *asked], called, wanted)
    outputs = list(_outputs(traced))
    if ys is None and len(outputs) != 1:
        if xs is not None:
            default_ys(traced, False, called)  # raises: it must say which
        return None  # the gradients in it are its own
    y_tree = traced.output if ys is None else looked_up.tree(ys)
    ends = [v for v in jax.tree.leaves(y_tree) if isinstance(v, Place)]
    types = [looked_up.types[y].dtype for y in ends]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in types):
        if ys is None and xs is None:
            return None
    pairs = cotangents(looked_up, y_tree, None, called)
    by = _by(looked_up, traced, xs, called)
    if not by or not pairs:
        return None
    source, count = (traced.jaxpr, traced.consts), len(traced.leaves)
    closes_over = holds_closure(traced.jaxpr)
    inside = [y for y, _ in pairs if y.kind == "point"]
    if inside:
        refuse_loops(looked_up, asked, called)
        refuse_rules(looked_up, asked, called)
        if closes_over:
            raise TypeError(inside_a_closure(called))
        source = _handing_out(looked_up, inside)
    first = len(traced.jaxpr.outvars)  # of the values inside, among the results

    def called_with(evaluate: Evaluate, leaves: list[Any]) -> list[Any]:
        # Such a rule can be called while the function runs, and not in its program.
        if closes_over and evaluate is _jax.evaluate:
            return traced.run(*leaves)
        return evaluate(*source, leaves)

    def remade(evaluate: Evaluate) -> Callable[..., list[Any]]:
        # The derivative is taken anew of whatever runs the function: an edit of it has
        # a gradient of its own.
        def gradients(*operands: Any) -> list[Any]:
            """Return the gradients and, of the same run, the results."""
            given, cts = operands[:count], operands[count:]

            def run(*values: Any) -> tuple[list[Any], list[Any]]:
                leaves = list(given)
                for place, value in zip(by, values, strict=True):
                    leaves[place.index] = value
                out = called_with(evaluate, leaves)
                points = dict(zip(inside, out[first:], strict=True))
                at = {"argument": leaves, "output": out}
                ends = [
                    points[y] if y.kind == "point" else at[y.kind][y.index]
                    for y, _ in pairs
                ]
                return ends, out

            values = [given[place.index] for place in by]
            _, pull, out = jax.vjp(run, *values, has_aux=True)
            return [*pull(list(cts)), *out]

        return gradients

    operands = [*traced.leaves, *(ct for _, ct in pairs)]
    try:
        opened = _jax.opened(jax.make_jaxpr(remade(_jax.evaluate))(*operands))
    except Exception as error:
        if closes_over and is_of_a_closure(error):
            raise TypeError(not_compiled(called)) from error
        raise
    if closes_over and _constants(*opened) - _constants(*source):
        raise TypeError(not_compiled(called))
    names = traced.paths()
    results = {k: names[place.index] for k, place in enumerate(by)}
    return Examined(
        "backward", *opened, operands, names, results, source, remade, len(pairs)
    )


def _handing_out(program: LookedUp, points: Sequence[Place]) -> tuple[Any, Any]:
    """Return the function's program with values inside of it among its results."""
    plan = program.plan
    targets = frozenset(t for y in points for t in plan.found[y.index].targets)

    def run(*leaves: Any) -> list[Any]:
        rewriter = Rewriter(Actions(captures=targets), shared=False)
        none = [None] * len(plan.found)
        out, captured = rewriter.run(plan, leaves, none, None)
        return [*out, *(captured[y.index] for y in points)]

    return _jax.opened(jax.make_jaxpr(run)(*program.traced.leaves))


def _constants(jaxpr: Any, consts: Sequence[Any]) -> set[int]:
    """Identities of the traced values that a program holds."""
    return {id(x) for x in (*consts, *_jax.held(jaxpr)) if _jax.is_traced(x)}


def _outputs(traced: Traced) -> Iterator[tuple[int, str]]:
    for path, place in nodes(traced.output, RETURN):
        if isinstance(place, Place):
            yield place.index, path


def _by(
    program: LookedUp, traced: Traced, xs: list[Any] | None, called: str
) -> list[Place]:
    """Places of the arguments to differentiate by."""
    if xs is None:
        trees = [*traced.positional, *traced.arguments.values()]
        return next(filter(None, (_carrying(program, tree) for tree in trees)), [])
    tree = [program.matched[x].tree for x in xs]
    places = list(dict.fromkeys(_carrying(program, tree)))
    if any(place.kind != "argument" for place in places) or not places:
        raise _no_arguments(program, xs, called)
    return places


def _carrying(program: LookedUp, tree: Any) -> list[Place]:
    places = [v for v in jax.tree.leaves(tree) if isinstance(v, Place)]
    return [v for v in places if _jax.is_differentiable(program.types[v])]


def _no_arguments(program: LookedUp, xs: Any, called: str) -> TypeError:
    arguments = program.traced.arguments
    carry = [name for name, tree in arguments.items() if _carrying(program, tree)]
    return wrong(
        TypeError,
        called,
        "xs are arguments that carry a gradient",
        quoted(xs),
        f"one of {quoted(carry)}" if carry else "an argument of floats",
    )
