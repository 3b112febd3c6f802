"""(g) `flow` against tracing `jax.grad`, and how long a picture takes."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
from measure import seconds, side_by_side

import stopgrad_jax as sg
from stopgrad_jax._flow.dot import to_dot
from stopgrad_jax._flow.model import Edge, Picture, Step
from stopgrad_jax._flow.render import to_svg
from stopgrad_jax._flow.shrink import merged

WIDTH = 8


def block(p, x):
    """One layer of a small transformer, as its author would write it."""
    q, k, v = (x @ p[name] for name in ("q", "k", "v"))
    scores = q @ k.T / WIDTH**0.5
    attention = jax.nn.softmax(scores, axis=-1) @ v
    x = x + attention @ p["o"]
    x = x / jnp.sqrt(1e-6 + jnp.mean(x**2, axis=-1, keepdims=True))
    hidden = jax.nn.relu(x @ p["up"])
    return x + hidden @ p["down"]


def transformer(size, scanned):
    """Return a loss of about `size` equations, all its layers told apart or scanned."""
    shapes = dict.fromkeys(("q", "k", "v", "o", "up", "down"), (WIDTH, WIDTH))
    layer = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    x = jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)
    layers = max(1, size // 30)

    def unrolled(params, x):
        for p in params:
            x = block(p, x)
        return jnp.mean(x**2)

    def in_scan(params, x):
        x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, params)
        return jnp.mean(x**2)

    if not scanned:
        return unrolled, ([layer] * layers, x)
    stack = {
        k: jax.ShapeDtypeStruct((layers, *s), jnp.float32) for k, s in shapes.items()
    }
    return in_scan, (stack, x)


def _flow(function, args):
    return sg.flow(lambda *a: function(*a))(*args)


def _grad(function, args):
    return jax.make_jaxpr(jax.grad(lambda *a: function(*a)))(*args)


def _peak(fun):
    tracemalloc.start()
    fun()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def looking(sizes=(1_000, 10_000, 100_000)):
    """Time and peak memory of Python objects, on both sides."""
    for scanned in (False, True):
        for size in sizes:
            function, args = transformer(size, scanned)
            sides = [functools.partial(s, function, args) for s in (_flow, _grad)]
            large = size > 10_000 and not scanned
            row = side_by_side(*sides, rounds=1 if large else 3, warm=not large)
            if not large:
                memory = [_peak(side) for side in sides]
                row |= {"MiB": memory[0], "their MiB": memory[1]}
            kind = "scanned" if scanned else "unrolled"
            yield f"g. flow, {kind} transformer, {size} equations", row


def drawing(sizes=(10, 50, 200, 1000)):
    """Lay out a picture of so many steps in a row, merged where there are too many."""
    for size in sizes:
        steps = [
            Step(k, "cut" if k % 10 == 9 else "step", f"h{k}") for k in range(size)
        ]
        edges = [Edge(k, k + 1, "flow") for k in range(size - 1)]
        edges += [Edge(k, k + 3, "value") for k in range(0, size - 3, 5)]
        picture = Picture("steps in a row", tuple(steps), tuple(edges), ())
        drawn = merged(picture)
        time = seconds(lambda drawn=drawn: to_svg(to_dot(drawn), "steps"))
        yield f"g. draw {size} steps", {"drawn": len(drawn.steps), "seconds": time}


def rows():
    """All of it."""
    yield from looking()
    yield from drawing()
