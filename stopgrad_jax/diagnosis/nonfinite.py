"""Where nan and inf are born, forward or backward: at which line, in which step."""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import RETURN, nodes
from stopgrad_jax._engine.blame import Birth, count, find, has_nan
from stopgrad_jax._engine.given import cotangents, default_ys
from stopgrad_jax._engine.labels import Labels, Spot
from stopgrad_jax._engine.levels import Runner
from stopgrad_jax._engine.select import Program, listed, look_up
from stopgrad_jax._engine.trace import Traced, Value, trace
from stopgrad_jax._errors import beats, function_name, quoted, type_of

from .hints import hint
from .page import Page, Part, page, underlined

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True)
class Nonfinite:
    """Where a nonfinite value was born that reaches a result; `str` tells it all.

    Attributes:
      direction: "forward", or "backward" if it was born in a derivative.
      reaches: addresses of the nonfinite results: "return/loss", or "params/w" for its
        gradient.
      file, line: the user's expression; "" and 0 where there is no source.
      function: the user's function that it is in.
      expression: its text; the address of an argument that was nonfinite itself.
      primitive: JAX's name of the operation, or "" for an argument.
      step: the round of the innermost loop that it lies in (in a scan the index into
        what is scanned), or None.
      steps: the rounds of all loops that it lies in, outermost first.
      index: where the first nonfinite entry of the result is; in a `shard_map`, of all
        shards together.
      example: the first number of `index` if the operation is under `vmap`: which
        example it is, unless `in_axes` or the operation put another axis first.
      operands, result: the operands and the nonfinite result, as NumPy arrays.
      hint: what to write instead.
    """

    direction: str
    reaches: tuple[str, ...]
    file: str
    line: int
    function: str
    expression: str
    primitive: str
    step: int | None
    steps: tuple[int, ...]
    index: tuple[int, ...]
    example: int | None
    operands: tuple[Any, ...]
    result: Any
    hint: str
    page: Page = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return str(self.page)

    def _repr_html_(self) -> str:
        return self.page.html


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
        _require_known(args, kwargs, called)
        traced = trace(fun, args, kwargs)
        _require_known(traced.leaves, {}, called)
        labels = Labels(fun)
        jaxpr, consts, leaves = traced.jaxpr, traced.consts, traced.leaves
        names = dict(_outputs(traced))
        forward = _Search(labels, "forward", jaxpr, consts, leaves, names)
        report = forward.report(dict(_arguments(traced)))
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
            return _born(birth, self.direction, reaches)
        given = [inputs[k] for k, x in enumerate(self.leaves) if count(x)]
        return _given(given, self.direction, reaches)


def _require_known(args: Any, kwargs: Any, called: str) -> None:
    for leaf in jax.tree.leaves((args, kwargs)):
        if _jax.is_traced(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                beats(
                    called,
                    "arrays whose values are known: the function is run",
                    f"a traced {type_of(leaf)}",
                    "the call outside of jax.jit, jax.grad and jax.vmap: "
                    "sg.find_nonfinite(jax.jit(fun))(*args)",
                )
            )


def _outputs(traced: Traced) -> Iterator[tuple[int, str]]:
    for path, place in nodes(traced.output, RETURN):
        if isinstance(place, Value):
            yield place.index, path


def _arguments(traced: Traced) -> Iterator[tuple[int, str]]:
    trees = {str(k): tree for k, tree in enumerate(traced.positional)}
    for root, tree in (trees | dict(traced.arguments)).items():
        for path, place in nodes(tree, root):
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
    names = dict(_arguments(traced))
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


# The report -------------------------------------------------------------------------


def _born(birth: Birth, direction: str, reaches: tuple[str, ...]) -> Nonfinite:
    op, result = birth.op, birth.result
    derived = _is_derivative(birth)
    # In a program that takes gradients of its own, what it was born in decides.
    side = "backward" if direction == "backward" or derived else "forward"
    bad = np.argwhere(~np.isfinite(np.asarray(result, _wide(result))))
    index = tuple(map(int, bad[0])) if len(bad) else ()
    spot = op.path.spots[-1] if op.path.spots else None
    words = hint(birth, derived or direction == "backward")
    example = index[0] if "vmap(" in op.scopes and index else None
    primitive = op.eqn.primitive.name
    lines = _lines(birth, spot, direction, side, reaches, index, example, words)
    return Nonfinite(
        side,
        reaches,
        spot.file if spot else "",
        spot.frame.line if spot else 0,
        spot.function.split(".<locals>.")[-1] if spot else "",
        spot.expression if spot else "",
        primitive,
        birth.steps[-1] if birth.steps else None,
        birth.steps,
        index,
        example,
        birth.operands,
        result,
        words,
        page(lines),
    )


