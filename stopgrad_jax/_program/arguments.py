"""Check arrays that are given against the places that they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import RETURN, Address, nodes
from stopgrad_jax._checks import shown
from stopgrad_jax._errors import quoted, type_of, wrong

from .lookup import LookedUp
from .trace import Place, Traced


def default_ys(traced: Traced, has_aux: bool, called: str) -> Any:
    """Places of the one array that a function returns; first of two with has_aux."""
    output = traced.output
    if has_aux:
        if not (isinstance(output, tuple) and len(output) == 2):
            raise wrong(
                TypeError,
                called,
                f"with has_aux, {traced.name} must return (y, aux)",
                f"{jax.tree.structure(output)}",
                "return y, aux",
            )
        output = output[0]
    places = [v for v in jax.tree.leaves(output) if isinstance(v, Place)]
    if len(places) != 1:
        values = [p for p, v in nodes(output, RETURN) if isinstance(v, Place)]
        one = f'ys="{values[0]}" for one, ys="return" for the sum' if values else ""
        raise wrong(
            TypeError,
            called,
            f"{traced.name} must return one array, or ys must say which",
            f"{len(places)} arrays: {quoted(values)}",
            one or "return the array that is to be differentiated",
        )
    return output


def cotangents(
    program: LookedUp, y_tree: Any, grad_ys: Any, called: str
) -> list[tuple[Place, Any]]:
    """Pair each y that can be differentiated with its cotangent; None means ones.

    `grad_ys` is structured like the tree of places, or has None in place of a part.
    """
    given, structure = jax.tree.flatten(grad_ys, is_leaf=lambda x: x is None)
    try:
        trees = structure.flatten_up_to(y_tree)
    except ValueError as error:
        raise wrong(
            TypeError,
            called,
            "grad_ys must be structured like ys, None entries apart",
            f"{structure} for {jax.tree.structure(y_tree)}",
            "one cotangent, or None, for each y",
        ) from error
    pairs = []
    for ct, tree in zip(given, trees, strict=True):
        if ct is not None and not isinstance(tree, Place):
            raise wrong(
                TypeError,
                called,
                "grad_ys must be structured like ys",
                f"one entry where the y is a tree, {jax.tree.structure(tree)}",
                "a tree of cotangents there, or None for ones",
            )
        for y in jax.tree.leaves(tree):
            if isinstance(y, Place):
                aval = program.types[y]
                checked = _ones(aval, called) if ct is None else _like(ct, aval, called)
                # An integer has no cotangent, but one that is given for it is checked
                # all the same.
                if _jax.is_differentiable(aval):
                    checked = _jax.sharded_as(checked, aval)
                    pairs.append((y, _jax.vary(checked, _jax.varying(aval))))
    return pairs


def _ones(aval: Any, called: str) -> jax.Array:
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        remedy = "a y that is floating point"
        if _jax.is_differentiable(aval):
            remedy = "a y that is its real part or absolute value, or grad_ys"
        raise wrong(
            TypeError,
            called,
            "without grad_ys, ys must be real floating point",
            type_of(aval),
            remedy,
        )
    return _jax.filled(aval, 1)


def _like(ct: Any, aval: Any, called: str) -> jax.Array:
    ct = _jax.number_like(ct, aval)
    if not hasattr(ct, "dtype") or type_of(ct) != type_of(aval):
        raise wrong(
            TypeError,
            called,
            f"this entry of grad_ys must be {type_of(aval)}, like its y",
            type_of(ct) if hasattr(ct, "dtype") else type(ct).__name__,
            _made("jax.numpy.ones_like(y)", aval) + ", or None for ones",
        )
    with _jax.at_width_of(aval):
        return jnp.asarray(ct)


def require_keys(perturbations: Any, addresses: Sequence[Address], called: str) -> None:
    """Refuse what is no dict of perturbations by these addresses."""
    fits = isinstance(perturbations, Mapping) and set(perturbations) == set(addresses)
    if not fits:
        raise wrong(
            TypeError,
            f"{called}(perturbations, *args)",
            f"the perturbations are a dict with keys {quoted(addresses)}, before "
            "the function's arguments",
            shown(perturbations),
            "jax.tree.map(jax.numpy.zeros_like, values) of the values that "
            "sg.capture returns",
        )


def perturbations_by_place(
    program: LookedUp, addresses: Sequence[Address], perturbations: Any, called: str
) -> dict[Place, Any]:
    """Perturbations by the place that they perturb, checked."""
    given: dict[Place, Any] = {}
    for address in addresses:
        tree, mine = program.matched[address].tree, perturbations[address]
        if jax.tree.structure(tree) != jax.tree.structure(mine):
            expected = jax.tree.structure(tree)
            raise _wrong(called, address, f"a tree like {expected}", mine, None)
        for place, p in zip(jax.tree.leaves(tree), jax.tree.leaves(mine), strict=True):
            if not isinstance(place, Place):
                continue
            aval = program.types[place]
            p = _jax.number_like(p, aval)
            if not hasattr(p, "dtype") or type_of(p) != type_of(aval):
                raise _wrong(called, address, type_of(aval), p, aval)
            if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
                _require_zero(p, called, address)  # of which there is no sum
                continue
            with _jax.at_width_of(aval):
                # Two addresses may select one value: it is perturbed by both.
                given[place] = p if place not in given else given[place] + p
    return given


def _require_zero(key: Any, called: str, address: Address) -> None:
    """Refuse what is known to be no zero for a PRNG key, which stays as it is."""
    if _jax.is_traced(key):
        return
    with jax.ensure_compile_time_eval():  # it is known in a `jax.jit`, too
        is_zero = not np.any(np.asarray(jax.random.key_data(key)))
    if not is_zero:
        raise wrong(
            TypeError,
            called,
            f"nothing can be added to a PRNG key: for {address!r} it is zeros",
            f"{type_of(key)} that is not",
            "jax.numpy.zeros_like(key); sg.edit, for another key",
        )


def _wrong(
    called: str, address: Address, expected: str, got: Any, aval: Any
) -> TypeError:
    came = type_of(got) if hasattr(got, "dtype") else str(jax.tree.structure(got))
    made = _made("jax.tree.map(jax.numpy.zeros_like, value)", aval)
    return wrong(
        TypeError,
        called,
        f"the perturbation for {address!r} must be {expected}",
        came,
        f"{made} of the value that sg.capture returns",
    )


def _made(text: str, aval: Any) -> str:
    """Write an expression where it makes a value as wide as this type."""
    return f"with jax.enable_x64(True): {text}" if _jax.is_wider_here(aval) else text
