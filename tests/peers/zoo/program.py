"""What a program of the zoo is, and what plain JAX says about it.

A program calls a public function of a package as its documentation does. It takes a
`tap`, the identity: plain JAX looks in, adds, and doubles through it, where the verbs
have to do the same from outside.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

POINTS = 3


def untapped(value: Any, name: str) -> Any:
    """Return the value: nobody looks."""
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function that uses a package, and what is known about its gradient.

    Attributes:
      package: the distribution on the package index.
      what: the public function or class.
      fun: the program; `fun(*args, tap=untapped)` is a scalar.
      args: arguments at a random point, made from a NumPy generator.
      inner: how the verbs are told of the value that goes through `tap(..., "inner")`.
      cut, unused: the float leaves that get no gradient, by what is known of the
        algorithm: the value comes there, or does not.
      zero: leaves through which a gradient flows that is zero all the same, and why.
      terms: taps which are terms of the loss, by the variables that they hold.
      allow: rules that differ from their function on purpose.
      wide: gradients are checked in float64; a solver's tolerance shows in float32.
      modes: those in which JAX differentiates it.
      planted: the argument whose first entry is made nan.
    """

    package: str
    what: str
    fun: Callable[..., Any]
    args: Callable[[np.random.Generator], tuple[Any, ...]]
    inner: Any
    cut: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    zero: Mapping[str, str] = dataclasses.field(default_factory=dict)
    terms: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    wide: bool = False
    modes: tuple[str, ...] = ("rev",)
    planted: str = ""

    @property
    def names(self) -> list[str]:
        """The arguments' names."""
        return [n for n in inspect.signature(self.fun).parameters if n != "tap"]

    @functools.cached_property
    def points(self) -> list[tuple[Any, ...]]:
        """Arguments at three random points."""
        made = [self.args(np.random.default_rng(k)) for k in range(POINTS)]
        return jax.tree.map(lambda x: jnp.asarray(x), made)


def address(program: Program, path: Any) -> str:
    """The address of a leaf of the arguments."""
    at = jax.tree_util.keystr(path[1:], simple=True, separator="/")
    name = program.names[path[0].idx]
    return f"{name}/{at}" if at else name


def floats(program: Program, args: Any) -> dict[str, jax.Array]:
    """The leaves that carry a gradient, by address."""
    flat = jax.tree_util.tree_flatten_with_path(args)[0]
    carry = [(p, x) for p, x in flat if jnp.issubdtype(x.dtype, jnp.floating)]
    return {address(program, p): x for p, x in carry}


def with_floats(program: Program, args: Any, values: Mapping[str, Any]) -> Any:
    """The arguments with other values at those leaves."""
    put = lambda path, x: values.get(address(program, path), x)
    return jax.tree_util.tree_map_with_path(put, args)


# Plain JAX, on one compiled program per question.


@functools.cache
def _compiled(program: Program, term: str | None) -> Callable[..., Any]:
    def loss(values, args):
        args = with_floats(program, args, values)
        return program.fun(*args) if term is None else seen(program, term, *args)

    return jax.jit(jax.grad(loss))


def gradients(program: Program, term: str | None = None) -> list[dict[str, Any]]:
    """`jax.grad` by every float leaf at each point, of the program or of a term."""
    return [gradients_at(program, args, term) for args in program.points]


def gradients_at(program: Program, args: Any, term: str | None = None) -> Any:
    """`jax.grad` by every float leaf."""
    return _compiled(program, term)(floats(program, args), args)


def seen(program: Program, name: str, *args: Any) -> Any:
    """The value that goes through a tap."""
    values = []

    def tap(value, at):
        if at == name:
            values.append(value)
        return value

    program.fun(*args, tap=tap)
    (value,) = values
    return value


def added(program: Program, addend: Any, *args: Any) -> Any:
    """The program with something added to its inner value."""
    add = lambda value, at: value + addend if at == "inner" else value
    return program.fun(*args, tap=add)


def doubled(program: Program, *args: Any) -> Any:
    """The program with its inner value doubled."""
    return program.fun(
        *args, tap=lambda value, at: 2 * value if at == "inner" else value
    )
