"""Named values: mark them, read them, change them, add to them.

`name` marks a value; `capture`, `edit` and `perturb` transform a function at the
values that addresses select, wherever they are in it, without editing its source.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

import stopgrad_jax._jax as _jax

from ._address import Address, leaf_paths, op, point, var
from ._checks import require_function, require_same_tree, shown
from ._edge import public
from ._errors import function_name, wrong
from ._program.arguments import perturbations_by_place, require_keys
from ._program.edits import kept, same_type
from ._program.lookup import LookedUp, addresses_in, look_up
from ._program.perturbation import shift
from ._program.refuse import (
    refuse_differentiated,
    refuse_factors,
    refuse_loops,
    refuse_rules,
)
from ._program.rewrite import Actions, Rewriter
from ._program.search import NamedLeaf, PointName
from ._program.trace import Place, arrays_at, is_traceable, trace
from ._program.wanted import Wanted
from ._reach.closures import refusing

__all__ = ["capture", "edit", "name", "op", "perturb", "point", "var"]

P = ParamSpec("P")
T = TypeVar("T")


@public
def name(tree: T, name: str) -> T:
    """Give a value a name, so that it can be addressed from outside.

    Leaves of a pytree are named `"h/a"`, `"h/b"`, and so on; `"h"` then addresses the
    whole tree. It is the primitive of `jax.ad_checkpoint.checkpoint_name`, so remat
    policies that save names see it too.

    Forward: the value itself.
    Backward: the cotangent itself.

    Args:
      tree: a pytree; leaves that are not arrays or floats are passed on unnamed.
      name: a non-empty string; `/` separates levels, `*` is kept for patterns.

    Returns:
      The same tree.

    Raises:
      ValueError: the name is empty, holds `*`, or starts with a number or "return".

    Example:
        >>> import jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda x: jnp.sum(sg.name(2.0 * x, "h") ** 2)
        >>> print(sg.gradients(f, "h")(jnp.array([1.0, 2.0])))
        [4. 8.]
    """
    head = name.split("/")[0] if isinstance(name, str) else ""
    if not head or "*" in name or head.isdigit() or head == "return":
        raise wrong(
            ValueError,
            f"name(tree, {name!r})",
            "a name is a non-empty string without * whose first level is neither "
            'a number nor "return"',
            repr(name),
            'sg.name(tree, "h")',
        )
    flat, structure = jax.tree.flatten(tree)
    paths = leaf_paths(tree)
    if paths == [""] and is_traceable(tree):
        return checkpoint_name(tree, name)
    names = [f"{name}/{path}" if path else name for path in paths]
    pairs = zip(names, flat, strict=True)
    marked = [NamedLeaf(n) if is_traceable(x) else x for n, x in pairs]
    template = jax.tree.unflatten(structure, marked)
    leaves = [
        checkpoint_name(x, PointName(n, name, template)) if is_traceable(x) else x
        for n, x in zip(names, flat, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


@public
def capture(
    fun: Callable[P, T], names: Address | Iterable[Address]
) -> Callable[P, tuple[T, dict[Address, Any]]]:
    """Return the values at addresses beside the function's own result.

    Forward: `fun`'s, and the values; a value in a scan is stacked over its steps, one
    in a branch that is not taken is zero, several of one name are a tuple (so is a loop
    under `jax.disable_jit()`, which JAX unrolls). Under `vmap` the examples are along
    the axis where JAX keeps them: the first, with `in_axes=0`.
    Backward: `fun`'s; a captured value is an ordinary output.

    Args:
      fun: any function that JAX can trace.
      names: an address or several.

    Returns:
      A function of `fun`'s arguments that returns (fun's result, {address: value}).

    Raises:
      AddressError: an address matches nothing, or more than one kind of thing.
      ValueError: a value lies in a `while_loop`, whose steps cannot be stacked.

    Example:
        >>> import jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda x: jnp.sum(sg.name(2.0 * x, "h") ** 2)
        >>> out, values = sg.capture(f, ["h"])(jnp.array([1.0, 2.0]))
        >>> print(out, values["h"])
        20.0 [2. 4.]
    """
    require_function(fun, "capture")
    called = f"capture({function_name(fun)}, {shown(names)})"
    addresses = addresses_in(_as_list(names), called, "names")

    @public
    @functools.wraps(fun)
    def captured(*args: P.args, **kwargs: P.kwargs) -> Any:
        traced = refusing(trace(fun, args, kwargs), called)
        wanted = dict.fromkeys(addresses, Wanted(loops=False))
        program = look_up(traced, addresses, called, wanted)
        refuse_loops(program, addresses, called)
        actions = Actions(captures=program.targets_of(addresses))
        none = [None] * len(program.plan.found)
        traced = program.traced
        out, values = Rewriter(actions).run(program.plan, traced.leaves, none, None)
        places = {"argument": traced.leaves, "output": out, "point": values}
        result = arrays_at(traced.output, places)
        return result, {
            a: arrays_at(program.matched[a].tree, places) for a in addresses
        }

    return captured


@public
def edit(
    fun: Callable[P, T], edits: Mapping[Address, Callable[..., Any]]
) -> Callable[P, T]:
    """Apply functions to the values at addresses, wherever they are in `fun`.

    Forward and Backward: as if the source read `h = edits["h"](h)` at that place. What
    is asked of the edited function at the same address is the value before that. For
    `sg.op(...)`, as if it read `y = edit(relu, x)` where it reads `y = relu(x)`: this
    is TensorFlow 1's `gradient_override_map`, and more.

    Args:
      fun: any function that JAX can trace.
      edits: {address: function}. The function is given the value (a tree where the
        address selects a tree) and returns one of the same structure, shapes and
        dtypes; for an operation, it is given the operation and its operands.

    Returns:
      A function with `fun`'s signature.

    Raises:
      AddressError: an address matches nothing, or more than one kind of thing.
      TypeError: a function changes a structure, shape or dtype.
      ValueError: the value lies in the body of a custom rule, or in a part whose
        derivative has already been taken.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> f = lambda x: sg.name(x**2, "h") * 3.0
        >>> print(sg.edit(f, {"h": lambda h: h + 1.0})(2.0))
        15.0

    Reference:
      Springenberg et al. (2015), "Striving for Simplicity": guided backpropagation is
      `edit` at `sg.op("relu")`.
    """
    require_function(fun, "edit")
    _require_edits(edits)
    keys = ", ".join(map(repr, edits))
    called = f"edit({function_name(fun)}, {{{keys:.80}}})"
    addresses = addresses_in(list(edits), called, "addresses")

    @public
    @functools.wraps(fun)
    def edited(*args: P.args, **kwargs: P.kwargs) -> T:
        traced = refusing(trace(fun, args, kwargs), called)
        wanted = dict.fromkeys(addresses, Wanted(rules=False, taken=False, traced=True))
        program = look_up(traced, addresses, called, wanted)
        traced = program.traced
        refuse_rules(program, addresses, called)
        refuse_differentiated(program, addresses, function_name(fun), called)
        functions: dict[int, Callable[..., Any]] = {}
        for address in addresses:  # "h" and `sg.point("h")` are alike, and two edits
            places = program.targets_of([address]) - functions.keys()
            functions.update((k, edits[address]) for k in sorted(places)[:1])
        leaves = list(traced.leaves)
        for address in addresses:
            _edit_places(program, address, "argument", leaves, edits[address])
        none = [None] * len(program.plan.found)
        run = Rewriter(Actions(edits=functions)).run
        out, _ = run(program.plan, leaves, none, None)
        for address in addresses:
            _edit_places(program, address, "output", out, edits[address])
        return arrays_at(traced.output, {"output": out, "argument": leaves})

    return edited


@public
def perturb(
    fun: Callable[..., T], names: Address | Iterable[Address]
) -> Callable[..., T]:
    """Add a perturbation to each named value, for any JAX transform to differentiate.

    Forward: as if the source read `h = h + perturbation` there; `fun`'s bit for bit,
    and no instruction more, where the perturbation is known to be zero.
    Backward: to the perturbation goes the cotangent of the value, to every order and
    in forward mode too.

    Args:
      fun: any function that JAX can trace.
      names: an address or several.

    Returns:
      A function of (perturbations, *args): a dict {address: an array like the value},
      structured as `capture` returns the values. A PRNG key stays as it is: its
      perturbation is zeros.

    Raises:
      AddressError: an address matches nothing, or more than one kind of thing.
      TypeError: a perturbation has another structure, shape or dtype than its value.
      ValueError: a value lies in a `while_loop` or in the body of a custom rule.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: sg.name(x**2, "h") ** 3
        >>> print(jax.hessian(sg.perturb(f, "h"))({"h": 0.0}, 1.0)["h"]["h"])
        6.0
        >>> print(sg.perturb(f, "h")({"h": 1.0}, 1.0))
        8.0
    """
    require_function(fun, "perturb")
    called = f"perturb({function_name(fun)}, {shown(names)})"
    addresses = addresses_in(_as_list(names), called, "names")

    @public
    def perturbed(perturbations: Mapping[Address, Any], *args: Any, **kwargs: Any) -> T:
        require_keys(perturbations, addresses, called)
        traced = refusing(trace(fun, args, kwargs), called)
        wanted = dict.fromkeys(addresses, Wanted(loops=False, rules=False))
        program = look_up(traced, addresses, called, wanted)
        refuse_loops(program, addresses, called)
        refuse_rules(program, addresses, called)
        refuse_factors(program, addresses, called)
        traced = program.traced
        given = perturbations_by_place(program, addresses, perturbations, called)

        def perturbed_at(kind: str, values: list[Any]) -> list[Any]:
            pairs = ((x, given.get(Place(kind, k))) for k, x in enumerate(values))
            return [x if p is None else shift(x, p) for x, p in pairs]

        # An argument is shifted where it comes in, a value inside where it is made.
        leaves = perturbed_at("argument", traced.leaves)
        inside = [given.get(Place("point", k)) for k in range(len(program.plan.found))]
        run = Rewriter(Actions(once=False)).run
        out = perturbed_at("output", run(program.plan, leaves, inside, None)[0])
        return arrays_at(traced.output, {"output": out})

    return perturbed


def _require_edits(edits: Any) -> None:
    """Refuse what is no dict of functions."""
    fits = isinstance(edits, Mapping) and all(map(callable, edits.values()))
    if not fits:
        raise wrong(
            TypeError,
            "edit(fun, edits)",
            "edits are a dict {address: function of the value there}",
            shown(edits),
            'sg.edit(fun, {"h": lambda h: h})',
        )


def _as_list(names: Any) -> list[Any]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        return [names]
    return list(names)


def _edit_places(
    program: LookedUp, address: Address, kind: str, values: list[Any], function: Any
) -> None:
    """Apply an edit to each argument or output that its address selects."""
    for path, tree in program.matched[address].places.items():
        places = [v for v in jax.tree.leaves(tree) if isinstance(v, Place)]
        if not places:
            raise wrong(
                TypeError,
                f'edit of "{path}"',
                "an edit must be of an array or a float",
                "a Python value, which is not traced"
                if jax.tree.leaves(tree)
                else "a tree without leaves",
                "a call with that value instead",
            )
        if places[0].kind != kind:
            continue
        old = arrays_at(tree, {kind: values})
        with _jax.at_width_of(*jax.tree.leaves(old)):
            new = function(old)
        require_same_tree(new, old, f'edit of "{path}"')
        for place, x in zip(jax.tree.leaves(tree), jax.tree.leaves(new), strict=True):
            if isinstance(place, Place):
                values[place.index] = same_type(x, values[place.index], path, "")
            else:
                kept(place.value, x, path)
