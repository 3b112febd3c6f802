"""A function's result with the backward pass that a user gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax
from stopgrad_jax._errors import beats, type_of, wrong
from stopgrad_jax._trees import Split
from stopgrad_jax._where import leaves_like

from .primitive import gate
from .rule import Rule, program
from .trees import require_gradient


def attached(
    out: Any,
    args: tuple,
    keywords: dict,
    backward: Callable[..., Any],
    called: str,
    of: str,
) -> Any:
    """Return `out` with the derivative that `backward` gives it, by the arguments.

    `called` and `of` are for messages: the call, and the function's own name.
    """
    leaves, structure = jax.tree.flatten(out)
    require_gradient(leaves, f"{called}: the result")
    learns = Split([_jax.carries_gradient(x) for x in leaves])
    values = list(map(jnp.asarray, learns.chosen(leaves)))
    # All that the backward pass reads and that may be traced is handed to the gate:
    # it runs when the trace in which it was written may have ended.
    known, read = jax.tree.flatten((args, keywords, leaves))
    handed = Split(
        [_jax.carries_gradient(x) or isinstance(x, jax.Array) for x in known]
    )
    arrays = list(map(jnp.asarray, handed.chosen(known)))
    connected: list[int] = []  # which leaves of the arguments get a cotangent

    def flat(*operands: Any) -> list[Any]:
        count = len(values)
        new, given, cts = operands[:count], operands[count:-count], operands[-count:]
        args, keywords, old = read.unflatten(handed.joined(given, known))
        out = structure.unflatten(learns.joined(new, old))
        ct = structure.unflatten(learns.joined(cts, [None] * len(leaves)))
        pulled = backward(ct, out, *args, **keywords)
        pairs = list(enumerate(_cotangents(pulled, args, called)))
        connected[:] = [k for k, ct in pairs if ct is not None]
        return [ct for _, ct in pairs if ct is not None]

    # Cotangents are typed as the values are: these stand for them while it is traced.
    pull, closed_over = program(flat, *values, *arrays, *values)
    rule = Rule(
        "with_backward",
        pull,
        reads_values=True,
        typed=True,
        forward=_no_forward_mode(called),
        only_sources=_closed_over(called),
        of=of,
    )
    flat_args = jax.tree.leaves(args)
    sources = [jnp.asarray(flat_args[k]) for k in connected]
    gated = gate(values, sources, [*arrays, *closed_over], rule)
    return structure.unflatten(learns.joined(gated, leaves))


def _cotangents(pulled: Any, args: tuple, called: str) -> list[Any]:
    """Check what a backward pass returned: a cotangent or None for each leaf."""
    if not isinstance(pulled, tuple | list) or len(pulled) != len(args):
        came = _kind(pulled)
        raise wrong(
            TypeError,
            called,
            f"backward returns a tuple of {len(args)}, one for each argument",
            came,
            f"return ({', '.join(['ct', 'None', 'None'][: len(args)])},)",
        )
    out = []
    for number, (ct, arg) in enumerate(zip(pulled, args, strict=True)):
        try:
            cts = leaves_like(ct, arg)
        except ValueError:
            raise wrong(
                TypeError,
                called,
                f"the cotangent of argument {number} is a tree like it, "
                f"{jax.tree.structure(arg)}, with None where nothing flows",
                str(jax.tree.structure(ct)),
                "jax.tree.map(..., argument), or None for the whole",
            ) from None
        pairs = zip(cts, jax.tree.leaves(arg), strict=True)
        out += [_cotangent(c, leaf, number, called) for c, leaf in pairs]
    return out


def _cotangent(ct: Any, leaf: Any, number: int, called: str) -> Any:
    # float0 is the cotangent that JAX itself gives to an integer.
    if ct is None or getattr(ct, "dtype", None) == jax.dtypes.float0:
        return None
    if not _jax.carries_gradient(leaf):
        raise wrong(
            TypeError,
            called,
            f"None for a leaf of argument {number} that carries no gradient",
            f"{ct!r:.60}",
            "None",
        )
    leaf = jnp.asarray(leaf)
    if not jax.tree.leaves(ct):  # an empty container
        raise wrong(
            TypeError,
            called,
            f"the cotangent of argument {number} is {type_of(leaf)}, as its value",
            f"{ct!r:.60}, which holds no array",
            "None, where nothing flows",
        )
    ct = jnp.asarray(ct)
    # What is computed from Python numbers takes the value's dtype, as everywhere in
    # JAX; but a cast from complex to real would drop a part without a word.
    real = jnp.iscomplexobj(leaf) or not jnp.iscomplexobj(ct)
    if getattr(ct, "weak_type", False) and real:
        ct = ct.astype(leaf.dtype)
    if (ct.shape, ct.dtype) != (leaf.shape, leaf.dtype):
        raise wrong(
            TypeError,
            called,
            f"the cotangent of argument {number} is {type_of(leaf)}, as its value",
            type_of(ct),
            f"ct.astype({str(leaf.dtype)!r})"
            if ct.shape == leaf.shape
            else f"a cotangent of shape {leaf.shape}",
        )
    return ct


def _kind(pulled: Any) -> str:
    if isinstance(pulled, tuple | list):
        return f"{len(pulled)}"
    return type_of(pulled) if hasattr(pulled, "dtype") else type(pulled).__name__


def _no_forward_mode(called: str) -> str:
    return beats(
        called,
        "reverse mode: it has a backward pass and no forward one",
        "forward mode (jvp, jacfwd, linearize called, or a Hessian by forward over "
        "reverse)",
        "jax.vjp, jax.grad, jax.jacrev, jax.jacrev of jax.grad; or jax.custom_jvp",
    )


def _closed_over(called: str) -> str:
    return beats(
        called,
        "a derivative by its arguments",
        "one by a value that the function closes over (or takes by keyword only), "
        "for which its backward pass has no cotangent",
        "that value as a positional argument, or sg.stop_gradient of it",
    )
