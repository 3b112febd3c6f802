"""What `find_nonfinite` reports, and how it is laid out."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from stopgrad_jax._engine.blame import Birth, has_nan
from stopgrad_jax._engine.labels import Spot
from stopgrad_jax._errors import type_of

from .hints import hint
from .page import Page, Part, page, snippet


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


def born(birth: Birth, direction: str, reaches: tuple[str, ...]) -> Nonfinite:
    """Report a birth in a program that was looked at in this direction."""
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
        yield from snippet(spot, f"{kind} here{derivative}", 2)
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


def given(names: Sequence[str], direction: str, reaches: tuple[str, ...]) -> Nonfinite:
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
