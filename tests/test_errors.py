"""Bad input raises when the function is traced, in four beats."""

import jax
import jax.numpy as jnp
import pytest
from programs import f32

import stopgrad_jax as sg


def f(params, x):
    h = sg.name(jnp.tanh(params["w"] * x), "hidden")
    return jnp.sum(h)


ARGS = ({"w": f32(1.0, 2.0), "n": 3}, f32(0.5, 0.5))
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .+"


def raises(kind, message, ask):
    with pytest.raises(kind, match=BEATS) as caught:
        jax.make_jaxpr(ask)()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hiden", 'one of "hidden"'),
        ("params/v", 'one of "params'),
        ("prams", 'one of "params'),
        (2, 'arguments "params", "x"'),
        ("0/v", 'arguments "params", "x"'),
        ("params/**/bias", 'points "hidden"'),
        (sg.point("x"), 'points "hidden"'),
        (sg.op("tann"), 'write: sg.op("tanh")'),
    ],
)
def test_unknown_addresses(address, message):
    for ask in (sg.gradients, sg.capture):
        raises(sg.AddressError, message, lambda ask=ask: ask(f, address)(*ARGS))
    raises(LookupError, message, lambda: sg.edit(f, {address: abs})(*ARGS))
    raises(LookupError, message, lambda: sg.gradients(f, 0, ys=address)(*ARGS))
    stops = {"stop_gradients": address}
    raises(LookupError, message, lambda: sg.gradients(f, 0, **stops)(*ARGS))


def test_what_an_address_may_be_is_said_of_the_call():
    """An output is nothing to differentiate by."""
    any_of = "must match an argument, an output or a named point of f"
    for ask in (
        lambda: sg.capture(f, "return/loss")(*ARGS),
        lambda: sg.edit(f, {"return/loss": abs})(*ARGS),
        lambda: sg.gradients(f, 0, ys="return/loss")(*ARGS),
    ):
        raises(sg.AddressError, any_of, ask)
    by = "must match an argument or a named point of f"
    stops = {"stop_gradients": "return/loss"}
    raises(sg.AddressError, by, lambda: sg.gradients(f, "return/loss")(*ARGS))
    raises(sg.AddressError, by, lambda: sg.gradients(f, 0, **stops)(*ARGS))


def test_an_address_that_means_two_things():
    g = lambda h: sg.name(h * 2, "h")
    raises(sg.AddressError, 'write: sg.point("h")', lambda: sg.gradients(g, "h")(1.0))
    assert sg.gradients(g, [sg.point("h"), 0])(1.0) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("xs", "message"),
    [
        ([], "xs must hold at least one address"),
        ((), "xs must hold at least one address"),
        ({}, "xs must hold at least one address"),
        (None, "None (NoneType)"),
        (1.5, "1.5 (float)"),
        (["x", None], "None (NoneType)"),
        (True, "True (bool)"),
        (f, "(function)"),
    ],
)
def test_xs_that_are_no_addresses(xs, message):
    raises(TypeError, message, lambda: sg.gradients(f, xs)(*ARGS))


@pytest.mark.parametrize(
    ("grad_ys", "message"),
    [
        ((1.0, 1.0), "grad_ys must be structured like ys"),
        ({"a": 1.0}, "grad_ys must be structured like ys"),
        (f32(1.0, 2.0), "must be f32[], like its y\n  got:   f32[2]"),
        (jnp.ones((), jnp.bfloat16), "must be f32[], like its y\n  got:   bf16[]"),
        ("text", "got:   str"),
    ],
)
def test_wrong_grad_ys(grad_ys, message):
    ask = sg.gradients(f, "params/w", grad_ys=grad_ys)
    raises(TypeError, message, lambda: ask(*ARGS))


def test_one_cotangent_for_a_tree():
    g = lambda x: {"a": x, "b": x}
    ask = sg.gradients(g, "x", ys="return", grad_ys=1.0)
    raises(TypeError, "one entry where the y is a tree", lambda: ask(1.0))
    weights = {"a": None, "b": 2.0}
    assert sg.gradients(g, "x", ys="return", grad_ys=weights)(1.0) == 3.0


@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (lambda x: x.astype(int), "got:   i"),
        (lambda x: x > 0, "got:   bool[]"),
        (lambda x: x.astype(jnp.complex64), "got:   c64[]"),
    ],
    ids=["integer", "bool", "complex"],
)
def test_ys_that_need_grad_ys(fun, message):
    x = f32(2.0)[0]
    raises(TypeError, message, lambda: sg.gradients(fun, "x")(x))
    ones = jnp.ones_like(fun(x))
    found = sg.gradients(fun, "x", grad_ys=ones)(x)
    assert found is None or found == 1.0


def test_several_outputs():
    two = lambda x: {"loss": x, "metric": 2 * x}
    message = '2 arrays: "return/loss", "return/metric"'
    raises(TypeError, message, lambda: sg.gradients(two, "x")(1.0))
    raises(TypeError, "0 arrays: none", lambda: sg.gradients(lambda x: 3, "x")(1.0))
    aux = lambda: sg.gradients(two, "x", has_aux=True)(1.0)
    raises(TypeError, "must return (y, aux)", aux)


@pytest.mark.parametrize("role", [{"xs": "return"}, {"stop_gradients": "return"}])
def test_an_output_is_no_x_and_no_stop(role):
    ask = {"xs": "x", **role}
    raises(
        sg.AddressError, '"return", its output', lambda: sg.gradients(f, **ask)(*ARGS)
    )


