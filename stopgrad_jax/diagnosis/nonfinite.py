"""Where nan and inf are born, forward or backward: at which line, in which step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import RETURN, nodes
from stopgrad_jax._engine.blame import count, find
from stopgrad_jax._engine.given import cotangents, default_ys
from stopgrad_jax._engine.labels import Labels
from stopgrad_jax._engine.levels import Runner
from stopgrad_jax._engine.select import Program, listed, look_up
from stopgrad_jax._engine.trace import Traced, Value, require_known, trace
from stopgrad_jax._errors import beats, function_name, quoted

from .report import Nonfinite, born, given

P = ParamSpec("P")


def find_nonfinite(
    fun: Callable[P, Any], xs: Any = None, *, ys: Any = None
) -> Callable[P, Nonfinite | None]:
    """Find the first operation whose nan or inf reaches a result or a gradient.

    `jax.debug_nans` stops at the first nan of all, also where it is masked later, and
    under `jax.jit` of a gradient it has no line. This one works back from what is
    nonfinite in the end.

    Forward: `fun` is run, once compiled; only if something is nonfinite it is run again
    step by step, as far as needed.
    Backward: likewise the gradients by `xs`, if `fun` returns one array or `ys` is
    given.

    Args:
      fun: any function that JAX can trace; a training step too, whose gradients are
        then its own.
      xs: addresses of the arguments whose gradients are looked at; the first argument
        that carries one, as in `jax.grad`, if None. `xs=()` looks forward only.
      ys: addresses of what is differentiated; `fun`'s output if it is one array.

    Returns:
      A function of `fun`'s arguments, concrete arrays. It returns None, or a
      `Nonfinite`: print it. Values that never reach a result are not reported, nor is
      an infinity that is put in on purpose (a literal, an argument), unless an
      operation makes nan of it or nothing else explains the result.

    Raises:
      TypeError: an argument is traced: call it outside of `jax.jit`.
      AddressError: an address matches nothing.

    Example:
        >>> import jax.numpy as jnp, stopgrad_jax as sg
        >>> def loss(w):
        ...     return jnp.where(w > 0, jnp.sqrt(w), 0.0)
        >>> report = sg.find_nonfinite(loss)(0.0)
        >>> print(report.direction, report.expression)
        backward jnp.sqrt(w)
        >>> print(report.hint)
        jnp.where(w > 0, jnp.sqrt(w), 0.0) ... masks the value and not the derivative...
        >>> print(sg.find_nonfinite(loss)(1.0))
        None
    """
    called = f"find_nonfinite({function_name(fun)})"
    wanted = None if xs is None else listed(xs, called, "xs")
    asked = None if ys is None else listed(ys, called, "ys")

    @functools.wraps(fun)
    def find_in(*args: P.args, **kwargs: P.kwargs) -> Nonfinite | None:
        require_known(jax.tree.leaves((args, kwargs)), called, "find_nonfinite")
        traced = trace(fun, args, kwargs)
        labels = Labels(fun)
        jaxpr, consts, leaves = traced.jaxpr, traced.consts, traced.leaves
        names = dict(_outputs(traced))
        forward = _Search(labels, "forward", jaxpr, consts, leaves, names)
        report = forward.report(traced.paths())
        if report is not None or wanted == []:
            return report
        gradient = _gradient(traced, wanted, asked, called)
        if gradient is None:
            return None
        program, places, names = gradient
        values = [leaves[place.index] for place in places]
        jaxpr, consts = _jax.opened(jax.make_jaxpr(program)(*values))
        return _Search(labels, "backward", jaxpr, consts, values, names).report(names)

    return find_in


@dataclasses.dataclass(frozen=True)
class _Search:
    """One program to look through, and what its results are called."""

    labels: Labels
    direction: str
    jaxpr: Any
    consts: Sequence[Any]
    leaves: Sequence[Any]
    results: dict[int, str]

    def report(self, inputs: dict[int, str]) -> Nonfinite | None:
        """Report the first birth; `inputs` names the operands."""
        jaxpr, consts = self.jaxpr, self.consts
        run = jax.jit(lambda *leaves: _jax.evaluate(jaxpr, consts, leaves))
        out = run(*self.leaves)
        bad = [k for k, x in enumerate(out) if k in self.results and count(x)]
        if not bad:
            return None
        reaches = tuple(self.results[k] for k in bad)
        runner = Runner(self.labels)
        level = runner.flat(jaxpr, consts, self.leaves, self.labels.nowhere)
        level.outputs = [level.outputs[k] for k in bad]
        birth = find(runner, level)
        if birth is not None:
            return born(birth, self.direction, reaches)
        names = [inputs[k] for k, x in enumerate(self.leaves) if count(x)]
        return given(names, self.direction, reaches)


def _outputs(traced: Traced) -> Iterator[tuple[int, str]]:
    for path, place in nodes(traced.output, RETURN):
        if isinstance(place, Value):
            yield place.index, path


def _gradient(
    traced: Traced, xs: list[Any] | None, ys: Any, called: str
) -> tuple[Callable[..., Any], list[Value], dict[int, str]] | None:
    """Return the program of the gradients, what it is a function of, and the names."""
    program = look_up(traced, [*(xs or ()), *(ys or ())], called)
    outputs = list(_outputs(traced))
    if ys is None and len(outputs) != 1:
        if xs is not None:
            default_ys(traced, False, called)  # raises: it must say which
        return None  # the gradients in it are its own
    y_tree = traced.output if ys is None else program.tree(ys)
    ends = [v for v in jax.tree.leaves(y_tree) if isinstance(v, Value)]
    if not all(jnp.issubdtype(program.types[y].dtype, jnp.floating) for y in ends):
        if ys is None and xs is None:
            return None
    pairs = cotangents(program, y_tree, None, called)
    names = traced.paths()
    places = _by(program, traced, xs, called)
    if not places or not pairs:
        return None
    jaxpr, consts = traced.jaxpr, traced.consts

    def gradients(*values: Any) -> Any:
        def run(*values: Any) -> list[Any]:
            leaves = list(traced.leaves)
            for place, value in zip(places, values, strict=True):
                leaves[place.index] = value
            out = _jax.evaluate(jaxpr, consts, leaves)
            return [out[y.index] for y, _ in pairs]

        return jax.vjp(run, *values)[1]([ct for _, ct in pairs])

    return gradients, places, {k: names[p.index] for k, p in enumerate(places)}


def _by(
    program: Program, traced: Traced, xs: list[Any] | None, called: str
) -> list[Value]:
    """Places of the arguments to differentiate by."""

    def carrying(tree: Any) -> list[Value]:
        places = [v for v in jax.tree.leaves(tree) if isinstance(v, Value)]
        return [v for v in places if _jax.is_differentiable(program.types[v])]

    if xs is None:
        trees = [*traced.positional, *traced.arguments.values()]
        return next(filter(None, map(carrying, trees)), [])
    places = list(dict.fromkeys(carrying([program.matched[x].tree for x in xs])))
    if any(place.kind != "argument" for place in places) or not places:
        raise TypeError(
            beats(
                called,
                "xs are arguments that carry a gradient",
                quoted(xs),
                f"one of {quoted(traced.arguments)}",
            )
        )
    return places
