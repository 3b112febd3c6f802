"""Every way of JAX to hold a function inside another, as wrappers that compose.

A wrapper takes a function (w, x, d) -> (y, aux) of a vector and gives another: `d` is
what is added at the innermost value "h" and `aux` that value, or None both where `h`
is named instead. So one composition is two programs: the named one, and in plain JAX
the one that takes a perturbation by hand and returns the value. `lead` is the number
of axes of scans that `d` and `aux` have inside.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import stopgrad_jax as sg

STEPS = 2  # of a loop; shards and examples too


def named(w, x, d):
    """Compute a layer whose activation has a name."""
    del d
    return sg.name(jnp.tanh(x * w), "h") ** 2 + 0.5 * x, None


def by_hand(w, x, d):
    """Compute the same layer with a perturbation, and return the value too."""
    h = jnp.tanh(x * w) + d
    return h**2 + 0.5 * x, h


def edited(w, x, d):
    """Compute the layer as an edit that triples the activation makes it."""
    del d
    return (3 * jnp.tanh(x * w)) ** 2 + 0.5 * x, None


def _jit(g, lead, place):
    return jax.jit(g)


def _remat(g, lead, place):
    return jax.checkpoint(g)


def _scan(g, lead, place):
    def run(w, x, d):
        step = lambda x, d: g(w, x, d)
        return jax.lax.scan(step, x, d, length=STEPS)

    return run


def _fori_loop(g, lead, place):
    def run(w, x, d):
        if d is not None:  # no ys in a fori_loop
            return _scan(g, lead, place)(w, x, d)
        return jax.lax.fori_loop(0, STEPS, lambda i, x: g(w, x, None)[0], x), None

    return run


def _map(g, lead, place):
    def run(w, x, d):
        rows = x.reshape(STEPS, -1)
        y, aux = jax.lax.map(lambda args: g(w, *args), (rows, d))
        return y.reshape(-1), aux

    return run


def _while(g, lead, place):
    def run(w, x, d):
        body = lambda state: (state[0] + 1, g(w, state[1], None)[0])
        return jax.lax.while_loop(lambda s: s[0] < STEPS, body, (0, x))[1], None

    return run


def _cond(g, lead, place):
    def run(w, x, d):
        return jax.lax.cond(w > -9, g, lambda w, x, d: (x, d), w, x, d)

    return run


def _switch(g, lead, place):
    def run(w, x, d):
        other = lambda w, x, d: (x, d)
        index = (w > -9).astype(jnp.int32)
        return jax.lax.switch(index, [other, g, other], w, x, d)

    return run


def _vmap(g, lead, place):
    def run(w, x, d):
        mapped = jax.vmap(g, (None, 0, lead), (0, lead))
        y, aux = mapped(w, x.reshape(STEPS, -1), d)
        return y.reshape(-1), aux

    return run


def _shard_map(check_vma):
    def wrapper(g, lead, place):
        mesh, axis = place
        spec = P(*[None] * lead, axis)
        return jax.shard_map(
            g,
            mesh=mesh,
            in_specs=(P(), P(axis), spec),
            out_specs=(P(axis), spec),
            check_vma=check_vma,
            axis_names={axis},
        )

    return wrapper


def _pmap(g, lead, place):
    def run(w, x, d):
        mapped = jax.pmap(g, in_axes=(None, 0, lead), out_axes=(0, lead))
        y, aux = mapped(w, x.reshape(STEPS, -1), d)
        return y.reshape(-1), aux

    return run


def _custom_jvp(g, lead, place):
    rule = jax.custom_jvp(lambda w, x, d: g(w, x, d))
    rule.defjvp(lambda primals, tangents: jax.jvp(g, primals, tangents))
    return rule


def _custom_vjp(g, lead, place):
    rule = jax.custom_vjp(lambda w, x, d: g(w, x, d))
    rule.defvjp(lambda w, x, d: jax.vjp(g, w, x, d), lambda pull, ct: pull(ct))
    return rule


WRAPPERS = {
    "jit": _jit,
    "scan": _scan,
    "fori_loop": _fori_loop,
    "map": _map,
    "while": _while,
    "cond": _cond,
    "switch": _switch,
    "remat": _remat,
    "vmap": _vmap,
    "shard_map": _shard_map(True),
    "unchecked": _shard_map(False),
    "pmap": _pmap,
    "custom_jvp": _custom_jvp,
    "custom_vjp": _custom_vjp,
}
LOOPS = ("scan", "fori_loop", "map")  # each puts an axis of steps in front
ROWS = ("map", "vmap", "pmap")  # each takes a part of the vector
SHARDS = ("shard_map", "unchecked")
RULES = ("custom_jvp", "custom_vjp")


def composed(unit, outer, inner):
    """Return (w, x, d) -> (y, aux): the unit in `inner` in `outer`."""
    kind = jax.sharding.AxisType.Auto
    both = outer in SHARDS and inner in SHARDS
    shape, names = ((2, 2), ("d", "m")) if both else ((2,), ("d",))
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    g = WRAPPERS[inner](unit, 0, (None, "m") if both else (mesh, "d"))
    return WRAPPERS[outer](g, int(inner in LOOPS), (mesh, "d"))


def shape_by_hand(n, outer, inner):
    """Shape of `d` for a vector of n entries."""
    parts = [name in (*ROWS, *SHARDS) for name in (outer, inner)]
    shape = [n // STEPS ** sum(parts)]
    for name, lead in ((inner, 0), (outer, int(inner in LOOPS))):
        if name in SHARDS:
            shape[lead] *= STEPS
        elif name in LOOPS:
            shape.insert(0, STEPS)
        elif name in ROWS:
            shape.insert(lead, STEPS)
    return shape


def as_verbs_lay_it_out(x, outer, inner):
    """Lay an array like `d` out as the verbs do.

    Shards are put together on the value's first axis, which may be that of examples,
    and the devices of pmap are shards.
    """
    if outer == "vmap" and inner in (*SHARDS, "pmap"):
        shards = x if inner == "pmap" else x.reshape(STEPS, STEPS, -1)
        return shards.swapaxes(0, 1).reshape(-1, shards.shape[2])
    if "pmap" not in (outer, inner):
        return x
    lead = int((inner if outer == "pmap" else outer) in LOOPS)
    return x.reshape(*x.shape[:lead], -1, *x.shape[lead + 2 :])
