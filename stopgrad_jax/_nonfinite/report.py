"""What `find_nonfinite` reports, and how it is laid out."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.nonfinite as _words
from stopgrad_jax._errors import type_of
from stopgrad_jax._page import Page, Part, page, snippet
from stopgrad_jax._source.labels import Labels, Spot
from stopgrad_jax._source.written import variables_of

from .blame import Birth
from .entries import is_nan, wide
from .hints import hint
from .levels import Executed
from .search import Finding


@dataclasses.dataclass(frozen=True, repr=False)
class Nonfinite:
    """Where a nonfinite value was born that reaches a result; `str` tells it all.

    A value has one of three births: it was nonfinite when it came in (`argument`), or
    it was born forward, or backward, in a derivative. One that was born forward may be
    hidden from the function's value (`hidden_by`) and be a factor of its gradient.

    Attributes:
      direction: "backward" if it was born in a derivative, else "forward".
      reaches: addresses of the nonfinite results: "return/loss", or "params/w" for its
        gradient.
      argument: address of the argument that was nonfinite when the function was called,
        if that is the cause, else "".
      entry: the index of the entry of the argument that matters.
      file, line: the user's expression that it was born in, or in which what came in
        first turns to nan or else is first used; "" and 0 where there is none.
      function: the user's function that it is in.
      expression: its text.
      primitive: JAX's name of the operation.
      step: the round of the innermost loop that it lies in (in a scan the index into
        what is scanned), or None.
      steps: the rounds of all loops that it lies in, outermost first.
      index: where in the operation's result the entry is that was traced back; in a
        `shard_map`, of all shards together, by their place in the mesh.
      example: the first number of `index` if the operation is under `vmap`: which
        example it is, unless `in_axes` or the operation put another axis first.
      operands, result: the operands and the nonfinite result, as NumPy arrays.
      hidden_by: `file:line` of what hides it from the function's value, or "".
      hint: what to write instead, or why it is nonfinite.
    """

    direction: str
    reaches: tuple[str, ...]
    argument: str
    entry: tuple[int, ...]
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
    hidden_by: str
    hint: str
    page: Page

    def __str__(self) -> str:
        return str(self.page)

    __repr__ = __str__

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return self.page.html


def report(found: Finding, labels: Labels, fun: Callable[..., Any]) -> Nonfinite:
    """Report what was found."""
    birth, given = found.birth, found.given
    at = birth if birth is not None and birth.frames else None
    spot = at.op.path.spots[-1] if at and at.op.path.spots else None
    words = hint(found, labels, fun)
    hidden = [op.path.spots[-1] for op in found.hidden if op.path.spots]
    index = at.index if at else ()
    return Nonfinite(
        direction=found.side,
        reaches=found.reaches,
        argument=found.program.names.get(given.operand, "") if given else "",
        entry=given.index if given else (),
        file=spot.file if spot else "",
        line=spot.frame.line if spot else 0,
        function=_function(spot),
        expression=spot.expression if spot else "",
        primitive=at.op.eqn.primitive.name if at else "",
        step=at.steps[-1] if at and at.steps else None,
        steps=at.steps if at else (),
        index=index,
        example=_example(at),
        operands=at.operands if at else (),
        result=birth.result if birth else None,
        hidden_by=hidden[0].place if hidden else "",
        hint=words,
        page=page(_lines(found, at, spot, words, fun)),
    )


def _function(spot: Spot | None) -> str:
    return spot.function.split(".<locals>.")[-1] if spot else ""


def _lines(
    found: Finding,
    at: Birth | None,
    spot: Spot | None,
    words: str,
    fun: Callable[..., Any],
) -> Iterator[list[Part]]:
    """Yield the report: what and where, the numbers, what hides it, what to do."""
    names = ", ".join(found.reaches[:4]) + (", ..." if found.reaches[4:] else "")
    derived = found.program.direction == "backward"
    what = f"the gradient of {names}" if derived else names
    yield [("nonfinite: ", "cut"), (f"{what}; {_headline(found, at, fun)}", "")]
    if found.given is not None:
        x = found.program.operands[found.given.operand]
        text = _words.others(found.given.others, type_of(x))
        yield [(f"  {text}", "dim")]
    if found.by_steps:
        yield [(f"  {_words.BY_STEPS}", "dim")]
    if spot is not None:
        yield [(f"  --> {spot.place} in {_function(spot)}()", "dim")]
        yield from snippet(spot, _under(found, at), 2)
    if at is not None:
        yield from _numbers(at)
    hidden = _placed(found.hidden)
    if hidden:
        yield [(f"  {_words.hidden(hidden)}", "")]
    if found.factor is not None and found.side == "forward":
        gradient = what if derived else "a gradient"
        expression = _placed([found.factor])
        if expression:
            yield [(f"  {_words.factor(gradient, expression)}", "")]
    yield from _hint(words)


def _index(index: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, index))}]" if index else ""


def _headline(found: Finding, at: Birth | None, fun: Callable[..., Any]) -> str:
    """Say in half a sentence where the nonfinite value comes from."""
    birth, given = found.birth, found.given
    if given is not None:
        address = found.program.names[given.operand]
        return _words.came_in(f"{address}{_index(given.index)}", _sign(given.value))
    if birth is None:
        back = found.program.calls_back
        return _words.CALLED_BACK if back else _words.ONLY_COMPILED
    kind = _kind(birth)
    constant = found.constant
    if constant is None:
        return _words.born(kind, found.side, birth.op.eqn.primitive.name)
    names = variables_of(constant.value, fun, at.op.path.spots if at else ())
    sign = _sign(np.asarray(constant.value)[constant.index])
    if names:
        each = (name + _index(constant.index) for name in names)
        return _words.constant(" or ".join(each), sign)
    return _words.unnamed(type_of(constant.value), _index(constant.index), sign)


def _kind(birth: Birth) -> str:
    index = birth.index if birth.frames else ()
    return "nan" if is_nan(birth.result, index) else "inf"


def _sign(value: Any) -> str:
    number = wide(value)[()]
    if np.isnan(number):
        return "nan"
    return "-inf" if not np.iscomplexobj(number) and number < 0 else "inf"


def _under(found: Finding, at: Birth | None) -> str:
    """Words under the expression."""
    assert at is not None
    kind = _kind(at)
    if at.kind == "taken":
        return _words.TAKEN.format(kind=kind)
    if at.kind == "harm" and (found.given or found.constant):
        return _words.TURNS
    words = _words.IN_DERIVATIVE if found.side == "backward" else _words.HERE
    return words.format(kind=kind)


def _numbers(at: Birth) -> Iterator[list[Part]]:
    name, index = at.op.eqn.primitive.name, at.index
    pairs = zip(at.operands, at.entries, strict=True)
    operands = ", ".join(_shown(x, entry) for x, entry in pairs)
    place = f" at {list(index)} of {type_of(at.result)}" if index else ""
    value = _shown(at.result, index)
    yield [(f"  {name}({operands}) = {value}{place}", "")]
    inside = [f"step {step}" for step in at.steps]
    example = _example(at)
    if example is not None:
        inside.append(_words.example(example))
    if inside:
        yield [(f"  in {', '.join(inside)}", "bold")]


def _example(at: Birth | None) -> int | None:
    """Return the example, unless what is alike for all of them stays one."""
    if at is None:
        return None
    if at.op.transforms.count("vmap") <= _jax.vmaps_of_jax(at.op.eqn):
        return None
    return at.index[0] if np.shape(at.result)[:1] > (1,) else None


def _placed(ops: Sequence[Executed]) -> str:
    """Name the expressions of operations, each of them once, three at most."""
    spots = [op.path.spots[-1] for op in ops if op.path.spots]
    texts = [f"{spot.expression} ({spot.place})" for spot in dict.fromkeys(spots)]
    return ", ".join(texts[:3])


def _hint(words: str) -> Iterator[list[Part]]:
    first, *rest = textwrap.wrap(words, 80, break_long_words=False) or [""]
    if first:
        yield [("  hint: ", "bold"), (first, "")]
    for line in rest:
        yield [(f"        {line}", "")]


def _shown(x: Any, entry: tuple[int, ...] | None) -> str:
    """Print an operand: the entry that matters, or all if none is known to."""
    if not isinstance(x, np.ndarray):
        return str(x)[:40]
    if entry is not None:
        return _number(x[entry])
    if x.size <= 4:
        return _number(x)
    if not jnp.issubdtype(x.dtype, jnp.number):
        return type_of(x)
    numbers, values = wide(x), type_of(x)
    has_nan = np.isnan(numbers)
    numbers = numbers[~has_nan]
    if np.iscomplexobj(numbers):
        numbers, values = np.abs(numbers), f"{values} of magnitudes"
    told = [f"from {numbers.min():.4g} to {numbers.max():.4g}"] if len(numbers) else []
    told += ["nan"] if has_nan.any() else []
    return f"{values} {' and '.join(told)}"


def _number(x: Any) -> str:
    """Print entries with the digits of their own dtype, and not of Python's float."""
    return f"[{', '.join(map(_number, x))}]" if np.ndim(x) else str(x)
