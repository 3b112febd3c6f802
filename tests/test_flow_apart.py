"""Equations of several operands of which each result is of one: a tree handed over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import f32, mesh

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

PARAMS = {
    "dec": f32(0.5, -0.4),
    "enc": f32(0.3, 0.8),
    "n": jnp.array([1, 0]),
    "old": f32(1.0, 2.0),
}


def loss(p):
    h = jax.lax.stop_gradient(p["enc"]) * 0.7
    return jnp.sum((h * p["dec"])[p["n"]] ** 2)


def put(p):
    return jax.device_put(p)


def put_on_one(p):
    return jax.device_put(p, jax.devices()[0])


def put_sharded(p):
    return jax.device_put(p, jax.sharding.NamedSharding(mesh(2), P("d")))


def barrier(p):
    return jax.lax.optimization_barrier(p)


def both(p):
    return jax.lax.optimization_barrier(jax.device_put(p))


def in_jit(p):
    return jax.jit(jax.lax.optimization_barrier)(p)


def in_remat(p):
    return jax.checkpoint(jax.device_put)(p)


def in_scan(p):
    step = lambda p, _: (jax.lax.optimization_barrier(p), None)
    return jax.lax.scan(step, p, None, length=2)[0]


def in_shard_map(p):
    every = jax.shard_map(barrier, mesh=mesh(2), in_specs=P("d"), out_specs=P("d"))
    return every(p)


def in_vmap(p):
    return jax.vmap(jax.lax.optimization_barrier)(p)


def summed(p):
    """One that takes several operands under vmap, and adds along the mapped axis."""
    n = p.pop("n")
    p = jax.vmap(lambda p: jax.lax.psum(p, "i"), axis_name="i")(p)
    return {**p, "n": n}


HANDED = [
    put,
    put_on_one,
    put_sharded,
    barrier,
    both,
    in_jit,
    in_remat,
    in_scan,
    in_shard_map,
    in_vmap,
    summed,
]
PATHS = ["p/dec", "p/enc", "p/old"]


@pytest.mark.parametrize("hand", HANDED, ids=[f.__name__ for f in HANDED])
def test_each_leaf_fares_as_without_it(hand):
    fun = lambda p: loss(hand(dict(p)))
    grads = jax.grad(fun, allow_int=True)(PARAMS)
    known = {path: bool(np.any(grads[path[2:]])) for path in PATHS}
    assert known == {"p/dec": True, "p/enc": False, "p/old": False}
    flow = sg.flow(fun)(PARAMS)
    status = {row.path: row.status for row in flow.inputs}
    rest = {"p/dec": "flows", "p/enc": "cut", "p/old": "unused"}
    assert {path: status[path] for path in PATHS} == rest
    assert [cut.words for cut in flow.cuts] == ["stop_gradient, on purpose"]
    found = dict(zip(PATHS, sg.gradients(fun, PATHS)(PARAMS), strict=True))
    assert {path: found[path] is not None for path in PATHS} == known
    np.testing.assert_allclose(found["p/dec"], grads["dec"], rtol=1e-6)
    sg.assert_gradient(fun, "p/dec")(PARAMS)
    sg.assert_no_gradient(fun, ["p/enc", "p/old"])(PARAMS)
    with pytest.raises(AssertionError, match="not computed from it"):
        sg.assert_gradient(fun, "p/old")(PARAMS)
    with pytest.raises(ValueError, match="p/old: no y is computed from it"):
        sg.gradients(fun, "p/old", unconnected_gradients="error")(PARAMS)


@pytest.mark.parametrize("hand", [put, barrier], ids=["put", "barrier"])
def test_an_integer_beside_is_made_of_an_integer(hand):
    """The index is used, and nothing that carries a gradient is in it."""

    def fun(w, which):
        w, which = hand((w, which))
        return w[which] ** 2

    def rounded(w, x):
        w, which = hand((w, x.astype("int32")))
        return w[which] ** 2

    w = f32(0.4, 0.8)
    assert not sg.flow(fun)(w, 1).cuts
    flow = sg.flow(rounded)(w, 1.0)
    assert [row.status for row in flow.inputs] == ["flows", "cut"]
    assert [cut.inputs for cut in flow.cuts] == [("x",)]
    assert flow.cuts[0].site.expr == 'x.astype("int32")'
    grads = jax.grad(rounded, (0, 1))(w, 1.0)
    assert np.any(grads[0])
    assert grads[1] == 0


@pytest.mark.parametrize("hand", [put, barrier], ids=["put", "barrier"])
@pytest.mark.parametrize("count", [2, 3, 5, 8, 13])
def test_as_many_as_there_are(hand, count):
    values = [f32(k) for k in range(count)]
    for k in range(count):
        flow = sg.flow(lambda xs, k=k: (hand(xs)[k] ** 2).sum())(values)
        found = {i: row for row in flow.inputs for i in _leaves(row, count)}
        flowing = [i for i, row in found.items() if row.status == "flows"]
        assert flowing == [k]
        assert {row.status for row in found.values()} == {"flows", "unused"}


def _leaves(row, count):
    """Numbers of the leaves that a row stands for."""
    _, _, number = row.path.partition("/")
    return [int(number)] if number else range(count)


@pytest.mark.parametrize(
    "fun",
    [
        lambda a, b: sum(map(jnp.sum, jax.lax.sort((a, b), num_keys=1)[1:])),
        lambda a, b: jnp.sum(jax.lax.sort((a, b), num_keys=2)[0]),
        lambda a, b: jnp.linalg.eigh(a[:, None] * b)[0].sum(),
    ],
    ids=["sorted beside", "sorted by both", "eigh"],
)
def test_what_is_of_several_operands_stays_so(fun):
    a, b = f32(0.4, 0.1, 0.9), f32(1.0, 3.0, 2.0)
    grads = jax.grad(fun, (0, 1))(a, b)
    status = [row.status for row in sg.flow(fun)(a, b).inputs]
    for grad, word in zip(grads, status, strict=True):
        assert word == "flows" or not np.any(grad)
        assert word != "unused"  # the order of one decides about the other
