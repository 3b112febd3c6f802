"""Norms and the like of gradients, from inside a jitted function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from ._address import Address, nodes
from ._checks import require_function, shown
from ._edge import public
from ._errors import function_name, type_of, wrong
from ._gate.summaries import (
    SUMMED,
    norm,
    over_axes,
    over_devices,
    summary,
    summary_dtype,
)
from ._program.arguments import cotangents, default_ys
from ._program.lookup import LookedUp, addresses_in, look_up
from ._program.refuse import refuse_factors, refuse_loops, refuse_outputs, refuse_rules
from ._program.trace import Place, Traced, arrays_at, trace
from ._program.wanted import TO_DIFFERENTIATE, TO_DIFFERENTIATE_BY
from ._reach.differentiate import Differentiation

P = ParamSpec("P")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stats:
    """What one gradient is like; of a value in a scan, an array of a number per step.

    Attributes:
      norm: the Euclidean norm, in float32 at least; nan where the gradient has nan.
      max: the largest magnitude.
      zero_fraction: how much of it is exactly zero, from 0 to 1.
      nonfinite: how many entries are nan or infinite.
      cause: why it is structurally zero, with file and line; None if it is not. A
        Python string: decided when the function is traced, and static under `jax.jit`.
    """

    norm: jax.Array
    max: jax.Array
    zero_fraction: jax.Array
    nonfinite: jax.Array
    cause: str | None = dataclasses.field(default=None, metadata={"static": True})


@public
def gradient_stats(
    fun: Callable[P, Any], xs: Any, *, ys: Any = None
) -> Callable[P, dict[str, Stats]]:
    """Say how large gradients are, at arguments and at values inside.

    To watch a training step from inside `jax.jit`: no host callback, and no gradient
    of a value inside is stored: it is summed up where it is made, in a scan step by
    step.

    Forward: not returned.
    Backward: that of `sg.gradients(fun, xs)`, as norms.

    Args:
      fun: any function that JAX can trace.
      xs: an address or several: arguments, named values, operations, variables. Each
        selects one array or a tree of them; leaves that carry no gradient are left out.
      ys: addresses of what is differentiated; `fun`'s output if it is one array.

    Returns:
      A function of `fun`'s arguments that returns {address of each array: `Stats`}, an
      ordinary pytree of scalars. A name that occurs several times has the addresses
      "h/0", "h/1"; where two of `xs` would have one key, as `sg.var("h", nth=0)` and
      `sg.var("h", nth=1)`, the key of each begins with the address as it is printed.
      In `shard_map` the numbers are those of all shards together (with
      `check_vma=False` each device's copy of a replicated value counts).

    Raises:
      AddressError: an address matches nothing, or more than one kind of thing.
      TypeError: an address selects nothing that carries a gradient, or `fun` returns
        several arrays and `ys` does not say which.
      ValueError: a value lies in a `while_loop` or in the body of a custom rule.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> def loss(w, frozen, x):
        ...     h = sg.name(jax.nn.relu(x * w), "h")
        ...     return jnp.sum(h**2) + jax.lax.stop_gradient(frozen)
        >>> stats = sg.gradient_stats(loss, ["w", "h", "frozen"])
        >>> found = jax.jit(stats)(2.0, 1.0, jnp.array([2.0, -1.0]))
        >>> print(found["h"].norm, found["h"].zero_fraction, found["w"].norm)
        8.0 0.5 16.0
        >>> print(found["frozen"].cause)
        stop_gradient, on purpose ...
    """
    require_function(fun, "gradient_stats")
    over = "" if ys is None else f", ys={shown(ys)}"
    called = f"gradient_stats({function_name(fun)}, {shown(xs)}{over})"
    wanted = addresses_in(xs, called, "xs")
    asked = None if ys is None else addresses_in(ys, called, "ys")
    if not wanted:
        raise wrong(
            TypeError,
            called,
            "xs must hold at least one address",
            f"{xs!r}",
            'xs="params"',
        )

    @public
    @functools.wraps(fun)
    def stats_of(*args: P.args, **kwargs: P.kwargs) -> dict[str, Stats]:
        traced = trace(fun, args, kwargs)
        return measured(traced, frozenset(), wanted, called, ys=asked)[2]

    return stats_of


def measured(
    traced: Traced,
    xs: Iterable[Place],
    stats: Iterable[Address],
    called: str,
    *,
    ys: Any = None,
    has_aux: bool = False,
) -> tuple[Any, dict[Place, jax.Array], dict[str, Stats]]:
    """Differentiate a traced function once, for gradients and for their statistics.

    Returns its result (if there are `xs`), the gradients of those xs that are
    connected, and the statistics at the addresses in `stats`.
    """
    addresses = list(stats)
    asked, xs = [] if ys is None else jax.tree.leaves(ys), set(xs)
    by = dataclasses.replace(TO_DIFFERENTIATE_BY, moving=True)
    wanted = dict.fromkeys(asked, TO_DIFFERENTIATE) | dict.fromkeys(addresses, by)
    program = look_up(traced, [*addresses, *asked], called, wanted)
    what = {"what": "stats", "ys": False} if has_aux else {}
    refuse_outputs(program, addresses, called, **what)
    refuse_loops(program, [*addresses, *asked], called)
    refuse_rules(program, [*addresses, *asked], called)
    refuse_factors(program, addresses, called)
    if ys is None:
        y_tree = default_ys(traced, has_aux, called)
    else:
        y_tree = program.tree(ys)
    pairs = cotangents(program, y_tree, None, called)
    places = _named(list(_places(program, addresses, called)))

    everything = xs | set(places.values())
    ends = [y for y, _ in pairs]
    differentiation = Differentiation(program, everything, ends, (), called, sums=True)
    out, found = differentiation.gradients(pairs, want_value=bool(xs))
    result = {}
    for path, place in places.items():
        if place in found:
            with _jax.at_width_of(program.types[place]):
                result[path] = _stats(*_totals(program, place, found[place]), None)
        else:
            cause = differentiation.why(place)
            result[path] = _no_stats(program, place, cause)
    value = arrays_at(traced.output, {"output": out}) if xs else None
    return value, {x: found[x] for x in xs if x in found}, result


def _totals(program: LookedUp, place: Place, gradient: Any) -> tuple[jax.Array, int]:
    """Return the summary of a gradient, and how many entries it is of, in each step."""
    if place.kind == "point":
        at = program.plan.found[place.index]
        totals, devices = over_devices(gradient, at.copies)
        size = at.size
    else:
        totals, devices, size = summary(gradient), 1, gradient.size
    totals, around = over_axes(totals)
    return totals, size * devices * around


def _no_stats(program: LookedUp, place: Place, cause: str) -> Stats:
    point = place.kind == "point"
    steps = program.plan.found[place.index].steps if point else ()
    dtype = summary_dtype(program.types[place].dtype)
    return _stats(jnp.zeros((*steps, SUMMED), dtype), 1, cause)


def _stats(totals: jax.Array, size: int, cause: str | None) -> Stats:
    norm, largest, zeros, nonfinite = _numbers(totals, size)
    return Stats(norm, largest, zeros, nonfinite, cause)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _numbers(totals: jax.Array, size: int) -> Any:
    _, largest, nonzero, nonfinite = (totals[..., k] for k in range(SUMMED))
    # Of an empty array all entries are zero, as there is none that is not.
    fraction = (size - nonzero) / size if size else jnp.ones_like(nonzero)
    return norm(totals), largest, fraction, nonfinite.astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Place:
    """One array that is asked for: `path` begins with `root`, the address's own."""

    address: Address
    root: str
    path: str
    value: Place

    @property
    def name(self) -> str:
        """Its path below the address as that is printed."""
        whole = self.address if isinstance(self.address, str) else repr(self.address)
        return whole + self.path[len(self.root) :]


def _named(places: Sequence[_Place]) -> dict[str, Place]:
    """Return each place by its path; by its address where that is another's path."""
    at: dict[str, set[Place]] = {}
    for place in places:
        at.setdefault(place.path, set()).add(place.value)
    shared = {p.address for p in places if len(at[p.path]) > 1}
    return {p.name if p.address in shared else p.path: p.value for p in places}


def _places(
    program: LookedUp, addresses: Iterable[Address], called: str
) -> Iterator[_Place]:
    """Yield each array that is asked for."""
    for address in addresses:
        every = [
            _Place(address, root, path, place)
            for root, tree in program.matched[address].places.items()
            for path, place in nodes(tree, root)
            if isinstance(place, Place)
        ]
        types = [program.types[place.value] for place in every]
        pairs = zip(every, types, strict=True)
        carry = [place for place, type in pairs if _jax.is_differentiable(type)]
        if not carry:
            came = ", ".join(dict.fromkeys(map(type_of, types)))
            raise wrong(
                TypeError,
                f"{called}: address {address!r}",
                "a value that carries a gradient (float or complex)",
                came or "a Python value, which is not traced",
                "the address of a float",
            )
        yield from carry
