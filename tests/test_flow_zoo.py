"""`flow` of whatever JAX can trace: it never crashes, and its verdict is right."""

import functools
import json

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from programs import EVERYWHERE, f32, mesh

import stopgrad_jax as sg

pytestmark = [
    pytest.mark.usefixtures("usual_settings"),
    # arrays that were made at import, when the whole suite runs with x64
    pytest.mark.filterwarnings("ignore:Explicitly requested dtype"),
]

P = jax.sharding.PartitionSpec
SPLIT = P("d")
S, V = f32(0.7)[0], f32(0.3, 1.2, -0.8)
M = jnp.eye(3, dtype=jnp.float32) * 2 + 0.1
E = jnp.arange(8.0, dtype=jnp.float32)
KEY = jax.random.key(0)
stop, policies = jax.lax.stop_gradient, jax.checkpoint_policies
like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)


def look_at_all(flow, address):
    """Make every view, and return all that is printed."""
    pages = [flow, flow.source(), flow.explain()]
    focus = flow.focus(address)
    between = flow.between(address, "return")
    for view in (flow, focus, between):
        view.to_dot(), view.to_mermaid()
    json.dumps(flow.to_dict())
    pages += [flow.explain(address), focus, between]
    return "\n".join(map(str, pages))


def rooted(x):
    def solve(f, z):
        return jax.lax.fori_loop(0, 8, lambda i, z: z - f(z) / (2 * z), z)

    divide = lambda g, y: y / g(jnp.ones_like(y))
    return jax.lax.custom_root(lambda z: z**2 - x, jnp.ones_like(x), solve, divide)


def solved(a, b):
    return jax.lax.custom_linear_solve(
        lambda x: a * x, b, lambda _, b: b / a, symmetric=True
    )


@custom_vmap
def batched(x):
    return jnp.sin(x)


batched.def_vmap(lambda n, b, x: (jnp.sin(x) + stop(x), True))


def kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2


def pallas(x):
    return pl.pallas_call(kernel, out_shape=like(x), interpret=True)(x)


def printed(x):
    jax.debug.print("{x}", x=x)
    jax.debug.callback(lambda x: None, x)
    return x * 2


def remembered(x):
    ref = jax.new_ref(jnp.zeros_like(x))
    ref[...] = x * 2
    return ref[...] + 1


def remembered_in_a_loop(x):
    ref = jax.new_ref(jnp.zeros(3, x.dtype))

    def step(c, i):
        ref[i] = c
        return c * 2, None

    jax.lax.scan(step, x, jnp.arange(3))
    return ref[...].sum()


def remembered_int(x):
    ref = jax.new_ref(jnp.zeros((), jnp.int32))
    ref[...] = x.astype(jnp.int32)
    return ref[...].astype(x.dtype) * 2


def tangled(x):
    y, push = jax.linearize(jnp.sin, x)
    z, pull = jax.vjp(jnp.cos, y)
    return push(z) + pull(y)[0] + jax.jvp(jnp.tanh, (x,), (stop(x),))[1]


def deep(x, n=60):
    return jnp.sin(x) if n == 0 else deep(x * 0.99, n - 1)


def wide(x):
    for _ in range(500):
        x = jnp.sin(x) + 0.1
    return x


def scattered(name):
    dims = jax.lax.ScatterDimensionNumbers((), (0,), (0,))
    scatter = getattr(jax.lax, name)
    return lambda x, y: scatter(x, jnp.array([[0]]), y[:1], dims, unique_indices=True)


def sharded(collective, check=True, out=SPLIT):
    part = lambda w, x: collective(stop(w) * x[0] + jnp.sin(x), "d")
    specs = {"in_specs": (P(), P("d")), "out_specs": out, "check_vma": check}
    return jax.shard_map(part, mesh=mesh(8), **specs)


def shuffled(x, axis):
    return jax.lax.ppermute(x, axis, [(k, (k + 1) % 8) for k in range(8)])


def gathered(x, axis):
    return jax.lax.all_gather(x, axis, tiled=True)


def maximum(x, axis):
    return jax.lax.pmax(stop(x), axis) * x


def indexed(x, axis):
    return jax.lax.axis_index(axis) * x


def convolved(x, k):
    return jax.lax.conv_general_dilated(x[None, None], k[None, None], (1,), "SAME")


