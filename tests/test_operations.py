"""`sg.op` by the names that users know, also where JAX has none for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import mesh

import stopgrad_jax as sg
from stopgrad_jax._program.operations import becomes

X = jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 3 - 1
W = jnp.array([[1.0, 2.0], [0.5, -1.0], [2.0, 0.25]], jnp.float32)
ROWS = jnp.array([1, 0])
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .+"


def refusal(ask):
    with pytest.raises(sg.AddressError, match=BEATS) as caught:
        ask()
    return str(caught.value)


def assert_close(a, b, rtol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), a, b
    )


# What users write, what it computes of an array, and how many arrays it reads.
KNOWN = {
    "softmax": (jax.nn.softmax, 1),
    "gelu": (jax.nn.gelu, 1),
    "sigmoid": (jax.nn.sigmoid, 1),
    "swish": (jax.nn.swish, 1),
    "silu": (jax.nn.silu, 1),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, axis=-1), 1),
    "log_softmax": (jax.nn.log_softmax, 1),
    "leaky_relu": (jax.nn.leaky_relu, 1),
    "softplus": (jax.nn.softplus, 1),
    "one_hot": (lambda x: jax.nn.one_hot(ROWS, 3, dtype=x.dtype) * 1.0 + 0 * x, 1),
    "where": (lambda x: jnp.where(x > 0, x, 1.0), 3),
    "_where": (lambda x: jnp.where(x > 0, x, 1.0), 3),
    "maximum": (lambda x: jnp.maximum(x, 0.1), 2),
    "einsum": (lambda x: jnp.einsum("ij,jk->ik", x, W), 2),
    "take": (lambda x: jnp.take(x, ROWS, axis=0), 2),
    "gather": (lambda x: x[ROWS], 2),
    "mean": (lambda x: x.mean(axis=-1), 1),
    "matmul": (lambda x: x @ W, 2),
    "dot_general": (lambda x: x @ W, 2),
    "absolute": (lambda x: abs(x), 1),
    "power": (lambda x: x**3, 1),
    "divide": (lambda x: x / 3.0, 2),
    "standardize": (jax.nn.standardize, None),
    "norm": (lambda x: jnp.linalg.norm(x, axis=-1), 1),
}


@pytest.mark.parametrize("name", KNOWN)
def test_names_that_users_know(name):
    fun, count = KNOWN[name]
    seen = []

    def edit(op, *operands):
        seen.append((op(*operands), len(operands)))
        return seen[-1][0] * 2.0 + 1.0

    wrapped = lambda x: 3.0 * fun(jnp.sin(x))
    expected = fun(jnp.sin(X))
    out = sg.edit(wrapped, {sg.op(name): edit})(X)
    ((value, operands),) = seen
    assert count in (None, operands)
    assert_close(
        value,
        jnp.asarray(
            jax.nn.one_hot(ROWS, 3, dtype=X.dtype) if name == "one_hot" else expected
        ),
    )
    if name != "one_hot":  # it is multiplied by 1. behind the operation
        assert_close(out, 3.0 * (2.0 * expected + 1.0))
    same = sg.edit(wrapped, {sg.op(name): lambda op, *operands: op(*operands)})
    assert_close(same(X), wrapped(X), rtol=1e-7)


def test_a_group_is_a_value_too(run):
    fun = lambda x: jnp.sum(jax.nn.softmax(jnp.sin(x)) ** 2)
    address, soft = sg.op("softmax"), jax.nn.softmax(jnp.sin(X))
    assert_close(run(sg.capture(fun, address))(X)[1][address], soft)
    assert_close(run(sg.gradients(fun, address))(X), 2 * soft)
    assert sg.gradients(fun, 0, stop_gradients=address)(X) is None
    zero = {address: jnp.zeros_like(soft)}
    perturbed = lambda p: sg.perturb(fun, address)(p, X)
    assert_close(jax.grad(perturbed)(zero)[address], 2 * soft)
    straight = lambda op, x: sg.replace_value(x, op(x))
    found = run(jax.grad(sg.edit(fun, {address: straight})))(X)
    assert_close(found, 2 * soft * jnp.cos(X))


def looped(x):
    for _ in range(3):
        x = jax.nn.softmax(x) * 2.0
    return x


def one_operation(x):
    for _ in range(3):
        x = x * x.mean()  # two equations at one instruction, three times
    return x


def inside(x):
    def many(x):
        for _ in range(3):
            x = jnp.sin(x) + 1.0
        return x

    return many(x) * many(jnp.cos(x))


@pytest.mark.parametrize(
    ("fun", "name", "count"),
    [
        (looped, "softmax", 3),
        (jax.jit(looped), "softmax", 3),
        (one_operation, "mean", 3),
        (inside, "many", 2),
        (lambda x: [jax.nn.gelu(x), jax.nn.gelu(x)][1], "gelu", 2),
        (lambda x: jax.nn.softmax(jax.nn.softmax(x)), "softmax", 2),
        (lambda x: sum(map(jax.nn.gelu, [x, 2 * x])), "gelu", 2),
        (lambda x: jax.vmap(jax.nn.softmax)(x), "softmax", 1),
        (lambda x: jax.checkpoint(jax.nn.softmax)(x), "softmax", 1),
        (lambda x: jax.lax.cond(x[0, 0] < 9, jax.nn.gelu, jnp.sin, x), "gelu", 1),
    ],
    ids=range(10),
)
def test_calls_are_told_apart(fun, name, count):
    seen = []

    def edit(op, *operands):
        seen.append(len(operands))
        return op(*operands)

    assert_close(sg.edit(fun, {sg.op(name): edit})(X), fun(X), rtol=1e-6)
    assert len(seen) == count
    found = sg.capture(fun, sg.op(name))(X)[1][sg.op(name)]
    assert len(found if count > 1 else [found]) == count


def test_in_a_scan_values_are_stacked():
    step = lambda c, _: (jax.nn.gelu(c), None)
    fun = lambda x: jax.lax.scan(step, x, None, length=2)[0]
    found = sg.capture(fun, sg.op("gelu"))(X)[1][sg.op("gelu")]
    once = jax.nn.gelu(X)
    assert_close(found, jnp.stack([once, jax.nn.gelu(once)]))
    doubled = sg.edit(fun, {sg.op("gelu"): lambda gelu, x: 2 * gelu(x)})(X)
    assert_close(doubled, 2 * jax.nn.gelu(2 * once))


def test_in_a_shard_map():
    P = jax.sharding.PartitionSpec
    if jax.config.jax_check_tracer_leaks:
        return
    part = jax.shard_map(
        lambda x: jax.nn.gelu(x) * 2, mesh=mesh(2), in_specs=P("d"), out_specs=P("d")
    )
    edit = {sg.op("gelu"): lambda gelu, x: gelu(x) + 1.0}
    assert_close(sg.edit(lambda x: part(x), edit)(X), 2 * jax.nn.gelu(X) + 2)


def pair(x, y):
    return jnp.sin(x) * y, jnp.cos(y)


def test_a_function_of_the_user_with_two_results():
    fun = lambda x: functools.reduce(jnp.multiply, pair(x, x + 1.0))
    swap = lambda op, x, y: op(y, x)
    expected = functools.reduce(jnp.multiply, pair(X + 1.0, X))
    assert_close(sg.edit(fun, {sg.op("pair"): swap})(X), expected)
    found = sg.capture(fun, sg.op("pair"))(X)[1][sg.op("pair")]
    assert_close(found, pair(X, X + 1.0))
    a, b = sg.gradients(fun, sg.op("pair"), ys="return")(X)
    assert_close((a, b), (jnp.cos(X + 1.0), jnp.sin(X) * (X + 1.0)))


def test_edits_inside_of_an_edited_operation():
    def outer(x):
        return jax.nn.softmax(x) * sg.name(3.0 * x, "h")

    jitted = jax.jit(outer)
    edits = {
        sg.op("outer"): lambda op, x: op(x) * 10.0,
        sg.op("softmax"): lambda op, x: op(x) + 1.0,
        "h": lambda h: -h,
    }
    expected = (jax.nn.softmax(X) + 1.0) * (-3.0 * X) * 10.0 + 1.0
    for fun in (lambda x: outer(x) + 1.0, lambda x: jitted(x) + 1.0):
        assert_close(sg.edit(fun, edits)(X), expected)
    both = {sg.op("softmax"): lambda op, x: 2 * op(x), sg.var("h"): lambda h: h + 1.0}

    def assigned(x):
        h = jax.nn.softmax(x)
        return h * 3.0

    assert_close(sg.edit(assigned, both)(X), 3 * (2 * jax.nn.softmax(X) + 1))


def test_edits_of_results_inside_and_behind_an_operation():
    """`h = edit(h)` in the function, `b = edit(b)` where it is called."""

    def two(x):
        h = sg.name(jnp.sin(x), "h")
        g = h * 2.0
        return g, g * h

    def fun(x):
        a, b = two(x)
        return a * 100.0 + b

    edits = {
        sg.op("two"): lambda op, x: tuple(y + 1.0 for y in op(x)),
        "h": lambda h: h + 1.0,
        sg.var("g"): lambda g: g * 3.0,
        sg.var("b"): lambda b: -b,
    }
    h = jnp.sin(X) + 1.0
    g = h * 2.0 * 3.0
    expected = (g + 1.0) * 100.0 - (g * h + 1.0)
    assert_close(sg.edit(fun, edits)(X), expected)


def test_edits_of_functions_with_the_same_equations():
    def one(x):
        return jnp.sin(x)

    def two(x):
        return one(x)

    add = lambda k: lambda op, x: op(x) * 10.0 + k
    for names in (("one", "two", "sin"), ("sin", "two", "one")):
        edits = {sg.op(n): add({"sin": 1.0, "one": 2.0, "two": 3.0}[n]) for n in names}
        expected = ((jnp.sin(X) * 10 + 1) * 10 + 2) * 10 + 3
        assert_close(sg.edit(lambda x, e=edits: two(x), edits)(X), expected)


def test_primitives_mean_what_they_did():
    fun = lambda x: jnp.max(x) + jnp.maximum(x, 0.5) + jnp.sin(x)
    doubled = {sg.op("max"): lambda op, *xs: 2 * op(*xs)}
    expected = jnp.max(X) + 2 * jnp.maximum(X, 0.5) + jnp.sin(X)
    assert_close(sg.edit(fun, doubled)(X), expected)
    refused = refusal(lambda: sg.edit(lambda x: jnp.max(x), doubled)(X))
    assert 'operations "reduce_max"' in refused
    with pytest.raises(sg.AddressError, match="in the body of a custom rule only"):
        sg.edit(lambda x: jax.nn.relu(x), {sg.op("maximum"): abs})(X)


def test_what_functions_of_jax_become():
    assert becomes("sigmoid") == {"logistic"}
    assert becomes("swish") == {"silu"}
    assert becomes("maximum") == {"max"}
    assert becomes("matmul") == {"dot_general"}
    for name in ("softmax", "gelu", "einsum", "save", "set_printoptions", "a b", "nn"):
        assert becomes(name) == frozenset()


# -- several names, some of the matches ---


def test_several_names():
    fun = lambda x: jnp.exp(jax.nn.softmax(jnp.sin(x)))
    address = sg.op(("softmax", "exp"))
    soft = jax.nn.softmax(jnp.sin(X))
    found = sg.capture(fun, address)(X)[1][address]  # not the exp in the softmax
    assert_close(found, (soft, jnp.exp(soft)))
    assert len(sg.gradients(fun, address, ys="return")(X)) == 2
    alone = sg.capture(fun, sg.op(("sin",)))(X)[1][sg.op(("sin",))]
    assert_close(alone, jnp.sin(X))


def deep(x):
    for k in range(4):
        x = jnp.sin(x) + k
    return x


def after(count):
    x = X
    for k in range(count):
        x = jnp.sin(x) + k
    return jnp.sin(x)


@pytest.mark.parametrize(
    ("nth", "chosen"),
    [
        (0, [0]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (slice(-2, None), [2, 3]),
    ],
    ids=str,
)
def test_the_nth_match(nth, chosen):
    address = sg.op("sin", nth=nth)
    assert hash(address) == hash(sg.op("sin", nth=nth))
    assert eval(repr(address)) == address
    found = sg.capture(deep, address)(X)[1][address]
    expected = tuple(after(k) for k in chosen)
    assert_close(found, expected if len(chosen) > 1 else expected[0])


def test_the_nth_match_is_that_of_one_call():
    inner = jax.jit(lambda x: jnp.sin(x) * jnp.sin(2 * x))
    fun = lambda x: inner(x) + inner(x + 1)
    doubled = {sg.op("sin", nth=2): lambda sin, x: 2 * sin(x)}
    assert_close(sg.edit(fun, doubled)(X), inner(X) + 2 * inner(X + 1))
    both = {
        sg.op("sin", nth=0): lambda sin, x: 2 * sin(x),
        sg.op("sin", nth=-1): lambda sin, x: 3 * sin(x),
        sg.op("add", nth=0): lambda add, a, b: add(a, b) + 1.0,
    }
    expected = 2 * inner(X) + 3 * inner(X + 2)
    assert_close(sg.edit(fun, both)(X), expected)
    assert_close(
        sg.edit(looped, {sg.op("softmax", nth=1): lambda op, x: x})(X),
        2 * jax.nn.softmax(4 * jax.nn.softmax(X)),
    )


def test_several_results_are_one_match():
    fun = lambda x: jax.lax.top_k(x, 2)[0] + jax.lax.top_k(-x, 2)[0]
    found = sg.capture(fun, sg.op("top_k", nth=1))(X)[1]
    assert_close(found[sg.op("top_k", nth=1)], tuple(jax.lax.top_k(-X, 2)))


@pytest.mark.parametrize("nth", [4, -5, slice(7, 9)], ids=str)
def test_a_match_that_there_is_not(nth):
    message = refusal(lambda: sg.capture(deep, sg.op("sin", nth=nth))(X))
    assert "from -4 to 3\n  got:   4 matches\n" in message
    assert 'write: sg.op("sin", nth=0), or sg.op("sin") for all' in message


@pytest.mark.parametrize(
    "ask",
    [
        lambda: sg.op(3),
        lambda: sg.op(""),
        lambda: sg.op(()),
        lambda: sg.op(("sin", 3)),
        lambda: sg.op("sin", within=3),
        lambda: sg.op("sin", nth=1.0),
        lambda: sg.op("sin", nth=True),
        lambda: sg.op("sin", nth=slice("a", None)),
        lambda: sg.op("sin", nth=slice(None, None, 0)),
    ],
    ids=range(9),
)
def test_what_is_no_address_of_an_operation(ask):
    with pytest.raises(TypeError, match=BEATS):
        ask()


# -- what is refused ---


def test_a_call_in_a_part_already_differentiated():
    fun = lambda x: jax.grad(lambda x: jax.nn.softmax(x)[0, 0])(x)
    edit = {sg.op("softmax"): lambda op, x: op(x)}
    message = refusal(lambda: sg.edit(fun, edit)(X))
    assert "calls whose derivative has been taken already only" in message

    def forces(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(x)))(x)

    doubled = sg.edit(lambda x: forces(x) + 1, {sg.op("forces"): lambda f, x: 2 * f(x)})
    assert_close(doubled(X), 2 * jnp.cos(X) + 1)


def test_a_call_whose_end_cannot_be_told():
    def step(x, n):
        for _ in range(n):
            x = jnp.sin(x)
        return x

    def fun(x):
        for n in (1, 2):
            x = step(x, n)
        return x

    message = refusal(lambda: sg.capture(fun, sg.op("step"))(X))
    assert "loops run around it and inside it" in message
