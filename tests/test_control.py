"""Control flow: what is made anew is what was, and its rounds are its run."""

import collections
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import stopgrad_jax as sg
import stopgrad_jax._jax as _jax
from stopgrad_jax._program.control import control
from stopgrad_jax._program.wiring import Extras

pytestmark = pytest.mark.usefixtures("usual_settings")

MESH = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
X = jnp.linspace(-0.8, 0.9, 4)


@jax.custom_jvp
def with_jvp(x):
    return jnp.sin(x)


with_jvp.defjvp(lambda x, t: (with_jvp(x[0]), t[0] * 3.0))


@jax.custom_vjp
def with_vjp(x):
    return jnp.sin(x)


with_vjp.defvjp(lambda x: (with_vjp(x), x), lambda x, ct: (ct * x,))


def sharded(check):
    spec = PartitionSpec("i")

    def body(x):
        return jnp.sin(x) * jax.lax.psum(x, "i")

    return jax.shard_map(
        body, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=check
    )


def fori(x):
    return jax.lax.fori_loop(0, 3, lambda k, c: jnp.sin(c) + k * x, x)


def until(x):
    return jax.lax.while_loop(
        lambda c: jnp.sum(c[0]) < 8, lambda c: (c[0] * c[1], c[1]), (x + 1.0, 1.0 + x)
    )[0]


def scanned(x):
    def step(carry, y):
        return jnp.sin(carry) * x, (carry + y, {"twice": 2.0 * y})

    return jax.lax.scan(step, x, jnp.stack([x, x + 1, x + 2]), reverse=True)


def chosen(x):
    branches = [jnp.sin, jnp.cos, lambda x: x * x]
    return jax.lax.switch(jnp.argmax(x), branches, x)


PROGRAMS = {
    "jit": jax.jit(lambda x: jnp.sin(x) * x),
    "remat": jax.checkpoint(lambda x: jnp.sin(x) * jnp.cos(x)),
    "remat with a policy": jax.checkpoint(
        lambda x: jnp.sin(x) @ jnp.cos(x), policy=jax.checkpoint_policies.dots_saveable
    ),
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "scan": scanned,
    "scan of no round": lambda x: jax.lax.scan(
        lambda c, _: (jnp.sin(c), c * x), x, None, length=0
    ),
    "map": lambda x: jax.lax.map(lambda y: jnp.sin(y) * x, x),
    "fori": fori,
    "while": until,
    "cond": lambda x: jax.lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x),
    "switch": chosen,
    "shard_map": sharded(True),
    "shard_map without check_vma": sharded(False),
}
FORWARD_ONLY = {"while"}
DEEP = {f"{name} under vmap": jax.vmap(f) for name, f in PROGRAMS.items()}