def summed(x):
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (2,), (1,), "VALID")


def policy(name):
    return jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)), policy=name)


def until(x, n):
    return jax.lax.while_loop(
        lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] * x), (0, x)
    )


class Model:
    scale = 2.0

    def __call__(self, x):
        return self.method(x)

    def method(self, x):
        return jnp.sin(self.scale * x)


exec("def sourceless(x):\n    return jnp.round(x) * x", no_source := {"jnp": jnp})
exec("def unsourced(x):\n    return jnp.round(x) * 2", no_source)
FLOWS, CUT, UNUSED, UNKNOWN = "flows", "cut", "unused", "unknown"

# name: (function, arguments, the status of each of them)
ZOO = {
    "fft": (lambda x: jnp.abs(jnp.fft.fft(x)), (V,), FLOWS),
    "rfft": (lambda x: jnp.fft.irfft(jnp.fft.rfft(x)), (V,), FLOWS),
    "svd": (lambda a: jnp.linalg.svd(a, compute_uv=False), (M,), FLOWS),
    "eigh": (lambda a: jnp.linalg.eigh(a)[0], (M,), FLOWS),
    "qr": (lambda a: jnp.linalg.qr(a)[1], (M,), FLOWS),
    "cholesky": (jnp.linalg.cholesky, (M,), FLOWS),
    "solve": (jnp.linalg.solve, (M, V), "flows flows"),
    "lu": (lambda a: jax.scipy.linalg.lu(a)[2], (M,), FLOWS),
    "lu pivots": (lambda a: jax.lax.linalg.lu(a)[1] * 1.0, (M,), CUT),
    "det": (jnp.linalg.det, (M,), FLOWS),
    "matrix rank": (lambda a: jnp.linalg.matrix_rank(a) * 1.0, (M,), CUT),
    "sort": (lambda x, y: jax.lax.sort((x, y))[1], (V, V), "cut flows"),
    "argsort": (lambda x, y: y[jnp.argsort(x)], (V, V), "cut flows"),
    "top_k": (lambda x: jax.lax.top_k(x, 2)[0], (V,), FLOWS),
    "top_k indices": (lambda x: jax.lax.top_k(x, 2)[1] * 1.0, (V,), CUT),
    "cumsum": (jnp.cumsum, (V,), FLOWS),
    "cummax": (jax.lax.cummax, (V,), FLOWS),
    "gather": (lambda x, i: x[i], (V, jnp.array([0, 2])), "flows data"),
    "scatter": (scattered("scatter"), (V, V), "flows flows"),
    "scatter_add": (scattered("scatter_add"), (V, V), "flows flows"),
    "scatter_mul": (scattered("scatter_mul"), (V, V), "flows flows"),
    "segment_sum": (
        lambda x: jax.ops.segment_sum(x, jnp.array([0, 1, 0]), 2),
        (V,),
        FLOWS,
    ),
    "conv": (convolved, (V, V), "flows flows"),
    "reduce_window": (summed, (V,), FLOWS),
    "associative_scan": (lambda x: jax.lax.associative_scan(jnp.add, x), (V,), FLOWS),
    "interp": (jnp.interp, (S, jnp.sort(V), V), "flows flows flows"),
    "searchsorted": (lambda x, y: jnp.searchsorted(x, y) * 1.0, (V, S), "cut cut"),
    "digamma": (jax.scipy.special.digamma, (S,), FLOWS),
    "logsumexp": (jax.scipy.special.logsumexp, (V,), FLOWS),
    "custom_root": (rooted, (S,), FLOWS),
    "custom_linear_solve": (solved, (S, S), "flows flows"),
    "custom_vmap, batched": (lambda x: jax.vmap(batched)(x), (V,), FLOWS),
    "pallas_call": (pallas, (V,), UNKNOWN),
    "while": (lambda x: until(x, 3)[1], (S,), UNKNOWN),
    "while, counter": (lambda n, x: until(1.0, n)[0] * x, (S, S), "cut flows"),
    "pure_callback": (lambda x: jax.pure_callback(np.sin, like(x), x), (S,), UNKNOWN),
    "pure_callback of a stopped": (
        lambda x: jax.pure_callback(np.sin, like(x), stop(x)) * x,
        (S,),
        FLOWS,
    ),
    "io_callback": (lambda x: io_callback(np.sin, like(x), x), (S,), UNKNOWN),
    "debug.print": (printed, (S,), FLOWS),
    "reference": (remembered, (S,), FLOWS),
    "reference in a scan": (remembered_in_a_loop, (S,), FLOWS),
    "reference of int": (remembered_int, (S,), CUT),
    "hessian": (jax.hessian(lambda x: (x**3).sum()), (V,), FLOWS),
    "hessian of a square": (jax.hessian(lambda x: (x**2).sum()), (V,), UNUSED),
    "linearize, vjp, jvp": (tangled, (S,), FLOWS),
    "remat, dots": (policy(policies.dots_saveable), (S,), FLOWS),
    "remat, nothing": (policy(policies.nothing_saveable), (S,), FLOWS),
    "psum": (sharded(jax.lax.psum, out=P()), (S, E), "cut flows"),
    "psum, unchecked": (sharded(jax.lax.psum, False, P()), (S, E), "cut flows"),
    "pmean": (sharded(jax.lax.pmean, out=P()), (S, E), "cut flows"),
    "ppermute": (sharded(shuffled), (S, E), "cut flows"),
    "all_gather": (sharded(gathered), (S, E), "cut flows"),
    "pmax, stopped": (sharded(maximum), (S, E), "cut flows"),
    "axis_index": (sharded(indexed), (S, E), "cut flows"),
    "map": (lambda x: jax.lax.map(lambda x: jnp.round(x) + 1, x), (V,), CUT),
    "scan of no round": (
        lambda x: jax.lax.scan(lambda c, _: (jnp.round(c), None), x, None, 0)[0],
        (S,),
        FLOWS,
    ),
    "complex": (lambda x: jnp.real(x * jax.lax.complex(x, x)), (S,), FLOWS),
    "complex stopped": (lambda x: jnp.abs(stop(x + 1j)), (S,), CUT),
    "bfloat16": (lambda x: x.astype(jnp.bfloat16) * 2, (S,), FLOWS),
    "float8": (lambda x: x.astype(jnp.float8_e4m3fn).astype(x.dtype), (S,), FLOWS),
    "bitcast": (lambda x: jax.lax.bitcast_convert_type(x, jnp.int32) * 1.0, (S,), CUT),
    "bool": (lambda x: (x > 0) * 1.0, (S,), CUT),
    "floor_divide": (jnp.floor_divide, (S, S), "cut cut"),
    "remainder": (jnp.remainder, (S, S), "flows flows"),
    "empty": (lambda x, y: x[:0].sum() + y, (V, S), "flows flows"),
    "ints": (lambda i, x: i * x, (jnp.array(3), S), "data flows"),
    "key": (lambda k, x: jax.random.normal(k) * x, (KEY, S), "data flows"),
    "split": (
        lambda k, x: jax.random.uniform(jax.random.split(k)[0]) * x,
        (jax.random.PRNGKey(0), S),
        "data flows",
    ),
    "gamma": (lambda x: jax.random.gamma(KEY, x), (S,), FLOWS),
    "poisson": (lambda x: jax.random.poisson(KEY, x) * 1.0, (S,), CUT),
    "bernoulli": (lambda x: jax.random.bernoulli(KEY, x) * 1.0, (S,), CUT),
    "categorical": (lambda x: jax.random.categorical(KEY, x) * 1.0, (V,), CUT),
    "prevent_gradient": (sg.prevent_gradient, (S,), UNKNOWN),
    "donated": (jax.jit(jnp.sin, donate_argnums=0), (S,), FLOWS),
    "deep": (deep, (S,), FLOWS),
    "a thousand equations": (wide, (S,), FLOWS),
    "constant": (lambda x: 3.0 + jnp.zeros_like(x), (S,), UNUSED),
    "no source, flows": (no_source["sourceless"], (S,), FLOWS),
    "no source, cut": (no_source["unsourced"], (S,), CUT),
    "ufunc": (jnp.sin, (S,), FLOWS),
    "partial": (functools.partial(jnp.power, S), (S,), FLOWS),
    "object": (Model(), (S,), FLOWS),
    "method": (Model().method, (S,), FLOWS),
    "jitted method": (jax.jit(Model().method), (S,), FLOWS),
    "grad": (jax.grad(lambda x: x**3), (S,), FLOWS),
    "vmap": (jax.vmap(jnp.round), (V,), CUT),
    **{k: (f, (S, f32(1, 2, 3, 4)), "flows flows") for k, f in EVERYWHERE.items()},
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    fun, args, expected = ZOO[name]
    flow = sg.flow(fun)(*args)
    assert " ".join(row.status for row in flow.inputs) == expected
    text = look_at_all(flow, 0)
    for word in ("Traceback", "<function", "object at 0x", "(None", "nan"):
        assert word not in text


@pytest.mark.parametrize("name", [k for k in ZOO if "unknown" not in ZOO[k][2]])
def test_zoo_agrees_with_gradients(name):
    fun, args, expected = ZOO[name]
    floats = [k for k, word in enumerate(expected.split()) if word != "data"]
    found = []
    ask = sg.gradients(fun, floats, ys="return")
    jax.eval_shape(lambda *args: found.extend(ask(*args)), *args)
    status = ["unused" if g is None else "flows" for g in found]
    told = [w.replace("cut", "unused") for w in expected.split() if w != "data"]
    assert status == told


@pytest.mark.parametrize("name", [k for k in ZOO if "unknown" in ZOO[k][2]])
def test_unknown_is_what_jax_refuses(name):
    fun, args, _ = ZOO[name]
    with pytest.raises((ValueError, NotImplementedError, TypeError)):
        jax.eval_shape(jax.grad(lambda *a: jnp.sum(fun(*a))), *args)


SAMPLERS = {
    "cauchy": lambda x: x * jax.random.cauchy(KEY),
    "exponential": lambda x: jax.random.exponential(KEY) / x,
    "uniform": lambda x: jax.random.uniform(KEY, minval=0, maxval=1 + x),
    "truncated_normal": lambda x: jax.random.truncated_normal(KEY, -x, x),
    "beta": lambda x: jax.random.beta(KEY, x, 1.0),
    "dirichlet": lambda x: jax.random.dirichlet(KEY, jnp.stack([x, 2 * x])),
    "loggamma": lambda x: jax.random.loggamma(KEY, x),
    "t": lambda x: jax.random.t(KEY, x),
    "normal": lambda x: x + jax.random.normal(KEY),
    "multivariate_normal": lambda x: jax.random.multivariate_normal(
        KEY, jnp.stack([x, x]), jnp.eye(2)
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_with_a_pathwise_gradient(name):
    flow = sg.flow(SAMPLERS[name])(S)
    assert flow.inputs[0].status == "flows"
    assert jnp.any(jax.grad(lambda x: jnp.sum(SAMPLERS[name](x)))(S) != 0)
    look_at_all(flow, "x")


@pytest.mark.parametrize(
    "fun", [lambda x: None, lambda x: 3, lambda x: x > 0, lambda x: (), jnp.argmax]
)
def test_nothing_to_differentiate(fun):
    with pytest.raises(TypeError, match=r"must return a value(.|\n)*got:(.|\n)*write:"):
        sg.flow(fun)(V)


def linen(x):
    model = flax.linen.Dense(2)
    return jnp.sum(jnp.round(model.apply(model.init(KEY, x), x)))


def equinoxed(model, x):
    return jnp.sum(stop(model(x)) * x[0])


def optaxed(x, y):
    return optax.softmax_cross_entropy(x, stop(y)).mean()


LIBRARIES = {
    "linen": (linen, (V,), ["cut"]),
    "nnx": (lambda x: nnx.Linear(3, 2, rngs=nnx.Rngs(0))(x), (V,), ["flows"]),
    "equinox": (equinoxed, (eqx.nn.Linear(3, 2, key=KEY), V), ["cut", "flows"]),
    "optax": (optaxed, (V, V), ["flows", "cut"]),
}


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.usefixtures("standard_promotion")
def test_libraries(name):
    fun, args, expected = LIBRARIES[name]
    flow = sg.flow(fun)(*args)
    assert [row.status for row in flow.inputs] == expected
    look_at_all(flow, 0)


def test_shapes_are_enough():
    x = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    flow = sg.flow(lambda x: jnp.sum(jnp.round(x)))(x)
    assert flow.inputs[0].status == "cut"
    assert flow.inputs[0].values == 10**12
