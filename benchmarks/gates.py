"""(e) Each gate, forward and backward, against hand-written JAX and today's libraries.

The loss is sum(sin(gate(x)) * x), so that there is work on both sides of the gate. Both
programs are compiled for the same input; instructions, flops and bytes are XLA's own
figures for the optimized program.
"""

import importlib.util

import jax
import jax.numpy as jnp
import optax
from jax import lax
from measure import repeated, side_by_side
from programs import instructions

import stopgrad_jax as sg

if importlib.util.find_spec("rlax"):
    import rlax  # here, since it cannot be imported after TensorFlow
else:
    rlax = None

SIZES = (10**3, 10**6, 10**8)


def by_hand(pull):
    """Write the gate as a custom_vjp."""

    @jax.custom_vjp
    def gate(x, p):
        return x

    gate.defvjp(lambda x, p: (x, p), lambda p, ct: (pull(ct, p), None))
    return gate


def _norm(ct, p):
    return ct * jnp.minimum(1.0, p / jnp.linalg.norm(ct))


def _optax_norm(ct, p):
    return optax.clip_by_global_norm(p).update(ct, optax.EmptyState())[0]


@jax.custom_vjp
def _rounded(x):
    return jnp.round(x)


_rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (ct,))


def _textbook(x, p):
    return x + lax.stop_gradient(jnp.round(x) - x)


def _pass(ct, out, x):
    return (ct,)


def pairs():
    """Name -> (ours, the other)."""
    clip = lambda x, p: sg.clip_gradient(x, -p, p)
    optax_gate = lambda x, p: sg.transform_gradient(x, optax.clip_by_global_norm(p))
    ste = lambda x, p: sg.straight_through(jnp.round)(x)
    out = {
        "scale": (sg.scale_gradient, by_hand(lambda ct, p: ct * p)),
        "reverse": (lambda x, p: sg.reverse_gradient(x), by_hand(lambda ct, p: -ct)),
        "reverse, textbook": (
            lambda x, p: sg.reverse_gradient(x),
            lambda x, p: 2 * lax.stop_gradient(x) - x,
        ),
        "mask": (
            lambda x, p: sg.mask_gradient(x, p > 0),
            by_hand(lambda ct, p: jnp.where(p > 0, ct, 0.0)),
        ),
        "clip": (clip, by_hand(lambda ct, p: jnp.clip(ct, -p, p))),
        "norm": (sg.clip_gradient_norm, by_hand(_norm)),
        "norm, optax": (sg.clip_gradient_norm, by_hand(_optax_norm)),
        "transform (optax)": (optax_gate, by_hand(_optax_norm)),
        "nonfinite": (
            sg.replace_nonfinite_gradient,
            by_hand(lambda ct, p: jnp.where(jnp.isfinite(ct), ct, p)),
        ),
        "straight_through": (ste, lambda x, p: _rounded(x)),
        "straight_through, textbook": (ste, _textbook),
        "with_backward": (
            lambda x, p: sg.with_backward(jnp.round, _pass)(x),
            lambda x, p: _rounded(x),
        ),
    }
    if rlax:
        out["clip, rlax"] = clip, lambda x, p: rlax.clip_gradient(x, -p, p)
    if importlib.util.find_spec("equinox"):
        out["straight_through, equinox"] = ste, lambda x, p: _equinox()(x)
    return out


def _equinox():
    import equinox as eqx

    @eqx.filter_custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.def_fwd(lambda perturbed, x: (jnp.round(x), None))
    rounded.def_bwd(lambda residuals, ct, perturbed, x: ct)
    return rounded


def rows(sizes=SIZES):
    """One row for each pair and size."""
    for size in sizes:
        x, p = jnp.linspace(-3.0, 3.0, size), jnp.float32(0.3)
        for name, sides in pairs().items():
            ours, theirs = (_step(gate) for gate in sides)
            times = {10**3: 3000, 10**6: 10}.get(size, 1)
            rounds = 5 if size < 10**8 else 3
            row = side_by_side(
                repeated(ours, x, p, times=times),
                repeated(theirs, x, p, times=times),
                rounds=rounds,
            )
            row["instructions"] = instructions(ours, x, p), instructions(theirs, x, p)
            for figure in ("flops", "bytes accessed"):
                row[figure] = tuple(
                    side.lower(x, p).compile().cost_analysis().get(figure, 0.0)
                    for side in (ours, theirs)
                )
            yield f"e. {name}, {size:.0e} elements", row


def _step(gate):
    loss = lambda x, p: jnp.sum(jnp.sin(gate(x, p)) * x)
    return jax.jit(jax.value_and_grad(loss))
