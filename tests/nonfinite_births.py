"""Nan and inf by where they come from, what hides them and what is around them.

Each function is written anew of three lines: one that it comes in at, one that hides it
from the value or does not, and the context. The comments mark what a report must name.
"""

import importlib.util
import itertools
import sys

import jax
import jax.numpy as jnp
from jax import lax
from programs import f32

NAN, INF = float("nan"), float("inf")

# name: what is computed of w and x, and an x; the second entry is the one that matters.
BIRTHS = {
    "argument": ("h = w * x  # born, factor", (1.0, NAN, 2.0)),
    "infinite argument": ("h = w * x  # born, factor", (1.0, INF, 2.0)),
    "constant": ("h = w * x * CONSTANT  # born, factor", (1.0, 3.0, 2.0)),
    "forward": ("y = jnp.log(x)  # born\n    h = w * y  # factor", (1.0, 0.0, 2.0)),
    "forward nan": ("y = x / x  # born\n    h = w * y  # factor", (1.0, 0.0, 2.0)),
    "backward": ("h = jnp.sqrt(w * x)  # born", (1.0, 0.0, 2.0)),
}
HIDINGS = {
    "nothing": "h",
    "where": "jnp.where(keep(x), h, 0.0)",
    "slice": "h[2:]",
    "nan_to_num": "jnp.nan_to_num(h, nan=0.0, posinf=0.0, neginf=0.0)",
    "mask of zeros": "h * jnp.float32(keep(x))",
    "times zero": "x[0] + 0.0 * h",
    "bias": "x[0] * jax.nn.softmax(h + jnp.where(keep(x), 0.0, -jnp.inf))",
    "min and max": "jnp.maximum(jnp.minimum(h, 5.0), -5.0)",
    "overwritten": "h.at[1].set(0.0)",
    "used before": "jnp.where(keep(x), jnp.exp(h), 0.0)",
}
HEAD = """\
import jax
import jax.numpy as jnp

CONSTANT = jnp.array([1.0, jnp.nan, 2.0], jnp.float32)


def keep(x):
    return jnp.isfinite(x) & (x != 0) & (jnp.arange(3) != 1)
"""
# Where an infinity that was handed in turns to nan elsewhere than where it comes in.
TURNS = ("times zero", "bias")


def name_of(birth, hiding):
    return f"{birth}_{hiding}".replace(" ", "_")


def written(folder):
    """Write the functions down, and import them."""
    text = HEAD
    for birth, hiding in itertools.product(BIRTHS, HIDINGS):
        comes, returned = BIRTHS[birth][0], HIDINGS[hiding]
        text += f"\n\ndef {name_of(birth, hiding)}(w, x):\n    {comes}\n"
        text += f"    return jnp.sum({returned})  # hides\n"
    path = folder / "births.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("nonfinite_births_written", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# Contexts -----------------------------------------------------------------------------


def plain(f):
    return f


def scan(f):
    def scanned(w, xs):
        step = lambda total, x: (total + f(w, x), None)
        return lax.scan(step, jnp.float32(0.0), xs)[0]

    return scanned


def vmap(f):
    return lambda w, xs: jnp.sum(jax.vmap(f, (None, 0))(w, xs))


def cond(f):
    return lambda w, x: lax.cond(w > 0, f, lambda w, x: w, w, x)


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))

    def around(w, x):
        return g(w, x)  # call

    return around


CONTEXTS = {
    "plain": plain,
    "jit": jax.jit,
    "scan": scan,
    "remat": jax.checkpoint,
    "vmap": vmap,
    "cond": cond,
    "custom_jvp": custom_jvp,
}
FINE = f32(1.0, 2.0, 3.0)


def arguments(birth, context):
    """Return w and x; of several x it is the third that matters."""
    bad = f32(*BIRTHS[birth][1])
    rows = jnp.stack([FINE, FINE, bad, FINE])
    return jnp.float32(1.0), rows if context in ("scan", "vmap") else bad


def table():
    """All births with all hidings, and each of both in each of the contexts."""
    cells = [(*cell, "plain") for cell in itertools.product(BIRTHS, HIDINGS)]
    for shift, context in enumerate(list(CONTEXTS)[1:]):
        births = itertools.islice(itertools.cycle(BIRTHS), shift, None)
        cells += [(b, h, context) for b, h in zip(births, HIDINGS, strict=False)]
    return cells