def _is_derivative(birth: Birth) -> bool:
    """Whether it was born in a derivative: it goes nowhere but to a backward pass."""
    if "transpose(" in birth.op.scopes:
        return True
    after = birth.follower.scopes if birth.follower else ""
    return "jvp(" in birth.op.scopes and "transpose(" in after


def _lines(
    birth: Birth,
    spot: Spot | None,
    direction: str,
    side: str,
    reaches: Sequence[str],
    index: tuple[int, ...],
    example: int | None,
    words: str,
) -> Iterator[list[Part]]:
    kind = "nan" if has_nan(birth.result) else "inf"
    names = ", ".join(reaches[:4]) + (", ..." if reaches[4:] else "")
    what = f"the gradient of {names}" if direction == "backward" else names
    name = birth.op.eqn.primitive.name
    yield [("nonfinite: ", "cut"), (f"{what}; {kind} is born {side}, in {name}", "")]
    if spot is not None:
        function = spot.function.split(".<locals>.")[-1]
        yield [(f"  --> {spot.place} in {function}()", "dim")]
        derivative = ", in its derivative" if side == "backward" else ""
        yield from _source(spot, f"{kind} here{derivative}")
    operands = ", ".join(_shown(x, birth.result, index) for x in birth.operands)
    at = f" at {list(index)} of {type_of(birth.result)}" if index else ""
    value = _shown(birth.result, birth.result, index)
    yield [(f"  {name}({operands}) = {value}{at}", "")]
    loops = [f"step {step}" for step in birth.steps]
    if example is not None:
        loops.append(f"example {example} of vmap")
    if loops:
        yield [(f"  in {', '.join(loops)}", "bold")]
    yield from _hint(words)


def _hint(words: str) -> Iterator[list[Part]]:
    first, *rest = textwrap.wrap(words, 80, break_long_words=False)
    yield [("  hint: ", "bold"), (first, "")]
    for line in rest:
        yield [(f"        {line}", "")]


def _source(spot: Spot, words: str) -> Iterator[list[Part]]:
    line, col, end_line, end_col = spot.position
    rows = spot.source.rows(line, line) if spot.is_current else []
    if not rows:
        yield [(f"      {spot.expression}  {words}", "cut")]
        return
    text = rows[0][1]
    start = spot.source.column(line, col)
    end = spot.source.column(line, end_col) if end_line == line else len(text)
    gutter = f"{line:>4}"
    shown, marks = underlined(text, start, end, "^")
    yield [(f"  {gutter} | ", "dim"), (shown, "")]
    yield [(f"  {' ' * len(gutter)} | ", "dim"), (f"{marks} {words}", "cut")]


def _shown(x: Any, result: Any, index: tuple[int, ...]) -> str:
    """Print an operand: the entry that matters, if it can be told."""
    if not isinstance(x, np.ndarray):
        return str(x)[:40]
    if not x.shape:
        return f"{x}"
    if x.shape == result.shape:
        return f"{x[index]}"
    if x.size <= 4:
        return str(x.tolist())
    if not jnp.issubdtype(x.dtype, jnp.number):
        return type_of(x)
    wide = np.asarray(x, _wide(x))
    return f"{type_of(x)} from {np.abs(wide).min():.4g} to {np.abs(wide).max():.4g}"


def _wide(x: Any) -> Any:
    dtype = np.asarray(x).dtype
    return dtype if dtype.kind in "fciub" else np.float32


def _given(names: Sequence[str], direction: str, reaches: tuple[str, ...]) -> Nonfinite:
    """Report what was nonfinite before anything was computed."""
    if names:
        address = names[0]
        words = f"{', '.join(names)} is nonfinite when the function is called"
    else:
        address = ""
        words = (
            "a constant of the function is nonfinite, or the result is so only as it "
            "is compiled, in another order of operations: look at it in float64"
        )
    lines: list[list[Part]] = [
        [("nonfinite: ", "cut"), (", ".join(reaches), "")],
        *_hint(words),
    ]
    empty: dict[str, Any] = {"operands": (), "result": None, "index": (), "steps": ()}
    return Nonfinite(
        direction=direction,
        reaches=reaches,
        file="",
        line=0,
        function="",
        expression=address,
        primitive="",
        step=None,
        example=None,
        hint=words,
        page=page(lines),
        **empty,
    )