def again(fun, x, run):
    """Evaluate a function with each equation that holds programs made anew by `run`."""
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(x)

    def evaluated(jaxpr, consts, operands):
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= zip(jaxpr.invars, operands, strict=True)

        def read(atom):
            return atom.val if isinstance(atom, _jax.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inner, values = control(eqn), [read(atom) for atom in eqn.invars]
            out = run(inner, values, evaluated) if inner else _jax.bind(eqn, *values)
            env |= zip(eqn.outvars, out, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    out = evaluated(*_jax.opened(closed), [x])
    return jax.tree.unflatten(jax.tree.structure(shape), out)


def identity(inner, values, evaluated):
    def call(k, operands, given, shared):
        body = inner.bodies[k]
        return evaluated(body.jaxpr, body.consts, operands), []

    return inner.run(call, values)[0]


def by_rounds(inner, values, evaluated):
    """Drive the rounds, as a stepper does."""
    if inner.rule or inner.on_devices:  # it keeps its rule; it needs its devices
        return identity(inner, values, evaluated)
    rounds = inner.rounds(values, lambda x, step: x[step], np.asarray)
    results = None
    while True:
        try:
            now = rounds.send(results)
        except StopIteration as end:
            ends = end.value
            break
        body = inner.bodies[now.body]
        results = evaluated(body.jaxpr, body.consts, now.operands)
    out = []
    for k, values in enumerate(ends):
        aval = inner.eqn.outvars[k].aval
        empty = jnp.zeros(aval.shape, aval.dtype)
        whole = jnp.stack(values) if values else empty
        out.append(whole if inner.is_stacked(k) else values[0])
    return out


def anew(fun):
    return lambda x: again(fun, x, identity)


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 3e-7), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


EVERY = {**PROGRAMS, **{k: v for k, v in DEEP.items() if "policy" not in k}}


@pytest.mark.parametrize("name", EVERY)
def test_made_anew_it_keeps_value_and_derivatives(name):
    fun = EVERY[name]
    x = jnp.stack([X, X[::-1] * 1.1]) if name in DEEP else X
    t = jnp.cos(x)
    same(jax.jit(anew(fun))(x), jax.jit(fun)(x))
    if "custom_vjp" not in name:
        forward = [lambda x, f=f: jax.jvp(f, [x], [t]) for f in (anew(fun), fun)]
        same(*(jax.jit(f)(x) for f in forward))
    if name.split(" under")[0] in FORWARD_ONLY:
        return

    def loss(f):
        return lambda x: sum(jnp.sum(jnp.cos(y)) for y in jax.tree.leaves(f(x)))

    # What a scan closes over is summed in another order.
    close(*(jax.jit(jax.grad(loss(f)))(x) for f in (anew(fun), fun)))
    same(*(jax.jit(jax.vmap(f))(jnp.stack([x, x * 0.9])) for f in (anew(fun), fun)))


@pytest.mark.parametrize("name", EVERY)
def test_made_anew_it_compiles_to_the_same_operations(name):
    fun = EVERY[name]
    x = jnp.stack([X, X[::-1] * 1.1]) if name in DEEP else X

    def operations(f):
        text = jax.jit(f).lower(x).compile().as_text()
        return collections.Counter(re.findall(r"= \S+ ([a-z-]+)\(", text))

    mine, theirs = operations(anew(fun)), operations(fun)
    if name == "cond":  # `switch`, which any number of branches takes, clamps its index
        theirs.update(clamp=1, constant=2)
    assert mine == theirs


@pytest.mark.parametrize("name", EVERY)
def test_its_rounds_are_its_run(name):
    fun = EVERY[name]
    if "while under" in name or "switch under" in name:
        pytest.skip("a stepper follows one example at a time")
    x = jnp.stack([X, X[::-1] * 1.1]) if name in DEEP else X
    close(again(fun, x, by_rounds), fun(x))


@pytest.mark.parametrize("name", ["scan", "fori", "while", "switch", "shard_map"])
def test_a_value_may_be_a_tree_of_arrays(name):
    """Two runs at once: what decides is picked, all else goes along."""
    eqns = jax.make_jaxpr(PROGRAMS[name])(X).eqns
    inner = next(c for eqn in eqns if (c := control(eqn)) and not c.is_call)

    def call(k, operands, given, shared):
        body = inner.bodies[k]
        both = [[value[j] for value in operands] for j in (0, 1)]
        runs = [_jax.evaluate(body.jaxpr, body.consts, one) for one in both]
        return [list(pair) for pair in zip(*runs, strict=True)], []

    types = [atom.aval for atom in inner.eqn.invars]
    operands = [
        jnp.full(t.shape, 1.5 if t.dtype == jnp.float32 else 1, t.dtype) for t in types
    ]
    moved = [x * 1.6 if x.dtype == jnp.float32 else x for x in operands]
    pairs = [list(pair) for pair in zip(operands, moved, strict=True)]
    out, left = inner.run(call, pairs, Extras(lead=lambda value: value[0]))
    assert left == []
    own = [_jax.bind(inner.eqn, *given) for given in (operands, moved)]
    same([x[0] for x in out], own[0])
    if name == "while":  # the first of the two decides on both
        assert not np.array_equal(out[0][1], own[1][0])
    else:
        same([x[1] for x in out], own[1])


def test_a_primitive_with_rules_of_its_own_is_one_operation():
    """JAX's coming primitives: their programs stay closed, their rules are asked."""
    hijax = pytest.importorskip("jax.experimental.hijax")
    base = getattr(hijax, "HiPrim", None)
    if base is None:
        pytest.skip("before JAX 0.12")

    class Product(base):
        def __init__(self, x, y):
            self.in_avals, self.out_aval, self.params = (x, y), x, {}
            super().__init__()

        def expand(self, x, y):
            return jnp.sin(x) * y

        def vjp_fwd(self, _, x, y):
            return self(x, y), (x, y)

        def vjp_bwd_retval(self, res, ct):
            return ct * res[1] * 3.0, jnp.zeros_like(ct)  # by y it says zero

    def loss(x, y):
        h = Product(jax.typeof(x), jax.typeof(y))(x, y)
        return jnp.sum(h**2)

    flow = sg.flow(loss)(X, X)
    assert [row.status for row in flow.inputs] == ["flows", "cut"]
    h = jnp.sin(X) * X
    close(sg.gradients(loss, "x")(X, X), 2 * h * X * 3.0)
    close(sg.gradients(loss, sg.var("h"))(X, X), 2 * h)
    edited = sg.edit(loss, {sg.var("h"): jnp.cos})
    close(edited(X, X), jnp.sum(jnp.cos(h) ** 2))
    with pytest.raises(sg.AddressError, match="got: "):
        sg.capture(loss, sg.op("sin"))(X, X)


NAMES = (
    "scan while cond jit closed_call remat2 shard_map custom_jvp_call custom_vjp_call"
)


def test_no_other_file_knows_a_primitive_by_its_name():
    package = pathlib.Path(sg.__file__).parent
    quoted = re.compile("|".join(f"[\"']{name}[\"']" for name in NAMES.split()))
    know = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if quoted.search(path.read_text())
    }
    doors = {name for name in know if name.startswith("_jax")}
    assert know - doors == {"_program/control.py"}