def test_a_program_that_cannot_be_searched_is_named():
    @jax.custom_batching.custom_vmap
    def g(x):
        return sg.name(x * 2, "h")

    g.def_vmap(lambda size, batched, x: (x * 2, True))
    both = lambda x: g(sg.name(x, "h"))  # one that can be reached, one that cannot
    for fun in (g, both):
        raises(
            sg.AddressError,
            "custom_vmap_call",
            lambda fun=fun: sg.capture(fun, "h")(1.0),
        )
    other = lambda: sg.capture(g, "k")(1.0)
    raises(sg.AddressError, "holds a program that cannot be searched", other)


@pytest.mark.parametrize(
    ("combine", "told"),
    [
        (lambda x: x.at[0].add(1.0)[:2], False),
        (lambda x: x.at[jnp.array([0, 2])].max(x[1], unique_indices=True)[:2], False),
        (lambda x: jax.lax.reduce(x, 1.0, jax.lax.mul, (0,)), False),
        (lambda x: jax.lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (0,)), True),
        (lambda x: jax.lax.reduce(x, 0.0, jax.jit(lambda a, b: a + 2 * b), (0,)), True),
    ],
)
def test_a_combining_operation_is_no_program_to_search(combine, told):
    with pytest.raises(sg.AddressError) as caught:
        sg.capture(combine, "nowhere")(f32(1, 2, 3))
    message = " ".join(str(caught.value).split())
    assert ("holds a program that cannot be searched" in message) == told


def test_an_operation_edit_of_the_wrong_arity():
    g = lambda x: jax.lax.top_k(x, 2)[0]
    for edit in (lambda top, x: top(x)[0], lambda top, x: (*top(x), x)):
        ask = sg.edit(g, {sg.op("top_k"): edit})
        raises(TypeError, "must return 2 arrays", lambda ask=ask: ask(f32(1, 2, 3)))


def test_edits_of_keys():
    g = lambda key: sg.name(key, "k")
    ask = sg.edit(g, {"k": lambda key: 3})
    raises(TypeError, "got:   int", lambda: ask(jax.random.key(0)))
    fold = sg.edit(g, {"k": lambda key: jax.random.fold_in(key, 1)})
    assert fold(jax.random.key(0)) == jax.random.fold_in(jax.random.key(0), 1)


def test_a_dynamic_while_body():
    def g(x, n):
        body = lambda c: (c[0] + 1, sg.name(c[1] * 2, "h"))
        return jax.lax.while_loop(lambda c: c[0] < n, body, (0, x))[1]

    n = jnp.array(2)
    raises(ValueError, "write: jax.lax.scan", lambda: sg.gradients(g, "h")(1.0, n))
    stops = {"stop_gradients": "h"}
    raises(ValueError, "test_errors.py", lambda: sg.gradients(g, "x", **stops)(1.0, n))


def test_inside_a_custom_rule():
    rule = jax.custom_jvp(lambda x: sg.name(x * x, "h") + 1)
    rule.defjvp(lambda p, t: (rule(*p), t[0]))
    g = lambda x: rule(x) * 2
    raises(ValueError, "the body of one", lambda: sg.gradients(g, "h")(1.0))
    raises(ValueError, "the body of one", lambda: sg.edit(g, {"h": abs})(1.0))


def test_unknown_choice():
    raises(
        ValueError,
        "got:   unconnected_gradients='zeros'",
        lambda: sg.gradients(f, 0, unconnected_gradients="zeros")(*ARGS),
    )


CAUSES = {
    "stop_gradient": lambda x: jax.lax.stop_gradient(3 * x) ** 2,
    "the derivative of round is zero": lambda x: jnp.round(3.3 * x) ** 2,
    "returns int32": lambda x: (3.3 * x).astype(jnp.int32).astype(jnp.float32),
    "argmax returns int": lambda x: jnp.argmax(jnp.stack([x, 2 * x])).astype(
        jnp.float32
    ),
    "no y is computed from it": lambda x: jnp.float32(6.0),
    "returns bool": lambda x: (x > 1).astype(jnp.float32),
}


@pytest.mark.parametrize(("reason", "fun"), CAUSES.items(), ids=CAUSES.keys())
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_unconnected_says_why_and_where(reason, fun, wrap):
    ask = sg.gradients(wrap(fun), 0, unconnected_gradients="error")
    raises(ValueError, reason, lambda: ask(f32(2.0)[0]))
    line = fun.__code__.co_firstlineno
    if "no y" not in reason:
        raises(ValueError, f"test_errors.py:{line}", lambda: ask(f32(2.0)[0]))


def test_unconnected_inside_loops_and_branches_and_by_this_call():
    def g(x, y):
        def step(c, _):
            return c + jax.lax.stop_gradient(x), None

        return jax.lax.scan(step, y, None, length=3)[0]

    line = g.__code__.co_firstlineno + 2
    ask = sg.gradients(g, ["x", "y"], unconnected_gradients="error")
    raises(ValueError, "x: stop_gradient, on purpose (", lambda: ask(*f32(1.0, 2.0)))
    raises(ValueError, f"test_errors.py:{line})", lambda: ask(*f32(1.0, 2.0)))
    h = lambda x: sg.name(x * 2, "h") * 3
    ask = sg.gradients(h, "x", stop_gradients="h", unconnected_gradients="error")
    raises(ValueError, "held constant by stop_gradients", lambda: ask(1.0))
    ask = sg.gradients(lambda x, n: x[n], "n", unconnected_gradients="error")
    raises(ValueError, "carries no gradient", lambda: ask(f32(1.0), jnp.array(0)))
    raises(ValueError, "n: a Python value", lambda: ask(f32(1.0), 0))
    # whole trees: leaves that carry no gradient are left alone
    ask = sg.gradients(f, "params", unconnected_gradients="error")
    assert ask(*ARGS)["n"] is None
